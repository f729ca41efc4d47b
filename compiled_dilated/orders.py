"""Orders of execution: permutations of tokens that make a mask friendly to tiles. An order never changes a result.

    place      0  1  2  3  4  5  6  7            hilbert(4, 4), the place of each cell:     0  1 14 15
    residue(2) 0  2  4  6  1  3  5  7                                                       3  2 13 12
    residue(2, period=4)                                                                    4  7  8 11
               0  2  1  3  4  6  5  7                                                       5  6  9 10

A *place* counts along the order, a *position* along the original sequence; `permutation(n)[place]` is a position.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import arguments
from .masks.grids import coordinates, strides_of
from .regions import IntArray, Regions

SmallIntArray = npt.NDArray[np.int32]


class Order(ABC):
    """A permutation of tokens, for any length that `check` accepts. Hashable, equal by value, prints as code."""

    @abstractmethod
    def permutation(self, n: int) -> IntArray | None:
        """The position of the token at each place, (n,); None for the identity."""

    @abstractmethod
    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """x with `dim` brought from positions to places."""

    @abstractmethod
    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """x with `dim` brought from places back to positions: the exact inverse of `permute`."""

    @abstractmethod
    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """The positions at places [start, stop) of n tokens, one region per (non-empty) run; a hull where they are no box."""

    def check(self, n: int) -> None:  # noqa: B027
        """Raise ValueError if the order cannot order n tokens."""


@dataclass(frozen=True, repr=False)
class Identity(Order):
    """Tokens as they come."""

    def permutation(self, n: int) -> IntArray | None:
        return None

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return x

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return x

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        return Regions.contiguous(starts, stops)

    def __repr__(self) -> str:
        return "identity()"


def identity() -> Order:
    """Tokens as they come."""
    return Identity()


@dataclass(frozen=True, repr=False)
class Residue(Order):
    """Class by class of position % rate, within each run of `period` tokens."""

    rate: int
    period: int | None

    def permutation(self, n: int) -> IntArray | None:
        return self._position(np.arange(n), n)

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return self._by_period(x, dim, _classes)

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return self._by_period(x, dim, _unclasses)

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        start, last = np.atleast_1d(np.asarray(starts, dtype=np.int64)), np.atleast_1d(np.asarray(stops, dtype=np.int64)) - 1
        period = self.period or max(n, 1)
        (block, class_, index), (last_block, last_class, _) = self._locate(start, n), self._locate(last, n)
        first_position = block * period + class_ + index * self.rate
        one_class = (block == last_block) & (class_ == last_class)
        # A run over several classes starts the class after its first one, and reaches up to the end of its period.
        low = np.minimum(first_position, block * period + class_ + 1)
        end_of_period = np.minimum((last_block + 1) * period, n) - 1
        high = np.where((last_class == 0) & (block < last_block), self._position(last, n), end_of_period)
        count = np.where(one_class, last - start + 1, high - low + 1)
        return Regions.strided(np.where(one_class, first_position, low), count, np.where(one_class, self.rate, 1))

    def _locate(self, place: IntArray, n: int) -> tuple[IntArray, IntArray, IntArray]:
        """Of each place: its period, its class within the period, its index within the class."""
        period = self.period or max(n, 1)
        block, within = np.divmod(place, period)
        rows, longer = np.divmod(np.minimum(period, n - block * period), self.rate)
        # The first `longer` classes have rows + 1 members, the others rows.
        boundary = longer * (rows + 1)
        late, short = within - boundary, np.maximum(rows, 1)
        class_ = np.where(within < boundary, within // (rows + 1), longer + late // short)
        index = np.where(within < boundary, within % (rows + 1), late % short)
        return block, class_, index

    def _position(self, place: IntArray, n: int) -> IntArray:
        block, class_, index = self._locate(place, n)
        return np.asarray(block * (self.period or n) + class_ + index * self.rate, dtype=np.int64)

    def _by_period(self, x: torch.Tensor, dim: int, each: Callable[[torch.Tensor, int, int], torch.Tensor]) -> torch.Tensor:
        dim, n = dim % x.ndim, x.shape[dim]
        period = self.period or max(n, 1)
        whole, tail = n // period, n % period  # not divmod, which tracing cannot do on a symbolic length
        parts = []
        if whole:
            body = _split(x.narrow(dim, 0, whole * period), dim, whole, period)
            parts.append(each(body, dim + 1, self.rate).flatten(dim, dim + 1))
        if tail:
            parts.append(each(x.narrow(dim, n - tail, tail), dim, self.rate))
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0] if parts else x

    def __repr__(self) -> str:
        return f"residue({self.rate}{'' if self.period is None else f', period={self.period}'})"


def _split(x: torch.Tensor, dim: int, rows: int, columns: int) -> torch.Tensor:
    """A view with dim, of rows * columns entries, as two."""
    return x.reshape(*x.shape[:dim], rows, columns, *x.shape[dim + 1 :])


def _swapped(x: torch.Tensor, dim: int) -> torch.Tensor:
    """dim and dim + 1 exchanged, then joined to one."""
    return x.transpose(dim, dim + 1).flatten(dim, dim + 1)


def _classes(x: torch.Tensor, dim: int, rate: int) -> torch.Tensor:
    """Positions to places: class by class of position % rate along dim. A view or a copy, whatever the number of classes."""
    rows, longer = x.shape[dim] // rate, x.shape[dim] % rate
    even = _split(x.narrow(dim, 0, rows * rate), dim, rows, rate)
    if not longer:
        return _swapped(even, dim)
    # Classes are of two sizes: the first `longer` ones have one member more.
    last_row = _split(x.narrow(dim, rows * rate, longer), dim, 1, longer)
    long = torch.cat([even.narrow(dim + 1, 0, longer), last_row], dim)
    short = even.narrow(dim + 1, longer, rate - longer)
    return torch.cat([_swapped(long, dim), _swapped(short, dim)], dim)


def _unclasses(x: torch.Tensor, dim: int, rate: int) -> torch.Tensor:
    """Places to positions: the inverse of `_classes`."""
    n = x.shape[dim]
    rows, longer = n // rate, n % rate
    if not longer:
        return _swapped(_split(x, dim, rate, rows), dim)
    boundary = longer * (rows + 1)
    long = _split(x.narrow(dim, 0, boundary), dim, longer, rows + 1).transpose(dim, dim + 1)
    short = _split(x.narrow(dim, boundary, n - boundary), dim, rate - longer, rows).transpose(dim, dim + 1)
    even = torch.cat([long.narrow(dim, 0, rows), short], dim + 1).flatten(dim, dim + 1)
    return torch.cat([even, long.select(dim, rows)], dim)


def residue(rate: int, period: int | None = None) -> Order:
    """Tokens of one residue class of position % rate together, class 0 first; with `period`, anew in each run of so many tokens.

    Any length: the last period may be short, and rate need not divide it. Makes dilated masks dense (LongNet, arXiv 2307.02486).

    >>> residue(2, period=4).permutation(8).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return Residue(arguments.integer("rate", rate, 1), None if period is None else arguments.integer("period", period, 1))


@dataclass(frozen=True, repr=False)
class Hilbert(Order):
    """Cells of a grid of 2 or 3 axes (tokens in row-major order) along a Hilbert curve."""

    grid: tuple[int, ...]

    def check(self, n: int) -> None:
        if n != math.prod(self.grid):
            raise ValueError(
                f"{self!r} orders the {math.prod(self.grid)} cells of its grid; got {n} tokens. "
                "Give the grid of the sequence, or pad the sequence to it"
            )

    def permutation(self, n: int) -> IntArray | None:
        self.check(n)
        return _curve(self.grid).astype(np.int64)

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        self.check(x.shape[dim])
        return _gather(x, dim, self.grid, inverse=False)

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        self.check(x.shape[dim])
        return _gather(x, dim, self.grid, inverse=True)

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """The bounding box of each run: the run itself where it is a whole square or cube of the curve."""
        self.check(n)
        start, stop = np.atleast_1d(np.asarray(starts, dtype=np.int64)), np.atleast_1d(np.asarray(stops, dtype=np.int64))
        # reduceat reduces [index, next index): every other one of start, stop, start, stop, ... is a run.
        ends = np.stack([start, stop], axis=1).reshape(-1)
        low = np.stack([np.minimum.reduceat(c, ends)[::2] for c in _curve_coordinates(self.grid)], axis=1).astype(np.int64)
        high = np.stack([np.maximum.reduceat(c, ends)[::2] for c in _curve_coordinates(self.grid)], axis=1).astype(np.int64)
        strides = np.asarray(strides_of(self.grid), dtype=np.int64)
        return Regions(low @ strides, high - low + 1, np.broadcast_to(strides, low.shape))

    def __repr__(self) -> str:
        return f"hilbert({', '.join(map(str, self.grid))})"


def hilbert(*grid: int) -> Order:
    """Cells of a grid along a Hilbert curve, `hilbert(rows, cols)` or `hilbert(depth, rows, cols)`; neighbours stay near.

    Any sizes: the curve of the enclosing square or cube, less the cells outside the grid. Runs of 4**k (8**k) places that start
    at a multiple of that are squares (cubes) of 2**k cells a side, where 2**k divides every size.

    >>> hilbert(2, 2).permutation(4).tolist()
    [0, 1, 3, 2]
    """
    sizes = arguments.integers("grid", grid, 1)
    if len(sizes) not in (2, 3):
        raise ValueError(
            f"hilbert orders grids of 2 or 3 axes; got {len(sizes)} sizes {sizes!r}. "
            "Write hilbert(rows, cols) or hilbert(depth, rows, cols)"
        )
    return Hilbert(sizes)


def _hilbert_index(grid: tuple[int, ...], positions: Any) -> Any:
    """How far along the curve of the enclosing cube each row-major position lies, for a numpy array or a torch tensor.

    J. Skilling, Programming the Hilbert curve, 2004.
    """
    bits = _bits(grid)
    axes = [c for c, size in zip(coordinates(grid, positions), grid, strict=True) if size > 1]
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for axis in range(len(axes)):
            # Cells of the upper half are mirrored along axis 0, those of the lower half swapped between axis 0 and this one.
            upper = -(axes[axis] >> bit & 1)
            swap = (axes[0] ^ axes[axis]) & below & ~upper
            axes[0] = axes[0] ^ (swap | (upper & below))
            if axis:
                axes[axis] = axes[axis] ^ swap
    for axis in range(1, len(axes)):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    parity = axes[-1] >> 1
    for shift in (1, 2, 4, 8, 16):
        parity = parity ^ parity >> shift
    index = positions - positions
    for bit in reversed(range(bits)):
        for axis in axes:
            index = index << 1 | ((axis ^ parity) >> bit & 1)
    return index


def _bits(grid: tuple[int, ...]) -> int:
    """Bits of a coordinate of the enclosing cube."""
    return (max(grid) - 1).bit_length()


def _is_line(grid: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in grid) < 2


def _fills_cube(grid: tuple[int, ...]) -> bool:
    return all(size in (1, 1 << _bits(grid)) for size in grid)


def _wide(grid: tuple[int, ...]) -> bool:
    """Whether the curve of the enclosing cube is too long for int32."""
    return _bits(grid) * sum(size > 1 for size in grid) > 31


@lru_cache(maxsize=16)
def _curve(grid: tuple[int, ...]) -> SmallIntArray:
    """The row-major position of each cell along the curve."""
    positions = np.arange(math.prod(grid), dtype=np.int64 if _wide(grid) else np.int32)
    if _is_line(grid):
        return positions.astype(np.int32)
    index = _hilbert_index(grid, positions)
    return _inverse(index) if _fills_cube(grid) else np.argsort(index).astype(np.int32)


def _inverse(permutation: npt.NDArray[Any]) -> SmallIntArray:
    out = np.empty(len(permutation), dtype=np.int32)
    out[permutation] = np.arange(len(permutation), dtype=np.int32)
    return out


@lru_cache(maxsize=16)
def _curve_coordinates(grid: tuple[int, ...]) -> tuple[SmallIntArray, ...]:
    """The coordinates of each cell along the curve, axis by axis, and one entry more so that a run may end at the last cell."""
    return tuple(np.append(c, c[-1:]).astype(np.int32) for c in coordinates(grid, _curve(grid)))


def _gather(x: torch.Tensor, dim: int, grid: tuple[int, ...], inverse: bool) -> torch.Tensor:
    index = _traced_index if torch.compiler.is_compiling() else _index
    return x.index_select(dim, index(grid, inverse, x.device))


@lru_cache(maxsize=16)
def _index(grid: tuple[int, ...], inverse: bool, device: torch.device) -> torch.Tensor:
    # Cached for good, so that it must not be the inference tensor that the first caller's mode would make it.
    with torch.inference_mode(False):
        return torch.from_numpy(_inverse(_curve(grid)) if inverse else _curve(grid)).to(device)


def _traced_index(grid: tuple[int, ...], inverse: bool, device: torch.device) -> torch.Tensor:
    """The index computed within a traced graph: a cached tensor would be foreign to it, a constant would make it large."""
    positions = torch.arange(math.prod(grid), dtype=torch.int64 if _wide(grid) else torch.int32, device=device)
    if _is_line(grid):
        return positions
    index = _hilbert_index(grid, positions)
    if _fills_cube(grid) and inverse:
        return torch.as_tensor(index)
    curve = torch.argsort(index)
    return torch.argsort(curve) if inverse else curve
