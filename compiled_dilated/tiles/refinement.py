"""Tiles that are not EMPTY, by refinement from super tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..masks import Mask
from ..regions import FULL, PARTIAL, Regions
from .lists import Flags, TileIndices, TileLists

# A super tile is split into 4 x 4 smaller ones; refinement starts with at most this many.
_SPLIT = 4
_FIRST_SUPER_TILES = 4096
# Rows, columns and listed tiles are numbered in 32 bits, and longer lists take several GiB.
_MOST_LISTED = 2**28


def covering(
    mask: Mask, rows: int, columns: int, regions_of: Callable[[int], tuple[Regions, Regions]]
) -> TileLists:
    """Tiles that are not EMPTY, by refinement from super tiles.

    rows, columns: number of tiles.
    regions_of: positions of the rows and of the columns of super tiles of side x side tiles.
    """
    # 1. The smallest super tiles that are few enough to start with.
    side = 1
    while -(-rows // side) * -(-columns // side) > _FIRST_SUPER_TILES:
        side *= _SPLIT
    super_tiles = np.indices((-(-rows // side), -(-columns // side)), dtype=np.int32)
    row, column = super_tiles[0].reshape(-1), super_tiles[1].reshape(-1)
    # 2. Classify all super tiles of one side, then the parts of those that are PARTIAL.
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
                "tiles. Use fewer tokens, or a mask of segments, windows, causal() and "
                "congruent(), which needs no list"
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
    """Tiles within super tiles, up to the last row and column."""
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
