"""Tile maps cover the allowed pairs.

They are small at a million tokens, and split at heavy rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_dilated import masks, orders, tiles
from compiled_dilated.masks import Mask
from compiled_dilated.orders import Order
from compiled_dilated.regions import EMPTY, FULL
from compiled_dilated.tiles import TileMap, refinement, splitting
from tests import strategies
from tests.strategies import dense

MILLION = 2**20


@contextmanager
def small_limits() -> Iterator[None]:
    """Refine over several levels, and split, in small maps too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "_FIRST_SUPER_TILES", 2)
        patch.setattr(splitting, "_ALWAYS_FITS", 1)
        patch.setattr(splitting, "_MOST_PADDING", 2)
        yield


def pairs_of(tile_map: TileMap, allowed: Any) -> Any:
    """The pairs of the map, in its order.

    allowed: all pairs by position.
    """
    permutation = tile_map.order.permutation(len(allowed))
    ordered = allowed if permutation is None else allowed[np.ix_(permutation, permutation)]
    return ordered[np.ix_(tile_map.queries, tile_map.keys)]


def check_covers(tile_map: TileMap, allowed: Any) -> None:
    """Verdicts are true of the pairs, and columns ascend in each row."""
    pairs = pairs_of(tile_map, allowed)
    assert pairs.shape == (tile_map.q_len, tile_map.kv_len)
    verdicts, q_tile, kv_tile = tile_map.verdicts(), tile_map.q_tile, tile_map.kv_tile
    assert verdicts.shape == (-(-tile_map.q_len // q_tile), -(-tile_map.kv_len // kv_tile))
    assert tile_map.indices.dtype == np.int32
    for row, (first, last) in enumerate(itertools.pairwise(tile_map.offsets)):
        assert (np.diff(tile_map.indices[first:last]) > 0).all()
        for column in range(tile_map.columns):
            queries, keys = row * q_tile, column * kv_tile
            seen = pairs[queries : queries + q_tile, keys : keys + kv_tile]
            assert seen.size
            assert not (verdicts[row, column] == EMPTY and seen.any())
            assert not (verdicts[row, column] == FULL and not seen.all())


@st.composite
def maps(draw: st.DrawFn, most: int = 64) -> tuple[TileMap, Any]:
    """A map of several levels of refinement, and all pairs by position."""
    mask, order, n = draw(strategies.masks_and_orders(most))
    q_len, q_offset = n, 0
    if order == orders.identity():
        q_len = draw(st.integers(1, n))
        q_offset = draw(st.integers(0, n - q_len))
    sizes = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    with small_limits():
        tile_map = TileMap.build(
            mask, q_len, n, q_tile=sizes[0], kv_tile=sizes[1], order=order, q_offset=q_offset
        )
    return tile_map, dense(mask, q_len, n, q_offset)


@given(maps())
def test_covers_exactly_the_allowed_pairs(case: tuple[TileMap, Any]) -> None:
    check_covers(*case)


@given(maps())
def test_transpose(case: tuple[TileMap, Any]) -> None:
    tile_map, _ = case
    transposed = tile_map.transpose()
    assert (transposed.verdicts() == tile_map.verdicts().T).all()
    assert (transposed.rows, transposed.columns) == (tile_map.columns, tile_map.rows)
    for first, last in itertools.pairwise(transposed.offsets):
        assert (np.diff(transposed.indices[first:last]) > 0).all()


@given(maps(), st.data())
def test_restrict(case: tuple[TileMap, Any], data: st.DataObject) -> None:
    tile_map, allowed = case
    ranges = []
    for size in (tile_map.rows, tile_map.columns):
        ends = data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))
        ranges.append(range(*sorted(ends)))
    rows, columns = ranges
    part = tile_map.restrict(rows, columns)
    assert (part.verdicts() == tile_map.verdicts()[np.ix_(rows, columns)]).all()
    check_covers(part, allowed)
    inner = part.restrict(range(len(rows) // 2, len(rows)), range(len(columns) // 2))
    check_covers(inner, allowed)


@given(maps(), st.integers(1, 4), st.integers(1, 4))
def test_coarsen(case: tuple[TileMap, Any], q_factor: int, kv_factor: int) -> None:
    tile_map, allowed = case
    coarse = tile_map.coarsen((q_factor, kv_factor))
    assert coarse.q_tile == tile_map.q_tile * q_factor
    assert coarse.kv_tile == tile_map.kv_tile * kv_factor
    check_covers(coarse, allowed)
    fine = tile_map.verdicts()
    for row in range(coarse.rows):
        rows = fine[row * q_factor : (row + 1) * q_factor]
        for column in range(coarse.columns):
            inside = rows[:, column * kv_factor : (column + 1) * kv_factor]
            verdict = coarse.verdicts()[row, column]
            assert (verdict == FULL) == (inside == FULL).all()
            assert (verdict == EMPTY) == (inside == EMPTY).all()
    assert (tile_map.coarsen(2).verdicts() == tile_map.coarsen((2, 2)).verdicts()).all()


@given(maps())
def test_split_is_a_partition(case: tuple[TileMap, Any]) -> None:
    tile_map, allowed = case
    with small_limits():
        parts = tiles.split(tile_map)
    verdicts = np.full((tile_map.rows, tile_map.columns), EMPTY)
    covered = np.zeros(verdicts.shape, dtype=int)
    for part in parts:
        check_covers(part, allowed)
        row, column = part.q_start // part.q_tile, part.kv_start // part.kv_tile
        tiles_of_part = np.ix_(range(row, row + part.rows), range(column, column + part.columns))
        verdicts[tiles_of_part] += part.verdicts()
        covered[tiles_of_part] += 1
    assert (verdicts == tile_map.verdicts()).all()
    assert covered.max(initial=0) <= 1


HEAVY = [
    masks.window(256) | masks.sinks(4),
    masks.window(256) | masks.global_tokens(4),
    masks.causal() & (masks.window(256) | masks.sinks(4)),
    masks.window(256) | masks.prefix(20_000),
    masks.documents(lengths=(100_000, *[500] * 1896)),
]


@pytest.mark.parametrize("mask", HEAVY, ids=lambda mask: repr(mask)[:40])
def test_heavy_rows_and_columns_become_parts(mask: Mask) -> None:
    tile_map = TileMap.build(mask, MILLION, MILLION)
    parts = tiles.split(tile_map)
    assert 2 <= len(parts) <= 5
    assert sum(len(part.indices) for part in parts) == len(tile_map.indices)
    padded = 0
    for part in parts:
        padded += part.rows * part.counts.max() + part.columns * part.transpose().counts.max()
    assert padded <= 2 * 4 * len(tile_map.indices)
    if len(tile_map.indices) < 200_000:
        assert 4 * padded <= 4 * 2**20


@pytest.mark.parametrize(
    "mask", [masks.window(256), masks.segments(4096), masks.window(256) & masks.causal()], ids=repr
)
def test_even_maps_are_not_split(mask: Mask) -> None:
    tile_map = TileMap.build(mask, MILLION, MILLION)
    assert tiles.split(tile_map) == (tile_map,)


def test_small_maps_are_not_split() -> None:
    tile_map = TileMap.build(masks.window(256) | masks.global_tokens(4), 2**15, 2**15)
    assert tiles.split(tile_map) == (tile_map,)


def test_scattered_heavy_rows_are_not_split() -> None:
    """They would take too many parts."""
    first_column = [(row, 0) for row in range(600)]
    heavy_rows = list(itertools.product(range(0, 600, 20), range(1, 600)))
    mask = masks.tiles(first_column + heavy_rows, block=2)
    tile_map = TileMap.build(mask, 1200, 1200, q_tile=2, kv_tile=2)
    assert sum(part.rows == 600 for part in tiles.split(tile_map)) >= 1


LONGNET = [
    (masks.segments(2048) & masks.congruent(1, 0, period=2048), orders.residue(1, period=2048)),
    (masks.segments(8192) & masks.congruent(4, 3, period=8192), orders.residue(4, period=8192)),
]
LARGE = [
    (masks.window(256), orders.identity()),
    (masks.window(256) & masks.causal(), orders.identity()),
    *LONGNET,
    (LONGNET[1][0] & masks.causal(), LONGNET[1][1]),
    (masks.segments(8192) & masks.congruent(3, 1, period=8192), orders.residue(3, period=8192)),
    (masks.neighborhood((1024, 1024), 12), orders.hilbert(1024, 1024)),
    (masks.neighborhood((64, 128, 128), 2), orders.hilbert(64, 128, 128)),
]


@pytest.mark.parametrize(("mask", "order"), LARGE, ids=lambda value: repr(value)[:48])
def test_maps_of_a_million_tokens_are_small_and_right(mask: Mask, order: Order) -> None:
    """Maps have at most 4 MB.

    Sampled rows list exactly the key tiles that their queries see.
    """
    tile_map = TileMap.build(mask, MILLION, MILLION, order=order)
    assert tile_map.nbytes <= 4e6
    permutation = order.permutation(MILLION)
    keys = np.arange(MILLION) if permutation is None else permutation
    for row in np.random.default_rng(0).integers(0, tile_map.rows, 3):
        queries = keys[row * 128 : (row + 1) * 128]
        counts = np.zeros(tile_map.columns, dtype=np.int64)
        for chunk in np.array_split(queries, 8):
            seen = mask.allows(np.int64(0), np.int64(0), chunk[:, None], keys[None, :])
            counts += np.count_nonzero(seen.reshape(len(chunk), -1, 128), axis=(0, 2))
        listed = slice(tile_map.offsets[row], tile_map.offsets[row + 1])
        assert tile_map.indices[listed].tolist() == np.flatnonzero(counts).tolist()
        assert tile_map.full[listed].tolist() == (counts[counts > 0] == 128 * 128).tolist()


def test_one_query_of_a_long_cache() -> None:
    tile_map = TileMap.build(masks.causal() & masks.window(300), 1, MILLION, q_offset=MILLION - 1)
    assert tile_map.indices.tolist() == [8189, 8190, 8191]
    assert tile_map.full.tolist() == [False, True, True]


def test_the_figure() -> None:
    tile_map = TileMap.build(masks.window(2), 8, 8, q_tile=2, kv_tile=2)
    assert tile_map.offsets.tolist() == [0, 2, 5, 8, 10]
    assert tile_map.indices.tolist() == [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
    assert np.flatnonzero(tile_map.full).tolist() == [0, 3, 6, 9]
    assert tile_map.counts.tolist() == [2, 3, 3, 2]
    assert tile_map.nbytes == 5 * 8 + 10 * 4 + 10
    counts, places = (
        "4 x 4 tiles of 2 x 2, 10 seen, 4 full",
        "queries range(0, 8), keys range(0, 8)",
    )
    assert repr(tile_map) == f"TileMap({counts}, {places}, identity())"


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_maps_without_queries_or_keys(q_len: int, kv_len: int) -> None:
    tile_map = TileMap.build(masks.full(), q_len, kv_len, q_tile=2, kv_tile=2)
    assert (tile_map.rows, tile_map.columns) == (-(-q_len // 2), -(-kv_len // 2))
    assert len(tile_map.indices) == 0
    assert tile_map.transpose().rows == tile_map.columns
    assert len(tile_map.coarsen(2).indices) == 0
    assert tiles.split(tile_map) == (tile_map,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TileMap.build("causal", 4, 4),  # type: ignore[arg-type]
            TypeError,
            "mask must be a mask; got str 'causal'",
        ),
        (
            lambda: TileMap.build(masks.causal(), 4, 4, order="hilbert"),  # type: ignore[arg-type]
            TypeError,
            "order must be an order; got str",
        ),
        (
            lambda: TileMap.build(masks.causal(), -1, 4),
            ValueError,
            "q_len must be at least 0; got -1",
        ),
        (
            lambda: TileMap.build(masks.causal(), 4, 4.0),  # type: ignore[arg-type]
            TypeError,
            "kv_len must be an integer; got float",
        ),
        (
            lambda: TileMap.build(masks.causal(), 4, 4, q_tile=0),
            ValueError,
            "q_tile must be at least 1",
        ),
        (
            lambda: TileMap.build(masks.causal(), 4, 8, order=orders.residue(2)),
            ValueError,
            "needs q_len == kv_len and q_offset 0",
        ),
        (
            lambda: TileMap.build(masks.causal(), 4, 4, order=orders.residue(2), q_offset=1),
            ValueError,
            "Use orders.identity()",
        ),
        (
            lambda: TileMap.build(masks.causal(), 4, 4, order=orders.hilbert(2, 3)),
            ValueError,
            "orders the 6 cells of its grid; got 4",
        ),
        (
            lambda: TileMap.build(masks.neighborhood((2, 2), 1), 4, 5),
            ValueError,
            "a grid of 4 tokens; got positions up to 5",
        ),
        (
            lambda: TileMap.build(masks.neighborhood((2, 2), 1), 2, 4, q_offset=3),
            ValueError,
            "got positions up to 5",
        ),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
