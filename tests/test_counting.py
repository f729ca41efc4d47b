"""Pairs and tiles are counted exactly, by symmetry.

The work does not grow with the length.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_dilated import counting, masks, orders
from compiled_dilated.counting import counts, symmetries
from compiled_dilated.masks import Mask
from compiled_dilated.masks.leading import LeadingQueries
from compiled_dilated.tiles import TileMap
from tests import strategies
from tests.strategies import dense

LONG = 2**31 + 1


@contextmanager
def deep_halving() -> Iterator[None]:
    """Halve rectangles down to single pairs, in short sequences too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "_FEW_PAIRS", 0)
        patch.setattr(counts, "_SMALLEST", 1)
        patch.setattr(symmetries, "_LEAST_PAIRS_OF_FORMULA", 1)
        yield


def leaves(most: int = 40) -> st.SearchStrategy[Mask]:
    blocks = st.builds(masks.dilated_blocks, st.integers(1, 9), st.integers(1, 7))
    return st.one_of(strategies.line_masks(most), blocks, strategies.mods())


LENGTH, OFFSET = st.integers(1, 70), st.integers(0, 70)


@settings(max_examples=150)
@given(mask=strategies.expressions(leaves()), q_len=LENGTH, kv_len=LENGTH, q_offset=OFFSET)
def test_pairs_are_those_of_the_dense_mask(
    mask: Mask, q_len: int, kv_len: int, q_offset: int
) -> None:
    mask = mask.at_head(0, 3)
    expected = dense(mask, q_len, kv_len, q_offset).sum()
    with deep_halving():
        assert counting.pairs(mask, q_len, kv_len, q_offset) == expected


@given(st.data())
def test_pairs_of_expressions_over_grids(data: st.DataObject) -> None:
    grid = data.draw(strategies.grids())
    mask = data.draw(
        strategies.expressions(strategies.grid_masks(grid) | strategies.line_masks(40))
    )
    kv_len = data.draw(st.integers(1, math.prod(grid)))
    q_len = data.draw(st.integers(1, kv_len))
    with deep_halving():
        assert counting.pairs(mask, q_len, kv_len) == dense(mask, q_len, kv_len).sum()


@settings(max_examples=100)
@given(mask=strategies.expressions(leaves()), data=st.data(), q_offset=OFFSET)
def test_cells_are_sums_of_the_dense_mask(mask: Mask, data: st.DataObject, q_offset: int) -> None:
    mask = mask.at_head(0, 3)
    q_cuts, kv_cuts = (
        np.unique([0, *data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=6))])
        for _ in range(2)
    )
    allowed = dense(mask, q_cuts[-1], kv_cuts[-1], q_offset).astype(int)
    expected = np.add.reduceat(np.add.reduceat(allowed, q_cuts[:-1], axis=0), kv_cuts[:-1], axis=1)
    with deep_halving():
        counted = counting.cells(mask, q_cuts + q_offset, kv_cuts)
    assert counted.exact
    assert (counted.pairs == expected).all()


def test_estimated_cells_are_marked_and_near_the_exact_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counts, "_MOST_PAIRS_OF_CELLS", 0)
    monkeypatch.setattr(counts, "_MOST_DIFFERENT_OF_CELLS", 0)
    mask = masks.from_mod(lambda b, h, q, kv: (q * 7 + kv * 3) % 10 < 4, within=masks.window(500))
    cuts = np.arange(0, 1025, 128)
    counted = counting.cells(mask, cuts, cuts)
    expected = np.add.reduceat(
        np.add.reduceat(dense(mask, 1024, 1024).astype(int), cuts[:-1], axis=0), cuts[:-1], axis=1
    )
    assert not counted.exact
    # A share of 0.4 by 2**22 / 64 draws: five standard deviations are 1 % of the cell.
    assert (abs(counted.pairs - expected) <= 0.01 * 128**2).all()
    assert (counted.pairs[expected == 0] == 0).all()
    assert (counting.cells(mask, cuts, cuts).pairs == counted.pairs).all()


@pytest.mark.parametrize(
    "within",
    [masks.full(), masks.causal(), masks.window(3, 1), masks.window(9, dilation=2)],
    ids=str,
)
@pytest.mark.parametrize("q_offset", [0, 7])
def test_documents_are_counted_as_the_dense_mask(within: Mask, q_offset: int) -> None:
    mask = masks.documents(lengths=(3, 20, 0, 1, 20, 5)) & within
    for q_len, kv_len in ((60, 60), (30, 44), (1, 12), (49, 49)):
        expected = dense(mask, q_len, kv_len, q_offset).sum()
        assert counting.pairs(mask, q_len, kv_len, q_offset) == expected


@settings(max_examples=150)
@given(mask=leaves() | st.builds(LeadingQueries, st.integers(0, 40)), data=st.data())
def test_formulas_count_pairs_of_any_two_runs(mask: Mask, data: st.DataObject) -> None:
    q, kv = (range(*sorted(data.draw(st.tuples(OFFSET, OFFSET)))) for _ in range(2))
    counted = mask.pairs(q, kv)
    if counted is not None:
        assert counted == dense(mask, 70, 70)[q.start : q.stop, kv.start : kv.stop].sum()


@pytest.mark.parametrize("edges", ["cut", "shift"])
def test_formula_of_a_whole_grid(edges: str) -> None:
    for size in (1, 2, 5, 12):
        for radius in (0, 1, 4):
            for dilation in (1, 2, 3, 20):
                for causal in (False, True):
                    mask = masks.neighborhood(
                        (size, 2), (radius, 1), (dilation, 1), (causal, False), edges
                    )
                    n = 2 * size
                    assert mask.pairs(range(n), range(n)) == dense(mask, n, n).sum()


@given(mask=strategies.expressions(leaves()), data=st.data())
def test_expanded_masks_allow_the_same_pairs(mask: Mask, data: st.DataObject) -> None:
    assert (dense(mask.expanded(), 40, 40) == dense(mask, 40, 40)).all()


@given(mask=leaves(12))
def test_masks_are_invariant_under_their_side_periods(mask: Mask) -> None:
    for leaf in symmetries.leaves(mask.expanded()):
        for axis, period in enumerate(leaf.side_periods):
            if period is not None and period <= 200:
                moved = dense(leaf, 40 + period, 40 + period).take(range(period, 40 + period), axis)
                assert (moved[:40, :40] == dense(leaf, 40, 40)).all()


@settings(max_examples=100)
@given(
    mask=strategies.expressions(leaves()),
    q_len=LENGTH,
    kv_len=LENGTH,
    q_offset=OFFSET,
    tile=st.sampled_from([1, 2, 3, 4, 8, 13]),
)
def test_tiles_are_those_of_the_map(
    mask: Mask, q_len: int, kv_len: int, q_offset: int, tile: int
) -> None:
    mask = mask.at_head(0, 3)
    tile_map = TileMap.build(mask, q_len, kv_len, q_tile=tile, kv_tile=tile, q_offset=q_offset)
    counted = counting.tiles(mask, q_len, kv_len, tile, orders.identity(), q_offset)
    assert counted is not None
    full, listed = tile_map.full.sum(), len(tile_map.indices)
    assert (counted.full, counted.partial) == (full, listed - full)
    assert counted.nbytes == tile_map.nbytes


@pytest.mark.parametrize("tile", [1, 4, 7])
@pytest.mark.parametrize(
    "mask",
    [
        masks.window(9),
        masks.window(0, 17, dilation=5),
        masks.segments(12),
        masks.segments(12) & masks.causal(),
        masks.congruent(3, 1),
        masks.sinks(5) | masks.window(3),
        masks.prefix(13) | masks.causal(),
        masks.global_tokens(6),
        ~masks.window(9),
    ],
    ids=repr,
)
def test_tiles_are_those_of_the_dense_mask(mask: Mask, tile: int) -> None:
    counted = counting.tiles(mask, 48, 41, tile, orders.identity())
    allowed = dense(mask, 48, 41)
    full = partial = 0
    for row in range(0, 48, tile):
        for column in range(0, 41, tile):
            pairs = allowed[row : row + tile, column : column + tile]
            full += int(pairs.all())
            partial += int(pairs.any() and not pairs.all())
    assert counted is not None
    assert (counted.full, counted.partial) == (full, partial)


def test_tiles_in_an_order_are_those_of_its_map() -> None:
    mask, order = masks.neighborhood((16, 16), 2), orders.hilbert(16, 16)
    tile_map = TileMap.build(mask, 256, 256, q_tile=16, kv_tile=16, order=order)
    counted = counting.tiles(mask, 256, 256, 16, order)
    assert counted is not None
    assert counted.full == tile_map.full.sum()
    assert counted.full + counted.partial == len(tile_map.indices)
    assert counting.tiles(mask, 2**23, 2**23, 128, orders.residue(2)) is None


LONGNET = masks.segments(8192) & masks.congruent(4, 1, period=8192)
LINE: list[tuple[Mask, Callable[[int], int]]] = [
    (masks.full(), lambda n: n * n),
    (masks.causal(), lambda n: n * (n + 1) // 2),
    (masks.window(256), lambda n: 513 * n - 256 * 257),
    (masks.window(256) & masks.causal(), lambda n: 257 * n - 256 * 257 // 2),
    (masks.window(255, dilation=3), lambda n: 171 * n - 3 * 85 * 86),
    (masks.segments(4096), lambda n: n // 4096 * 4096**2 + (n % 4096) ** 2),
    (
        masks.dilated_blocks(64, 2),
        lambda n: (
            (n // 128 * 64 + min(n % 128, 64)) ** 2 + (n // 128 * 64 + max(n % 128 - 64, 0)) ** 2
        ),
    ),
    (masks.congruent(4, 1), lambda n: ((n + 2) // 4) ** 2),
    (LONGNET, lambda n: n // 8192 * 2048**2 + ((n % 8192 + 2) // 4) ** 2),
    (
        LONGNET & masks.causal(),
        lambda n: (
            n // 8192 * 2048 * 2049 // 2 + ((n % 8192 + 2) // 4) * ((n % 8192 + 2) // 4 + 1) // 2
        ),
    ),
    (masks.sinks(4), lambda n: 4 * n),
    (
        masks.causal() & (masks.window(256) | masks.sinks(4)),
        lambda n: 261 * n - 256 * 257 // 2 - 4 * 256 - 10,
    ),
    (masks.causal() | masks.prefix(1000), lambda n: n * (n + 1) // 2 + 1000 * 999 // 2),
    (masks.global_tokens(7), lambda n: 14 * n - 49),
    (~masks.causal(), lambda n: n * (n - 1) // 2),
    (masks.neighborhood((LONG,), 3), lambda n: 7 * n - 12),
]


@pytest.mark.parametrize(
    ("mask", "expected"), LINE, ids=lambda value: repr(value) if isinstance(value, Mask) else ""
)
def test_counts_of_two_billion_tokens_take_few_rectangles(
    mask: Mask, expected: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rectangles are classified, in little memory.

    There are 2**24 rows of tiles.
    """
    classified = 0
    classify = type(mask).classify

    def counted(self: Mask, q: Any, kv: Any) -> Any:
        nonlocal classified
        classified += len(q)
        return classify(self, q, kv)

    monkeypatch.setattr(type(mask), "classify", counted)
    tracemalloc.start()
    pairs = counting.pairs(mask, LONG, LONG)
    tiles = counting.tiles(mask, LONG, LONG, 128, orders.identity())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs == expected(LONG)
    assert tiles is not None
    assert pairs <= (tiles.full + tiles.partial) * 128**2
    assert tiles.full * 128**2 <= pairs + 2 * 128 * LONG
    assert classified <= 20_000
    assert peak <= 4 * 2**20


def test_segments_that_no_tile_divides_take_little_memory() -> None:
    """All tiles of a period of 10007 tiles differ.

    The memory does not grow with the rows.
    """
    mask = masks.segments(10007) & masks.congruent(4, 1, period=10007)
    expected = LONG // 10007 * 2502**2 + ((LONG % 10007 + 2) // 4) ** 2
    tracemalloc.start()
    assert counting.pairs(mask, LONG, LONG) == expected
    assert counting.tiles(masks.segments(10007), LONG, LONG, 128, orders.identity()) is not None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 32 * 2**20


def test_counts_near_the_limit_of_positions_do_not_overflow() -> None:
    n = 2**60
    assert counting.pairs(masks.causal() & masks.window(3), n, n) == 4 * n - 6
    assert counting.pairs(masks.causal() & masks.window(3), 8, n, n - 8) == 32
    assert counting.pairs(masks.causal() & masks.window(n), n, n) == n * (n + 1) // 2
    assert counting.pairs(masks.segments(n - 1) & masks.causal(), n, n) == (n - 1) * n // 2 + 1
    assert counting.pairs(masks.causal() & masks.dilated_blocks(n - 3, n), 8, 8) == 36
    assert counting.pairs(masks.causal() & masks.window(n, n, n - 1), 8, n, n - 8) == 8 + 1


def test_masks_that_cannot_be_counted_give_none() -> None:
    assert counting.pairs(masks.padding(), 8, 8) is None
    scattered = masks.tiles([(i, i * i % 1021) for i in range(1024)], block=64) & masks.causal()
    assert counting.pairs(scattered, 2**16, 2**16) is not None
    assert counting.pairs(masks.from_mod(strategies.every_third), 2**15, 2**15) is None
