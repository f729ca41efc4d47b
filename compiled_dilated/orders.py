"""Orders of execution: permutations of tokens that make masks tile-friendly.

An order never changes a result.

    place      0  1  2  3  4  5  6  7            hilbert(4, 4), the place of each cell:     0  1 14 15
    residue(2) 0  2  4  6  1  3  5  7                                                       3  2 13 12
    residue(2, period=4)                                                                    4  7  8 11
               0  2  1  3  4  6  5  7                                                       5  6  9 10

A *place* is an index along the order, a *position* an index in the original sequence;
`permutation(n)[place]` is a position.
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
from torch.utils._python_dispatch import _disable_current_modes

from . import arguments
from .masks.grids import coordinates, least, strides_of
from .regions import IntArray, Regions

AnyInts = npt.NDArray[Any]
SmallInts = npt.NDArray[np.int32]

_MOST_CELLS = 2**31
_FAR = np.iinfo(np.int64).max


class Order(ABC):
    """A permutation of tokens, for every length that `check` accepts.

    Hashable, equal by value, prints as code.
    """

    @abstractmethod
    def permutation(self, n: int) -> IntArray | None:
        """Position of the token at each place, (n,); None for the identity."""

    @abstractmethod
    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """Reorder dimension `dim` of x from positions to places."""

    @abstractmethod
    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """Reorder dimension `dim` of x from places to positions; inverse of `permute`."""

    @abstractmethod
    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """Positions at places [start, stop) of n tokens, one region per non-empty run.

        A hull if the positions are not a box.
        """

    def check(self, n: int) -> None:  # noqa: B027
        """Raise ValueError if the order is undefined for n tokens."""


@dataclass(frozen=True, repr=False)
class Identity(Order):
    """The original order."""

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
    """The original order."""
    return Identity()


@dataclass(frozen=True, repr=False)
class Residue(Order):
    """Residue classes of position % rate, one after the other, in each run of `period` tokens."""

    rate: int
    period: int | None

    def permutation(self, n: int) -> IntArray | None:
        return np.asarray(self._position(np.arange(n), n), dtype=np.int64)

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        if self._ragged(x.shape[dim]) and torch.compiler.is_compiling():
            places = torch.arange(x.shape[dim], device=x.device)
            return x.index_select(dim, self._position(places, x.shape[dim]))
        return self._by_period(x, dim, _classes)

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        if self._ragged(x.shape[dim]) and torch.compiler.is_compiling():
            positions = torch.arange(x.shape[dim], device=x.device)
            return x.index_select(dim, self._place(positions, x.shape[dim]))
        return self._by_period(x, dim, _unclasses)

    def _ragged(self, n: int) -> bool:
        """Whether periods or classes have different sizes, so that views do not suffice.

        Slices of such lengths have sizes that torch.compile would specialize on, one graph per
        remainder. There the permutation is computed in the graph, where it fuses into the gather.
        """
        period = self.period or max(n, 1)
        return n % period != 0 or period % self.rate != 0

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        start, last = (
            np.atleast_1d(np.asarray(starts, dtype=np.int64)),
            np.atleast_1d(np.asarray(stops, dtype=np.int64)) - 1,
        )
        period = self.period or max(n, 1)
        (
            (block, class_, index),
            (
                last_block,
                last_class,
                _,
            ),
        ) = self._locate(start, n), self._locate(last, n)
        first_position = block * period + class_ + index * self.rate
        one_class = (block == last_block) & (class_ == last_class)
        # A run over several classes starts the class after its first one, and reaches up to the end
        # of its period.
        low = np.minimum(first_position, block * period + class_ + 1)
        end_of_period = np.minimum((last_block + 1) * period, n) - 1
        high = np.where(
            (last_class == 0) & (block < last_block),
            self._position(last, n),
            end_of_period,
        )
        count = np.where(one_class, last - start + 1, high - low + 1)
        return Regions.strided(
            np.where(one_class, first_position, low),
            count,
            np.where(one_class, self.rate, 1),
        )

    # Places and positions are numpy arrays or torch tensors, so only operators are used.

    def _sizes(self, block: Any, n: int) -> tuple[Any, Any]:
        """Rows and remainder of a period: the first `longer` classes have one member more."""
        period = self.period or max(n, 1)
        length = least(period + block * 0, n - block * period)
        return length // self.rate, length % self.rate

    def _locate(self, place: Any, n: int) -> tuple[Any, Any, Any]:
        """Period, class within the period and index within the class of each place."""
        period = self.period or max(n, 1)
        block, within = place // period, place % period
        rows, longer = self._sizes(block, n)
        late = within >= longer * (rows + 1)
        among = within - late * (longer * (rows + 1))
        size = rows + 1 - late * 1
        return block, late * longer + among // size, among % size

    def _position(self, place: Any, n: int) -> Any:
        block, class_, index = self._locate(place, n)
        return block * (self.period or max(n, 1)) + class_ + index * self.rate

    def _place(self, position: Any, n: int) -> Any:
        period = self.period or max(n, 1)
        block, within = position // period, position % period
        rows, longer = self._sizes(block, n)
        class_ = within % self.rate
        return block * period + class_ * rows + least(class_, longer) + within // self.rate

    def _by_period(
        self,
        x: torch.Tensor,
        dim: int,
        reorder: Callable[[torch.Tensor, int, int], torch.Tensor],
    ) -> torch.Tensor:
        dim, n = dim % x.ndim, x.shape[dim]
        period = self.period or max(n, 1)
        periods, tail = (
            n // period,
            n % period,
        )  # not divmod, which tracing cannot do on a symbolic length
        parts = []
        if periods:
            body = _split(x.narrow(dim, 0, periods * period), dim, periods, period)
            parts.append(reorder(body, dim + 1, self.rate).flatten(dim, dim + 1))
        if tail:
            parts.append(reorder(x.narrow(dim, n - tail, tail), dim, self.rate))
        if len(parts) > 1:
            return torch.cat(parts, dim)
        if parts:
            return parts[0]
        return x

    def __repr__(self) -> str:
        return f"residue({self.rate}{'' if self.period is None else f', period={self.period}'})"


def _split(x: torch.Tensor, dim: int, rows: int, columns: int) -> torch.Tensor:
    """View dimension `dim`, of rows * columns entries, as two dimensions."""
    return x.reshape(*x.shape[:dim], rows, columns, *x.shape[dim + 1 :])


def _swapped(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Transpose dimensions dim and dim + 1, then flatten them."""
    return x.transpose(dim, dim + 1).flatten(dim, dim + 1)


def _classes(x: torch.Tensor, dim: int, rate: int) -> torch.Tensor:
    """Reorder dimension `dim` from positions to places, class by class.

    The number of operations does not depend on the number of classes.
    """
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
    """Reorder dimension `dim` from places to positions; inverse of `_classes`."""
    n = x.shape[dim]
    rows, longer = n // rate, n % rate
    if not longer:
        return _swapped(_split(x, dim, rate, rows), dim)
    boundary = longer * (rows + 1)
    long = _split(x.narrow(dim, 0, boundary), dim, longer, rows + 1).transpose(dim, dim + 1)
    short = _split(
        x.narrow(dim, boundary, n - boundary),
        dim,
        rate - longer,
        rows,
    ).transpose(dim, dim + 1)
    even = torch.cat([long.narrow(dim, 0, rows), short], dim + 1).flatten(dim, dim + 1)
    return torch.cat([even, long.select(dim, rows)], dim)


def residue(rate: int, period: int | None = None) -> Order:
    """Group tokens by position % rate, class 0 first.

    Makes dilated masks dense (LongNet, arXiv 2307.02486). Accepts any length: the last period may
    be short, and rate need not divide it.

    rate: number of classes.
    period: group within each run of `period` tokens; None: within the complete sequence.

    >>> residue(2, period=4).permutation(8).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return Residue(
        arguments.integer("rate", rate, 1),
        None if period is None else arguments.integer("period", period, 1),
    )


@dataclass(frozen=True, repr=False)
class Hilbert(Order):
    """Cells of a 2-D or 3-D grid (tokens in row-major order) along a Hilbert curve."""

    grid: tuple[int, ...]

    def check(self, n: int) -> None:
        if n != math.prod(self.grid):
            raise ValueError(
                f"{self!r} orders the {math.prod(self.grid)} cells of its grid; got {n} tokens. "
                "Give the grid of the sequence, or pad the sequence to it. Where other tokens stand before the grid or after it, "
                "say where it starts with offset="
            )

    def permutation(self, n: int) -> IntArray | None:
        self.check(n)
        return _curve(self.grid).astype(np.int64)

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        self.check(x.shape[dim])
        return x.index_select(dim, _index(self.grid, False, x.device))

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        self.check(x.shape[dim])
        return x.index_select(dim, _index(self.grid, True, x.device))

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """Bounding box of each run; exact for a complete square or cube of the curve."""
        self.check(n)
        start, stop = (
            np.atleast_1d(np.asarray(starts, dtype=np.int64)),
            np.atleast_1d(np.asarray(stops, dtype=np.int64)),
        )
        # reduceat reduces [index, next index): every other one of start, stop, start, stop, ... is
        # a run.
        ends = np.stack([start, stop], axis=1).reshape(-1)
        low = np.stack(
            [np.minimum.reduceat(c, ends)[::2] for c in _curve_coordinates(self.grid)],
            axis=1,
        ).astype(np.int64)
        high = np.stack(
            [np.maximum.reduceat(c, ends)[::2] for c in _curve_coordinates(self.grid)],
            axis=1,
        ).astype(np.int64)
        strides = np.asarray(strides_of(self.grid), dtype=np.int64)
        return Regions(low @ strides, high - low + 1, np.broadcast_to(strides, low.shape))

    def __repr__(self) -> str:
        return f"hilbert({', '.join(map(str, self.grid))})"


@dataclass(frozen=True, repr=False)
class PlacedHilbert(Order):
    """A Hilbert curve on a grid that starts at position `offset`; other tokens stay in place.

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
                f"{self!r} orders the {len(self.tokens)} cells of its grid from position {self.offset} on; got {n} tokens. "
                "Give the grid of the sequence, or pad the sequence to it"
            )

    def permutation(self, n: int) -> IntArray | None:
        self.check(n)
        out = np.arange(n, dtype=np.int64)
        out[self.tokens.start : self.tokens.stop] = _curve(self.hilbert.grid) + np.int64(
            self.offset
        )
        return out

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return self._on_grid(x, dim, self.hilbert.permute)

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        return self._on_grid(x, dim, self.hilbert.invert)

    def _on_grid(
        self,
        x: torch.Tensor,
        dim: int,
        change: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        self.check(x.shape[dim])
        first, stop = self.tokens.start, self.tokens.stop
        inside = change(x.narrow(dim, first, stop - first), dim)
        return torch.cat(
            [x.narrow(dim, 0, first), inside, x.narrow(dim, stop, x.shape[dim] - stop)],
            dim,
        )

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        """Boxes as of `Hilbert`; a run across the grid's border becomes one contiguous range."""
        self.check(n)
        start, stop = (
            np.atleast_1d(np.asarray(starts, dtype=np.int64)),
            np.atleast_1d(np.asarray(stops, dtype=np.int64)),
        )
        axes = len(self.hilbert.grid)
        extent, stride = (np.ones((len(start), axes), dtype=np.int64) for _ in range(2))
        low, high = (ends.clip(self.tokens.start, self.tokens.stop) for ends in (start, stop))
        boxes = np.flatnonzero(low < high)
        box = self.hilbert.regions(
            low[boxes] - self.offset,
            high[boxes] - self.offset,
            len(self.tokens),
        )
        first, last = start.copy(), stop - 1
        first[boxes] = np.minimum(
            np.where(start < low, start, _FAR)[boxes],
            box.first + self.offset,
        )
        last[boxes] = np.maximum(np.where(stop > high, stop - 1, -1)[boxes], box.last + self.offset)
        extent[:, 0] = last - first + 1
        inside = (start == low) & (stop == high)
        extent[boxes] = np.where(inside[boxes, None], box.extent, extent[boxes])
        stride[boxes] = np.where(inside[boxes, None], box.stride, stride[boxes])
        return Regions(first, extent, stride)

    def __repr__(self) -> str:
        return f"{repr(self.hilbert)[:-1]}, offset={self.offset})"


def hilbert(*grid: int, offset: int | None = None) -> Order:
    """Cells of a grid along a Hilbert curve, so that neighbors stay close.

    Write `hilbert(rows, cols)` or `hilbert(depth, rows, cols)`; any sizes. The curve is that of the
    enclosing square or cube, without the cells outside the grid. Runs of 4**k (8**k) places that
    start at a multiple of that are squares (cubes) of side 2**k, if 2**k divides every size.

    offset: None if the sequence is the grid, else the position of the grid's first token; other tokens
        keep their places.

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
    if math.prod(sizes) > _MOST_CELLS:
        raise ValueError(
            f"grid must have at most {_MOST_CELLS} cells, whose positions fit 32 bits; got {math.prod(sizes)}",
        )
    if offset is None:
        return Hilbert(sizes)
    return PlacedHilbert(Hilbert(sizes), arguments.integer("offset", offset, 0))


def _hilbert_index(axes: list[AnyInts], bits: int) -> AnyInts:
    """Index along the curve of a cube of side 2**bits, for each cell.

    J. Skilling, Programming the Hilbert curve, 2004.
    """
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for axis in range(len(axes)):
            # Cells of the upper half are mirrored along axis 0, those of the lower half swapped
            # between axis 0 and this one.
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
    index = np.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for coordinate in axes:
            index = index << 1 | ((coordinate ^ parity) >> bit & 1)
    return index


@lru_cache(maxsize=16)
def _curve(grid: tuple[int, ...]) -> SmallInts:
    """Row-major position of each cell along the curve."""
    n, sizes = math.prod(grid), [size for size in grid if size > 1]
    if len(sizes) < 2:
        return np.arange(n, dtype=np.int32)
    bits = (max(sizes) - 1).bit_length()
    dtype = np.int32 if bits * len(sizes) < 32 else np.int64
    index = _hilbert_index([axis.reshape(-1) for axis in np.indices(sizes, dtype=dtype)], bits)
    if n == 1 << bits * len(sizes):
        return _inverse(index)
    return np.argsort(index).astype(np.int32)


def _inverse(permutation: AnyInts) -> SmallInts:
    out = np.empty(len(permutation), dtype=np.int32)
    out[permutation] = np.arange(len(permutation), dtype=np.int32)
    return out


@lru_cache(maxsize=16)
def _curve_coordinates(grid: tuple[int, ...]) -> tuple[SmallInts, ...]:
    """Coordinates along the curve, per axis, with the last entry repeated.

    The extra entry lets a run end at the last cell.
    """
    return tuple(np.append(c, c[-1:]).astype(np.int32) for c in coordinates(grid, _curve(grid)))


class _Indices:
    """Cache of index tensors, as attributes.

    A tracer reads an attribute again at every call; it would cache the contents of a dictionary.
    """


_INDICES = _Indices()
_MOST_INDICES = 16


def _index(grid: tuple[int, ...], inverse: bool, device: torch.device) -> torch.Tensor:
    """Index tensor of the curve or its inverse; an input of the graph under torch.compile."""
    name = f"{'inverse of ' if inverse else ''}{grid} on {device}"
    _provide(name, grid, inverse, str(device))
    index: torch.Tensor = getattr(_INDICES, name)
    return index


def _provide(name: str, grid: tuple[int, ...], inverse: bool, device: str) -> None:
    if hasattr(_INDICES, name):
        return
    cache = vars(_INDICES)
    while len(cache) >= _MOST_INDICES:
        del cache[next(iter(cache))]
    # Kept for later callers, so that it must be neither an inference tensor nor a fake one,
    # whatever mode this caller is in.
    with torch.inference_mode(False), _disable_current_modes():
        setattr(
            _INDICES,
            name,
            torch.from_numpy(_inverse(_curve(grid)) if inverse else _curve(grid)).to(device),
        )


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: tracing
# calls this function, it does not enter it.
_provide._dynamo_marked_constant = True  # type: ignore[attr-defined]
