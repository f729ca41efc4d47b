"""Residue classes of positions, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import arguments
from ..masks.axes import least
from ..regions import IntArray, Regions
from ..tracing import is_traced
from .core import Order

# (x, dim, rate) -> x with dimension `dim` reordered.
Reorder = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True, repr=False)
class Residue(Order):
    """Residue classes of position % rate, in each run of `period` tokens."""

    rate: int
    period: int | None

    def permutation(self, n: int) -> IntArray | None:
        return np.asarray(self._position(np.arange(n), n), dtype=np.int64)

    def permute(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        if self._ragged(x.shape[dim]) and is_traced():
            places = torch.arange(x.shape[dim], device=x.device)
            return x.index_select(dim, self._position(places, x.shape[dim]))
        return self._by_period(x, dim, _classes)

    def invert(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        if self._ragged(x.shape[dim]) and is_traced():
            positions = torch.arange(x.shape[dim], device=x.device)
            return x.index_select(dim, self._place(positions, x.shape[dim]))
        return self._by_period(x, dim, _unclasses)

    def _ragged(self, n: int) -> bool:
        """Whether periods or classes differ in size.

        Views do not suffice then: torch.compile would specialize on the sizes of their slices, one
        graph per remainder. There the permutation is computed in the graph and fuses into the
        gather.
        """
        period = self.period or max(n, 1)
        return n % period != 0 or period % self.rate != 0

    def regions(self, starts: npt.ArrayLike, stops: npt.ArrayLike, n: int) -> Regions:
        first = np.atleast_1d(np.asarray(starts, dtype=np.int64))
        last = np.atleast_1d(np.asarray(stops, dtype=np.int64)) - 1
        period = self.period or max(n, 1)
        block, class_, index = self._locate(first, n)
        last_block, last_class, _ = self._locate(last, n)
        # A run within one class is a strided range.
        first_position = block * period + class_ + index * self.rate
        one_class = (block == last_block) & (class_ == last_class)
        # A run over several classes: the hull, from the start of the class after its first one to
        # the end of its period.
        low = np.minimum(first_position, block * period + class_ + 1)
        end_of_period = np.minimum((last_block + 1) * period, n) - 1
        ends_in_class_0 = (last_class == 0) & (block < last_block)
        high = np.where(ends_in_class_0, self._position(last, n), end_of_period)
        start = np.where(one_class, first_position, low)
        count = np.where(one_class, last - first + 1, high - low + 1)
        return Regions.strided(start, count, np.where(one_class, self.rate, 1))

    # Places and positions are numpy arrays or torch tensors, so only operators are used.

    def _sizes(self, block: Any, n: int) -> tuple[Any, Any]:
        """Tokens per class of a period, and number of longer classes.

        The first classes are longer by one token.
        """
        period = self.period or max(n, 1)
        length = least(period + block * 0, n - block * period)
        return length // self.rate, length % self.rate

    def _locate(self, place: Any, n: int) -> tuple[Any, Any, Any]:
        """Period of each place, class in the period, index in the class."""
        period = self.period or max(n, 1)
        block, within = place // period, place % period
        rows, longer = self._sizes(block, n)
        late = within >= longer * (rows + 1)
        among = within - late * (longer * (rows + 1))
        size = rows + 1 - late * 1
        return block, late * longer + among // size, among % size

    def _position(self, place: Any, n: int) -> Any:
        """Position of the token at each place."""
        block, class_, index = self._locate(place, n)
        return block * (self.period or max(n, 1)) + class_ + index * self.rate

    def _place(self, position: Any, n: int) -> Any:
        """Place of the token at each position; inverse of `_position`."""
        period = self.period or max(n, 1)
        block, within = position // period, position % period
        rows, longer = self._sizes(block, n)
        class_ = within % self.rate
        # Tokens of earlier periods, of earlier classes, and of the class.
        return block * period + class_ * rows + least(class_, longer) + within // self.rate

    def _by_period(self, x: torch.Tensor, dim: int, reorder: Reorder) -> torch.Tensor:
        """Apply `reorder` to all complete periods at once, and to the last."""
        dim, n = dim % x.ndim, x.shape[dim]
        period = self.period or max(n, 1)
        # Not divmod, which tracing cannot do on a symbolic length.
        periods, tail = n // period, n % period
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
        if self.period is None:
            return f"residue({self.rate})"
        return f"residue({self.rate}, period={self.period})"


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
    # Classes are of two sizes: the first `longer` classes have one more token.
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
    short = _split(x.narrow(dim, boundary, n - boundary), dim, rate - longer, rows)
    short = short.transpose(dim, dim + 1)
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
    rate = arguments.integer("rate", rate, 1)
    if period is not None:
        period = arguments.integer("period", period, 1)
    return Residue(rate, period)
