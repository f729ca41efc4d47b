"""Cells of a grid along a Hilbert curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .. import arguments
from ..masks.coordinates import strides_of
from ..regions import IntArray, Regions
from .core import Order
from .curves import curve, curve_coordinates
from .indices import index

_MOST_CELLS = 2**31
_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True, repr=False)
class Hilbert(Order):
    """Cells of a 2-D or 3-D grid along a Hilbert curve.

    Tokens are in row-major order.
    """

    grid: tuple[int, ...]

    def check(self, n: int) -> None:
        cells = math.prod(self.grid)
        if n != cells:
            raise ValueError(
                f"{self!r} orders the {cells} cells of its grid; got {n} tokens. "
                "Give the grid of the sequence, or pad the sequence to it. "
                "If there are tokens before the grid or after it, pass its start as offset="
            )

    def permutation(self, n: int) -> IntArray | None:
        self.check(n)
        return curve(self.grid).astype(np.int64)

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        self.check(x.shape[dim])
        return x.index_select(dim, index(self.grid, False, x.device))

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        self.check(x.shape[dim])
        return x.index_select(dim, index(self.grid, True, x.device))

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """Bounding box of each run.

        Exact for a complete square or cube of the curve.
        """
        self.check(n)
        start, stop = _runs(starts, stops)
        # reduceat reduces [index, next index): every second entry of start, stop, start, stop, ...
        # is the start of a run.
        ends = np.stack([start, stop], axis=1).reshape(-1)
        lows, highs = [], []
        for coordinate in curve_coordinates(self.grid):
            lows.append(np.minimum.reduceat(coordinate, ends)[::2])
            highs.append(np.maximum.reduceat(coordinate, ends)[::2])
        low = np.stack(lows, axis=1).astype(np.int64)
        high = np.stack(highs, axis=1).astype(np.int64)
        strides = np.asarray(strides_of(self.grid), dtype=np.int64)
        return Regions(low @ strides, high - low + 1, np.broadcast_to(strides, low.shape))

    def __repr__(self) -> str:
        return f"hilbert({', '.join(map(str, self.grid))})"


@dataclass(frozen=True, repr=False)
class PlacedHilbert(Order):
    """A Hilbert curve on a grid at position `offset`; other tokens stay.

    offset 1, grid (2, 2), 6 tokens:  0  1 2 4 3  5
    """

    hilbert: Hilbert
    offset: int

    @property
    def tokens(self) -> range:
        """Positions of the grid, which are its places too."""
        return range(self.offset, self.offset + math.prod(self.hilbert.grid))

    def check(self, n: int) -> None:
        if n < self.tokens.stop:
            raise ValueError(
                f"{self!r} orders the {len(self.tokens)} cells of its grid from position "
                f"{self.offset} on; got {n} tokens. "
                "Give the grid of the sequence, or pad the sequence to it"
            )

    def permutation(self, n: int) -> IntArray | None:
        self.check(n)
        out = np.arange(n, dtype=np.int64)
        tokens = self.tokens
        out[tokens.start : tokens.stop] = curve(self.hilbert.grid) + np.int64(self.offset)
        return out

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return self._on_grid(x, dim, self.hilbert.permute)

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return self._on_grid(x, dim, self.hilbert.invert)

    def _on_grid(
        self, x: torch.Tensor, dim: int, change: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """Apply `change(x, dim)` to the grid's tokens only."""
        self.check(x.shape[dim])
        first, stop = self.tokens.start, self.tokens.stop
        before = x.narrow(dim, 0, first)
        inside = change(x.narrow(dim, first, stop - first), dim)
        after = x.narrow(dim, stop, x.shape[dim] - stop)
        return torch.cat([before, inside, after], dim)

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """Boxes as of `Hilbert`; contiguous ranges for runs across the border."""
        self.check(n)
        start, stop = _runs(starts, stops)
        shape = len(start), len(self.hilbert.grid)
        extent, stride = np.ones(shape, dtype=np.int64), np.ones(shape, dtype=np.int64)
        # 1. The bounding box of each run's places on the grid, where there are any.
        low = start.clip(self.tokens.start, self.tokens.stop)
        high = stop.clip(self.tokens.start, self.tokens.stop)
        rows = np.flatnonzero(low < high)
        box = self.hilbert.regions(
            low[rows] - self.offset, high[rows] - self.offset, len(self.tokens)
        )
        # 2. The contiguous hull of the box and the places outside the grid.
        first, last = start.copy(), stop - 1
        first_outside = np.where(start < low, start, _FAR)
        last_outside = np.where(stop > high, stop - 1, -1)
        first[rows] = np.minimum(first_outside[rows], box.first + self.offset)
        last[rows] = np.maximum(last_outside[rows], box.last + self.offset)
        extent[:, 0] = last - first + 1
        # 3. Runs inside the grid keep their box.
        inside = ((start == low) & (stop == high))[rows, None]
        extent[rows] = np.where(inside, box.extent, extent[rows])
        stride[rows] = np.where(inside, box.stride, stride[rows])
        return Regions(first, extent, stride)

    def __repr__(self) -> str:
        return f"{repr(self.hilbert)[:-1]}, offset={self.offset})"


def _runs(starts: npt.ArrayLike, stops: npt.ArrayLike) -> tuple[IntArray, IntArray]:
    """Starts and stops as arrays, (runs,)."""
    start = np.atleast_1d(np.asarray(starts, dtype=np.int64))
    return start, np.atleast_1d(np.asarray(stops, dtype=np.int64))


def hilbert(*grid: int, offset: int | None = None) -> Order:
    """Cells of a grid along a Hilbert curve: neighbors stay close.

    Write `hilbert(rows, cols)` or `hilbert(depth, rows, cols)`; any sizes. The curve is that of the
    enclosing square or cube, without the cells outside the grid. If 2**k divides every size, a run
    of 4**k (8**k) places from a multiple of 4**k (8**k) on is a square (cube) of side 2**k.

    offset: None if the sequence is the grid, else the position of the grid's first token; other
        tokens keep their places.

    >>> hilbert(2, 2).permutation(4).tolist()
    [0, 1, 3, 2]
    >>> hilbert(2, 2, offset=1).permutation(6).tolist()
    [0, 1, 2, 4, 3, 5]
    """
    sizes = arguments.integers("grid", grid, 1)
    if len(sizes) not in (2, 3):
        raise ValueError(
            f"hilbert orders grids of 2 or 3 axes; got {len(sizes)} sizes {sizes!r}. "
            "Write hilbert(rows, cols) or hilbert(depth, rows, cols)"
        )
    cells = math.prod(sizes)
    if cells > _MOST_CELLS:
        raise ValueError(
            f"grid must have at most {_MOST_CELLS} cells, whose positions fit 32 bits; got {cells}"
        )
    if offset is None:
        return Hilbert(sizes)
    return PlacedHilbert(Hilbert(sizes), arguments.integer("offset", offset, 0))
