"""Arrays of rectangles of pairs, with multiplicities, which can be halved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .regions import IntArray, Regions
from .tiles import Flags


@dataclass(frozen=True, eq=False)
class Rectangles:
    """n rectangles of pairs, as arrays.

    Queries are q .. q + rows - 1, keys are kv .. kv + columns - 1.

    q, kv, rows, columns: (n,).
    times: multiplicity of each, (n,) Python integers: the pairs of a long sequence exceed int64.
    owner: number of the raster's cell that each is a part of, (n,).
    """

    q: IntArray
    kv: IntArray
    rows: IntArray
    columns: IntArray
    times: Any
    owner: IntArray

    @staticmethod
    def whole(q_len: int, kv_len: int, q_offset: int) -> Rectangles:
        """All pairs as one rectangle; none if there are no pairs."""
        q_cuts, kv_cuts = np.array([q_offset, q_offset + q_len]), np.array([0, kv_len])
        rectangle = Rectangles.cells(q_cuts, kv_cuts)
        if not q_len or not kv_len:
            return rectangle[:0]
        return rectangle

    @staticmethod
    def cells(q_cuts: IntArray, kv_cuts: IntArray) -> Rectangles:
        """All cells of a raster, row by row.

        q_cuts, kv_cuts: ascending borders, the first and the last included.
        """
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

    def __getitem__(self, selected: IntArray | Flags | slice) -> Rectangles:
        return Rectangles(*(array[selected] for array in vars(self).values()))

    @property
    def regions(self) -> tuple[Regions, Regions]:
        """The positions of queries and of keys."""
        queries = Regions.contiguous(self.q, self.q + self.rows)
        return queries, Regions.contiguous(self.kv, self.kv + self.columns)

    @property
    def areas(self) -> Any:
        """Pairs of each rectangle, (n,) Python integers."""
        return self.rows.astype(object) * self.columns.astype(object)

    @property
    def pairs(self) -> Any:
        """Pairs of each rectangle times its multiplicity, (n,) Python integers."""
        return self.areas * self.times

    @property
    def different_pairs(self) -> int:
        """Pairs of the rectangles, each counted once."""
        return int(self.areas.sum())

    @property
    def longest(self) -> int:
        """The longest side."""
        return int(max(self.rows.max(initial=0), self.columns.max(initial=0)))

    def tiles(self, tile: int) -> int:
        """Tiles of all rectangles, times their multiplicities."""
        return int((-(-self.rows // tile) * -(-self.columns // tile) * self.times).sum())

    def is_within(self, tile: int) -> Flags:
        """Whether each rectangle is no larger than a tile."""
        return np.asarray((self.rows <= tile) & (self.columns <= tile))

    def split(self, alignment: int, least: int) -> Rectangles:
        """Halve sides, at a power of two times `alignment`.

        Sides of at most `alignment` are halved at a power of two times `least`; sides of at most
        `least` are not.
        """
        row_halves = _halves(self.q, self.rows, self.columns, alignment, least)
        column_halves = _halves(self.kv, self.columns, self.rows, alignment, least)
        parts = []
        for q, rows in row_halves:
            for kv, columns in column_halves:
                parts.append(Rectangles(q, kv, rows, columns, self.times, self.owner))
        out = concatenated(parts)
        return out[(out.rows > 0) & (out.columns > 0)]


def concatenated(parts: list[Rectangles]) -> Rectangles:
    """The rectangles of all parts."""
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Rectangles(*(np.concatenate(arrays) for arrays in fields))


def _halves(
    start: IntArray, length: IntArray, across: IntArray, alignment: int, least: int
) -> list[tuple[IntArray, IntArray]]:
    """Two parts (start, length) of each side.

    The second part is empty for a side of at most `least`, or shorter than half of the side across.
    """
    # The first part is the largest power of two of steps below the length, so that parts of equal
    # sides coincide after a translation.
    step = np.where(length > alignment, alignment, least)
    power = np.frexp(((length - 1) // step).clip(1).astype(np.float64))[1].astype(np.int64) - 1
    first = step << power
    first = np.where(first >= length, first >> 1, first)  # where a float rounded up
    # Narrow rectangles are halved along their long side only.
    first = np.where((length <= least) | (2 * length < across), length, first)
    return [(start, first), (start + first, length - first)]
