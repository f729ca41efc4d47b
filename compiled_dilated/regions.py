"""Sets of positions of tiles, and verdicts of masks on their pairs.

A `Regions` value is an array of sets, one per row, each a box of a lattice:

    positions = base + sum over axes of index * stride,   0 <= index < extent

    contiguous   base 512, extent (128,),    stride (1,)        tokens 512 .. 639
    residue      base 3,   extent (128,),    stride (4,)        tokens 3, 7, 11, ...
    grid box     base 70,  extent (16, 16),  stride (64, 1)     16 x 16 cells, 64 columns

A region may be larger than its tile (a bounding box): EMPTY and FULL of the larger set are also
true of the smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Verdicts = npt.NDArray[np.uint8]

# The three verdicts are ordered, so `and` is the minimum, `or` the maximum and `not` the mirror
# image.
EMPTY, PARTIAL, FULL = np.uint8(0), np.uint8(1), np.uint8(2)


def both(a: Verdicts, b: Verdicts) -> Verdicts:
    """The verdict of `x & y` from those of x and y."""
    return np.minimum(a, b)


def either(a: Verdicts, b: Verdicts) -> Verdicts:
    """The verdict of `x | y` from those of x and y."""
    return np.maximum(a, b)


def negate(a: Verdicts) -> Verdicts:
    """The verdict of `~x` from the verdict of x."""
    return np.asarray(FULL - a, dtype=np.uint8)


def verdicts(full: npt.NDArray[np.bool_], empty: npt.NDArray[np.bool_]) -> Verdicts:
    """FULL where `full`, EMPTY where `empty`, PARTIAL elsewhere.

    EMPTY wins if both are true, as for a region without positions.
    """
    return np.where(empty, EMPTY, np.where(full, FULL, PARTIAL))


@dataclass(frozen=True, eq=False)
class Regions:
    """n lattice boxes; all extents and strides are at least 1.

    base: (n,).
    extent, stride: (n, axes).
    """

    base: IntArray
    extent: IntArray
    stride: IntArray

    @staticmethod
    def contiguous(start: npt.ArrayLike, stop: npt.ArrayLike) -> Regions:
        """Half-open ranges [start, stop), one region per entry."""
        base = np.atleast_1d(np.asarray(start, dtype=np.int64))
        extent = np.atleast_1d(np.asarray(stop, dtype=np.int64)) - base
        return Regions(base, extent[:, None], np.ones((len(base), 1), dtype=np.int64))

    @staticmethod
    def strided(start: npt.ArrayLike, count: npt.ArrayLike, stride: npt.ArrayLike) -> Regions:
        """`count` positions from `start` in steps of `stride`, one region per entry."""
        base = np.atleast_1d(np.asarray(start, dtype=np.int64))
        extent = np.broadcast_to(np.asarray(count, dtype=np.int64), base.shape)[:, None]
        step = np.broadcast_to(np.asarray(stride, dtype=np.int64), base.shape)[:, None]
        return Regions(base, extent, step)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(
        self, rows: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_] | slice
    ) -> Regions:
        return Regions(self.base[rows], self.extent[rows], self.stride[rows])

    @property
    def first(self) -> IntArray:
        """The least position of each region."""
        return self.base

    @property
    def last(self) -> IntArray:
        """The greatest position of each region (inclusive)."""
        return np.asarray(self.base + ((self.extent - 1) * self.stride).sum(axis=1), dtype=np.int64)

    @property
    def step(self) -> IntArray:
        """Common step: positions are congruent to the base modulo it.

        0 for a region of one position.
        """
        moving = np.where(self.extent > 1, self.stride, 0)
        return np.asarray(np.gcd.reduce(moving, axis=1), dtype=np.int64)

    @property
    def dense(self) -> npt.NDArray[np.bool_]:
        """Whether a region contains all positions of its step in its range."""
        size = np.prod(self.extent, axis=1)
        return np.asarray((self.last - self.first) == (size - 1) * self.step, dtype=np.bool_)

    def positions(self, row: int) -> IntArray:
        """The positions of one region in lattice order."""
        out = self.base[row : row + 1]
        for extent, stride in zip(self.extent[row], self.stride[row], strict=True):
            out = (out[:, None] + np.arange(extent) * stride).reshape(-1)
        return out
