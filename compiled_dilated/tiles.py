"""Visible key tiles per query tile, found by refinement.

Time and memory grow with the number of visible tiles only.

    window(2), 8 tokens, tiles of 2       offsets  0   2     5     8  10
       0 1 2 3   key tiles                indices  0 1  0 1 2 1 2 3 2 3
     0 # +                                full     1 0  0 1 0 0 1 0 0 1
     1 + # +     # FULL
     2   + # +   + PARTIAL
     3     + #

numpy only; `block_masks` turns a map into FlexAttention's BlockMask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import arguments
from .masks import Mask
from .orders import Identity, Order, identity
from .regions import EMPTY, FULL, PARTIAL, IntArray, Regions, Verdicts

TileIndices = npt.NDArray[np.int32]
AnyInts = npt.NDArray[np.signedinteger[Any]]
Flags = npt.NDArray[np.bool_]

# A super tile is split into 4 x 4 smaller ones; refinement starts with at most this many.
_SPLIT = 4
_FIRST_SUPER_TILES = 4096
# Rectangular lists may hold this many times the tiles that are seen, and always this many entries
# (256 KiB); else a map is split.
_MOST_PADDING = 4
_ALWAYS_FITS = 2**16
_MOST_CUTS = 16
# Rows, columns and listed tiles are numbered in 32 bits, and a list of more tiles than this takes
# GiB.
_MOST_LISTED = 2**28


@dataclass(frozen=True, eq=False)
class TileLists:
    """Visible columns per row: indices[offsets[row] : offsets[row + 1]], ascending.

    offsets: (rows + 1,).
    indices, full: one entry per visible tile; `full` is True for FULL tiles.
    columns: number of columns.
    """

    offsets: IntArray
    indices: TileIndices
    full: Flags
    columns: int

    @staticmethod
    def of(rows: int, columns: int, row: AnyInts, column: AnyInts, full: Flags) -> TileLists:
        """Lists of distinct tiles in any order."""
        # One integer per tile: row, column, then the flag. numpy vectorises a plain sort.
        dtype = np.int32 if 2 * rows * columns < 2**31 else np.int64
        tile = np.multiply(row, columns, dtype=dtype) + column
        keys = np.sort(tile * 2 + full)
        offsets = np.searchsorted(keys, np.arange(rows + 1, dtype=np.int64) * (2 * columns)).astype(
            np.int64
        )
        indices = ((keys >> 1) % max(columns, 1)).astype(np.int32)
        return TileLists(offsets, indices, (keys & 1).astype(np.bool_), columns)

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> IntArray:
        """Visible columns per row, (rows,)."""
        return np.diff(self.offsets)

    @property
    def row_of(self) -> TileIndices:
        """The row of each entry of `indices`."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), self.counts)

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.indices.nbytes + self.full.nbytes

    def verdicts(self) -> Verdicts:
        """EMPTY, PARTIAL or FULL of every tile, (rows, columns); for pictures and small tests."""
        out = np.full((self.rows, self.columns), EMPTY)
        out[self.row_of, self.indices] = np.where(self.full, FULL, PARTIAL)
        return out


@dataclass(frozen=True, eq=False, repr=False)
class TileMap(TileLists):
    """The visible tiles of a mask: q_tile queries by kv_tile keys; the last may be short.

    Queries are places [q_start, q_start + q_len) of the order, at positions q_offset + place
    (identity). Keys are places [kv_start, kv_start + kv_len). Tiles that are not listed have no
    allowed pair; FULL tiles have only allowed pairs.
    """

    q_len: int
    kv_len: int
    q_tile: int
    kv_tile: int
    order: Order
    q_offset: int
    q_start: int = 0
    kv_start: int = 0

    @property
    def queries(self) -> range:
        """Places of the map's queries."""
        return range(self.q_start, self.q_start + self.q_len)

    @property
    def keys(self) -> range:
        """Places of the map's keys."""
        return range(self.kv_start, self.kv_start + self.kv_len)

    @staticmethod
    def build(
        mask: Mask,
        q_len: int,
        kv_len: int,
        *,
        q_tile: int = 128,
        kv_tile: int = 128,
        order: Order = identity(),
        q_offset: int = 0,
    ) -> TileMap:
        """The tiles of a mask.

        q_len, kv_len: in tokens. q_tile, kv_tile: tokens per tile. order: permutes queries and
        keys; other than the identity it requires q_len == kv_len and q_offset 0. q_offset: position
        of the first query; negative for queries before key 0.
        """
        _check(mask, q_len, kv_len, q_tile, kv_tile, order, q_offset)
        rows, columns = -(-q_len // q_tile), -(-kv_len // kv_tile)

        def regions_of(side: int) -> tuple[Regions, Regions]:
            q, kv = _regions(order, q_len, q_tile * side), _regions(order, kv_len, kv_tile * side)
            return replace(q, base=q.base + q_offset), kv

        lists = _covering(mask, rows, columns, regions_of)
        return TileMap(
            **vars(lists),
            q_len=q_len,
            kv_len=kv_len,
            q_tile=q_tile,
            kv_tile=kv_tile,
            order=order,
            q_offset=q_offset,
        )

    def transpose(self) -> TileLists:
        """Query tiles per key tile."""
        return TileLists.of(self.columns, self.rows, self.indices, self.row_of, self.full)

    def restrict(self, queries: range, keys: range) -> TileMap:
        """The map of consecutive query tiles and key tiles, counted in this map."""
        first, last = self.offsets[queries.start], self.offsets[queries.stop]
        indices, full = self.indices[first:last], self.full[first:last]
        inside = (indices >= keys.start) & (indices < keys.stop)
        offsets = np.concatenate([[0], np.cumsum(inside)])[
            self.offsets[queries.start : queries.stop + 1] - first
        ]
        return TileMap(
            offsets=offsets,
            indices=indices[inside] - np.int32(keys.start),
            full=full[inside],
            columns=len(keys),
            q_len=max(0, min(queries.stop * self.q_tile, self.q_len) - queries.start * self.q_tile),
            kv_len=max(0, min(keys.stop * self.kv_tile, self.kv_len) - keys.start * self.kv_tile),
            q_tile=self.q_tile,
            kv_tile=self.kv_tile,
            order=self.order,
            q_offset=self.q_offset,
            q_start=self.q_start + queries.start * self.q_tile,
            kv_start=self.kv_start + keys.start * self.kv_tile,
        )

    def coarsen(self, factor: int | tuple[int, int]) -> TileMap:
        """The map with tiles `factor` times as large; FULL if all tiles within are FULL.

        factor: one number, or (queries, keys).
        """
        q_factor, kv_factor = (factor, factor) if isinstance(factor, int) else factor
        rows, columns = -(-self.rows // q_factor), -(-self.columns // kv_factor)
        keys = self.row_of.astype(np.int64) // q_factor * columns + self.indices // kv_factor
        coarse, group = np.unique(keys, return_inverse=True)
        full = np.bincount(group, weights=self.full, minlength=len(coarse))
        row, column = coarse // max(columns, 1), coarse % max(columns, 1)
        inside = np.minimum(q_factor, self.rows - row * q_factor) * np.minimum(
            kv_factor, self.columns - column * kv_factor
        )
        lists = TileLists.of(rows, columns, row, column, full == inside)
        return replace(
            self, **vars(lists), q_tile=self.q_tile * q_factor, kv_tile=self.kv_tile * kv_factor
        )

    def __repr__(self) -> str:
        return (
            f"TileMap({self.rows} x {self.columns} tiles of {self.q_tile} x {self.kv_tile}, "
            f"{len(self.indices):,} seen, "
            f"{int(self.full.sum()):,} full, queries {self.queries}, keys {self.keys}, "
            f"{self.order!r})"
        )


def _regions(order: Order, n: int, tile: int) -> Regions:
    """Positions of each tile of n places."""
    starts = np.arange(0, n, tile)
    return order.regions(starts, np.minimum(starts + tile, n), n)


def _covering(
    mask: Mask, rows: int, columns: int, regions_of: Callable[[int], tuple[Regions, Regions]]
) -> TileLists:
    """Tiles of rows x columns that are not EMPTY, by refinement from super tiles."""
    side = 1
    while -(-rows // side) * -(-columns // side) > _FIRST_SUPER_TILES:
        side *= _SPLIT
    row, column = (
        axis.reshape(-1)
        for axis in np.indices((-(-rows // side), -(-columns // side)), dtype=np.int32)
    )
    runs: list[tuple[TileIndices, TileIndices, TileIndices, Flags]] = []
    listed = 0
    while True:
        q, kv = regions_of(side)
        verdict = mask.classify(q[row], kv[column])
        full, partial = verdict == FULL, verdict == PARTIAL
        listed += int(full.sum()) * side**2
        if max(rows, columns, listed + int(partial.sum())) > _MOST_LISTED:
            raise ValueError(
                f"{mask} of {rows} x {columns} tiles takes a list of more than {_MOST_LISTED:,} "
                "tiles. "
                "Use fewer tokens, or a mask of segments, windows, causal() and congruent(), "
                "which needs no list"
            )
        # FULL super tiles are done; PARTIAL ones are split, or listed at the smallest size.
        runs.append(_runs(row[full], column[full], side, rows, columns, full=True))
        row, column = row[partial], column[partial]
        if side == 1:
            runs.append(_runs(row, column, side, rows, columns, full=False))
            return _joined(rows, columns, *map(np.concatenate, zip(*runs, strict=True)))
        side //= _SPLIT
        row, column = _split(row, column, -(-rows // side), -(-columns // side))


def _split(
    row: TileIndices, column: TileIndices, rows: int, columns: int
) -> tuple[TileIndices, TileIndices]:
    """Tiles within each super tile, without those past the last row or column."""
    within = np.arange(_SPLIT, dtype=np.int32)
    small_row = np.repeat((row[:, None] * np.int32(_SPLIT) + within).reshape(-1), _SPLIT)
    small_column = np.tile(column[:, None] * np.int32(_SPLIT) + within, _SPLIT).reshape(-1)
    inside = (small_row < rows) & (small_column < columns)
    return small_row[inside], small_column[inside]


def _runs(
    row: TileIndices, column: TileIndices, side: int, rows: int, columns: int, full: bool
) -> tuple[TileIndices, TileIndices, TileIndices, Flags]:
    """Super tiles as runs of columns: row, first column, length, full.

    Cut at the last row and column.
    """
    small_row = np.add.outer(row * np.int32(side), np.arange(side, dtype=np.int32)).reshape(-1)
    first = np.repeat(column * np.int32(side), side)
    inside = small_row < rows
    small_row, first = small_row[inside], first[inside]
    length = np.minimum(side, columns - first).astype(np.int32)
    return small_row, first, length, np.full(len(first), full)


def _joined(
    rows: int, columns: int, row: TileIndices, first: TileIndices, length: TileIndices, full: Flags
) -> TileLists:
    """Lists from disjoint runs of columns in any order."""
    by_place = np.argsort(row.astype(np.int64) * columns + first)
    row, first, length, full = row[by_place], first[by_place], length[by_place], full[by_place]
    stops = np.cumsum(length, dtype=np.int64)
    offsets = np.concatenate([[0], stops])[np.searchsorted(row, np.arange(rows + 1))]
    indices = np.arange(offsets[-1], dtype=np.int32)
    indices += np.repeat((first - (stops - length)).astype(np.int32), length)
    return TileLists(offsets, indices, np.repeat(full, length), columns)


def _check(
    mask: Mask, q_len: int, kv_len: int, q_tile: int, kv_tile: int, order: Order, q_offset: int
) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a mask; got {type(mask).__name__} {mask!r}. "
            "Use one of compiled_dilated.masks"
        )
    if not isinstance(order, Order):
        raise TypeError(
            f"order must be an order; got {type(order).__name__} {order!r}. "
            "Use one of compiled_dilated.orders"
        )
    for name, value, least in (
        ("q_len", q_len, 0),
        ("kv_len", kv_len, 0),
        ("q_tile", q_tile, 1),
        ("kv_tile", kv_tile, 1),
    ):
        arguments.integer(name, value, least)
    arguments.integer("q_offset", q_offset)
    if not isinstance(order, Identity):
        if q_len != kv_len or q_offset:
            raise ValueError(
                f"{order!r} permutes queries and keys alike, "
                "so it needs q_len == kv_len and q_offset 0; "
                f"got q_len {q_len}, kv_len {kv_len}, q_offset {q_offset}. Use orders.identity()"
            )
        order.check(q_len)
    mask.check(range(q_offset, q_offset + q_len), kv_len)


def split(tile_map: TileMap) -> tuple[TileMap, ...]:
    """Disjoint rectangles with all tiles of a map, each with short rectangular lists.

    A few heavy rows (global tokens) or columns (sinks) would widen the list of every row, so they
    become separate parts. Parts without tiles are dropped. A map is not split if its lists are
    short enough, or if its heavy rows are scattered over too many places.

        window | global tokens      # # # # #       A A A A A
                                    # # .           B C C
                                    # # # .    ->   B C C C
                                    #   # # #       B   C C C
    """
    by_row, by_column = tile_map.counts, np.bincount(tile_map.indices, minlength=tile_map.columns)
    padded = [len(counts) * int(counts.max(initial=0)) for counts in (by_row, by_column)]
    if max(padded) <= max(_MOST_PADDING * len(tile_map.indices), _ALWAYS_FITS):
        return (tile_map,)
    rows, columns = range(tile_map.rows), range(tile_map.columns)
    if padded[0] >= padded[1]:
        parts = [tile_map.restrict(run, columns) for run in _heavy_and_light(by_row)]
    else:
        parts = [tile_map.restrict(rows, run) for run in _heavy_and_light(by_column)]
    if len(parts) == 1:
        return (tile_map,)
    return tuple(small for part in parts if len(part.indices) for small in split(part))


def _heavy_and_light(counts: IntArray) -> list[range]:
    """Runs of heavy and of light rows, with the threshold of least total padding."""
    ascending = np.sort(counts)
    light = np.arange(1, len(counts) + 1)
    entries = light * ascending + (len(counts) - light) * ascending[-1]
    heavy = counts > ascending[np.argmin(entries)]
    cuts = [0, *(np.flatnonzero(np.diff(heavy)) + 1).tolist(), len(counts)]
    if len(cuts) <= _MOST_CUTS:
        return [range(*ends) for ends in itertools.pairwise(cuts)]
    return [range(len(counts))]
