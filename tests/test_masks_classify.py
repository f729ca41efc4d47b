"""Masks: classify is sound, and exact where it promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_dilated import masks, orders
from compiled_dilated.masks import Mask
from compiled_dilated.regions import EMPTY, PARTIAL, Regions
from tests import strategies
from tests.strategies import by_head, dense, every_third
from tests.support.masks import EXACT, check_classify, contiguous_tiles, verdict_of


@given(st.data())
def test_classify_is_sound(data: st.DataObject) -> None:
    mask, _, n = data.draw(strategies.masks_and_orders())
    q, kv = data.draw(strategies.regions(n, 6)), data.draw(strategies.regions(n, 6))
    check_classify(mask, dense(mask, n, n), q, kv)


@given(st.data())
def test_classify_is_sound_on_boxes(data: st.DataObject) -> None:
    grid = data.draw(strategies.grids())
    n = math.prod(grid)
    mask = data.draw(strategies.expressions(strategies.grid_masks(grid) | strategies.line_masks()))
    q, kv = data.draw(strategies.regions(n, 6, grid)), data.draw(strategies.regions(n, 6, grid))
    check_classify(mask, dense(mask, n, n), q, kv)


@pytest.mark.parametrize("mask", EXACT, ids=repr)
@pytest.mark.parametrize("tile", [1, 4, 7, 16])
def test_classify_is_exact_on_contiguous_tiles(mask: Mask, tile: int) -> None:
    rows, columns = contiguous_tiles(48, tile), contiguous_tiles(41, tile)
    check_classify(mask, dense(mask, 48, 41), rows, columns, exact=True)


@pytest.mark.parametrize(("width", "rate"), [(16, 2), (12, 3), (16, 3), (24, 4), (5, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_dilated_branch_is_exact_in_residue_order(width: int, rate: int, causal: bool) -> None:
    """LongNet's branches become whole tiles in residue order.

    A tile then has one class of one segment.
    """
    n, order = 3 * width + 2, orders.residue(rate, period=width)
    place = np.arange(n)
    for offset in range(rate):
        mask = masks.segments(width) & masks.congruent(rate, offset, period=width)
        mask = mask & masks.causal() if causal else mask
        truth, single = dense(mask, n, n), order.regions(place, place + 1, n)
        check_classify(mask, truth, single, single, exact=True)
        # Whole classes: the first, longer classes of a segment have one token more.
        starts = np.cumsum([0] + [len(range(c, width, rate)) for c in range(rate)])
        starts = starts[:-1][np.diff(starts) > 0]
        stops = np.append(starts[1:], width)
        segments = np.arange(3)[:, None] * width
        tiles = order.regions((segments + starts).reshape(-1), (segments + stops).reshape(-1), n)
        check_classify(mask, truth, tiles, tiles, exact=True)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("edges", ["cut", "shift"])
def test_neighborhood_is_exact_on_boxes(dilation: int, edges: str) -> None:
    grid, side = (12, 16), 4
    mask = masks.neighborhood(grid, 3 if dilation == 1 else 1, dilation, edges=edges)
    corners = [row * 16 + column for row, column in itertools.product((0, 4, 8), (0, 4, 8, 12))]
    boxes = Regions(
        np.array(corners), np.full((len(corners), 2), side), np.tile([16, 1], (len(corners), 1))
    )
    truth = dense(mask, 192, 192)
    rows, columns = (axis.reshape(-1) for axis in np.indices((len(boxes), len(boxes))))
    verdicts = mask.classify(boxes[rows], boxes[columns])
    for row, column, verdict in zip(rows.tolist(), columns.tolist(), verdicts, strict=True):
        seen = truth[np.ix_(boxes.positions(row), boxes.positions(column))]
        # The reach of shifted windows is bounded per tile: a FULL tile may be called PARTIAL, an
        # EMPTY one never.
        assert (verdict == EMPTY) == (not seen.any())
        if edges == "cut":
            assert verdict == verdict_of(seen)


def test_classify_of_data_promises_nothing() -> None:
    q = contiguous_tiles(20, 5)
    for mask in (masks.documents(ids="d"), masks.padding(), masks.global_tokens(data="d")):
        assert (mask.classify(q, q) == PARTIAL).all()
        assert ((mask & masks.sinks(0)).classify(q, q) == EMPTY).all()


def test_from_mod_is_exact_on_small_tiles() -> None:
    rows, columns = contiguous_tiles(48, 1), contiguous_tiles(48, 4)
    for within in (None, masks.segments(12)):
        mask = masks.from_mod(every_third, within=within)
        check_classify(mask, dense(mask, 48, 48), rows, columns, exact=True)
    rows, columns = contiguous_tiles(24, 1), contiguous_tiles(24, 2)
    for head in range(3):
        mask = masks.from_mod(by_head).at_head(head, 3)
        check_classify(mask, dense(mask, 24, 24, head=head), rows, columns, exact=True)


def test_from_mod_that_reads_the_batch_promises_nothing() -> None:
    def by_batch(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return q - q < b

    tiles = contiguous_tiles(8, 4)
    assert (masks.from_mod(by_batch).classify(tiles, tiles) == PARTIAL).all()
