"""Rectangles of pairs: many at once, cut in two, and how many others each stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .regions import IntArray, Regions
from .tiles import Flags


@dataclass(frozen=True, eq=False)
class Rectangles:
    """Pairs of queries q .. q + rows - 1 and keys kv .. kv + columns - 1.

    times: how many rectangles each stands for, as Python's integers: all pairs of a long sequence are more than an int64 holds.
    owner: the number of the cell that each is a part of, where pairs of several cells are counted at once.
    """

    q: IntArray
    kv: IntArray
    rows: IntArray
    columns: IntArray
    times: Any
    owner: IntArray

    @staticmethod
    def whole(q_len: int, kv_len: int, q_offset: int) -> Rectangles:
        if not q_len or not kv_len:
            q_len = kv_len = 0
        ends = np.array([q_offset, q_offset + q_len]), np.array([0, kv_len])
        return Rectangles.cells(*ends) if q_len else Rectangles.cells(*ends)[:0]

    @staticmethod
    def cells(q_cuts: IntArray, kv_cuts: IntArray) -> Rectangles:
        """All cells of a raster, row by row; the cuts are its borders, the first and the last of them included."""
        rows, columns = len(q_cuts) - 1, len(kv_cuts) - 1
        row, column = (axis.reshape(-1) for axis in np.indices((rows, columns)))
        times = np.ones(rows * columns, dtype=object)
        return Rectangles(
            q_cuts[row],
            kv_cuts[column],
            np.diff(q_cuts)[row],
            np.diff(kv_cuts)[column],
            times,
            np.arange(rows * columns),
        )

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, which: IntArray | Flags | slice) -> Rectangles:
        return Rectangles(*(array[which] for array in vars(self).values()))

    @property
    def regions(self) -> tuple[Regions, Regions]:
        return Regions.contiguous(self.q, self.q + self.rows), Regions.contiguous(
            self.kv, self.kv + self.columns
        )

    @property
    def areas(self) -> Any:
        """Pairs of each, as Python's integers."""
        return self.rows.astype(object) * self.columns.astype(object)

    @property
    def pairs(self) -> Any:
        """Pairs of all rectangles that each stands for, as Python's integers."""
        return self.areas * self.times

    @property
    def different_pairs(self) -> int:
        """Pairs of these rectangles alone."""
        return int(self.areas.sum())

    @property
    def longest(self) -> int:
        """The longest side."""
        return int(max(self.rows.max(initial=0), self.columns.max(initial=0)))

    def tiles(self, tile: int) -> int:
        """Tiles of all rectangles that these stand for."""
        return int((-(-self.rows // tile) * -(-self.columns // tile) * self.times).sum())

    def is_within(self, tile: int) -> Flags:
        return np.asarray((self.rows <= tile) & (self.columns <= tile))

    def split(self, alignment: int, least: int) -> Rectangles:
        """Cut sides in two, at a power of two times `alignment`, or times `least` where they are no longer than it."""
        by_rows = _cut(self.q, self.rows, self.columns, alignment, least)
        parts = [
            (rows, side)
            for rows in by_rows
            for side in _cut(self.kv, self.columns, self.rows, alignment, least)
        ]
        pieces = [
            Rectangles(q, kv, rows, columns, self.times, self.owner)
            for (q, rows), (kv, columns) in parts
        ]
        out = concatenated(pieces)
        return out[(out.rows > 0) & (out.columns > 0)]


def concatenated(parts: list[Rectangles]) -> Rectangles:
    return Rectangles(
        *(
            np.concatenate(arrays)
            for arrays in zip(*(vars(part).values() for part in parts), strict=True)
        )
    )


def _cut(
    start: IntArray, length: IntArray, other: IntArray, alignment: int, least: int
) -> list[tuple[IntArray, IntArray]]:
    """Two parts (start, length) of each side; the second is empty where the side is short, or shorter than half the other."""
    step = np.where(length > alignment, alignment, least)
    power = np.frexp(((length - 1) // step).clip(1).astype(np.float64))[1].astype(np.int64) - 1
    first = step << power
    first = np.where(first >= length, first >> 1, first)  # where a float rounded up
    first = np.where((length <= least) | (2 * length < other), length, first)
    return [(start, first), (start + first, length - first)]
