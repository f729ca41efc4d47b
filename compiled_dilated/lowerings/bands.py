"""Bands cut into tiles: along a line of tokens, or along one axis of a grid, which keys the queries of each tile see.

window(2), tiles of 4 queries       runs: one clipped at the start, one in the middle, one at the end
# # # . . . . . . . . .             queries [0, 4)    keys [0, 6)
# # # # . . . . . . . .             queries [4, 8)    keys [2, 10), and all further tiles like it
# # # # # . . . . . . .
. # # # # # . . . . . .
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..regions import IntArray

# A tile holds at most this many queries, so that its result stays small beside the tensors of a long sequence.
MOST_ROWS = 8192

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Band:
    """Query t of q_len stands at key coordinate shift + t and sees keys from `left` before it to `right` after it (None: all).

    clamped: windows that stick out are moved inwards instead of cut.
    """

    q_len: int
    k_len: int
    shift: int
    left: int | None
    right: int | None
    clamped: bool = False


@dataclass(frozen=True)
class Run:
    """`count` tiles, `stride` coordinates apart: queries [q_start, + q_rows) see keys [k_start, + k_rows).

    full: they see all of them.
    """

    count: int
    stride: int
    q_start: int
    q_rows: int
    k_start: int
    k_rows: int
    full: bool
    causal: bool = False
    first: bool = True


def cut(band: Band, tile: int) -> list[Run]:
    """Tiles of `tile` queries along a band, those of one geometry together."""
    start = np.arange(0, band.q_len, tile)
    stop = np.minimum(start + tile, band.q_len)
    first, last = start + band.shift, stop - 1 + band.shift
    low, high, whole, alone = _reach(band, first, last)
    low, high = np.maximum(low, 0), np.minimum(high, band.k_len)
    shape = np.stack([stop - start, low - first, high - low, whole, np.where(alone, start, -1)], axis=1)
    borders = np.flatnonzero(np.any(shape[1:] != shape[:-1], axis=1)) + 1
    runs = []
    for group in np.split(np.arange(len(start)), borders):
        i = group[0]
        if high[i] > low[i]:
            runs.append(
                Run(len(group), tile, int(start[i]), int(stop[i] - start[i]), int(low[i]), int(high[i] - low[i]), bool(whole[i]))
            )
    return runs


def _reach(band: Band, first: IntArray, last: IntArray) -> tuple[IntArray, IntArray, Flags, Flags]:
    """For tiles whose queries stand at first .. last: keys [low, high), whether all queries see all of them, and whether the
    geometry is the tile's alone."""
    if band.clamped:
        assert band.left is not None
        assert band.left == band.right
        width = 2 * band.left + 1
        most = max(band.k_len - width, 0)
        low, low_last = (np.clip(at - band.left, 0, most) for at in (first, last))
        alone = (low != first - band.left) | (low_last != last - band.left)
        return low, low_last + width, low == low_last, alone
    low = np.zeros_like(first) if band.left is None else np.maximum(first - band.left, 0)
    high = np.full_like(first, band.k_len) if band.right is None else np.minimum(last + band.right + 1, band.k_len)
    whole = np.ones(len(first), dtype=bool)
    if band.left is not None:
        whole &= low >= last - band.left
    if band.right is not None:
        whole &= high <= first + band.right + 1
    return low, high, whole, np.zeros(len(first), dtype=bool)


def cut_causal(band: Band) -> list[Run]:
    """A band that sees everything up to the query: per tile a dense block before it and a triangle, which the kernel knows."""
    runs = []
    for start in range(0, band.q_len, MOST_ROWS):
        rows = min(MOST_ROWS, band.q_len - start)
        diagonal = band.shift + start
        triangle = min(rows, band.k_len - diagonal)
        if triangle > 0:
            # Rows past the last key see the whole triangle's columns: the kernel's top-left causal rule says the same.
            runs.append(Run(1, rows, start, rows, diagonal, triangle, full=True, causal=True))
        before = min(diagonal, band.k_len)
        if before > 0:
            runs.append(Run(1, rows, start, rows, 0, before, full=True, first=triangle <= 0))
    return runs
