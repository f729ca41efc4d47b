"""Layouts: the tokens of each rank, as runs of places of an order.

16 tokens, 4 ranks      rank 0         rank 1         rank 2         rank 3
contiguous              0  1  2  3     4  5  6  7     8  9 10 11     12 13 14 15
zigzag                  0  1 14 15     2  3 12 13     4  5 10 11      6  7  8  9     causal work even
striped                 0  4  8 12     1  5  9 13     2  6 10 14      3  7 11 15     (arXiv 2311.09431)
residue 2               0  2  4  6     8 10 12 14     1  3  5  7      9 11 13 15     for dilated masks
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from ..masks.core import clip, intersection
from ..orders import Identity, Order


@dataclass(frozen=True)
class Layout(ABC):
    """A partition of `tokens` tokens into `ranks` shards; some may be empty."""

    tokens: int
    ranks: int

    @abstractmethod
    def runs(self, rank: int) -> tuple[range, ...]:
        """Places of a rank in memory order, as non-empty ranges."""

    @abstractmethod
    def owners(self, places: range) -> Iterator[int]:
        """Ranks that may own some of these places, ascending, without duplicates."""

    @property
    def order(self) -> Order:
        """The order that places belong to."""
        return Identity()

    @property
    @abstractmethod
    def name(self) -> str:
        """The layout's name, as users pass it."""

    def count(self, rank: int) -> int:
        """Number of tokens of a rank."""
        return sum(map(len, self.runs(rank)))


def _some(*runs: range) -> tuple[range, ...]:
    return tuple(run for run in runs if run)


def _share(total: int, shares: int, i: int) -> int:
    """Start of the i-th of `shares` even shares; sizes differ by at most one."""
    size, longer = divmod(total, shares)
    return i * size + min(i, longer)


def _holder(total: int, shares: int, at: int) -> int:
    """Index of the share that contains a place."""
    size, longer = divmod(total, shares)
    if at < longer * (size + 1):
        return at // (size + 1)
    return longer + (at - longer * (size + 1)) // size


@dataclass(frozen=True)
class Contiguous(Layout):
    """Consecutive shards along an order: the sequence, or a Hilbert curve through a grid."""

    along: Order = Identity()  # noqa: RUF009  a value

    def runs(self, rank: int) -> tuple[range, ...]:
        return _some(
            range(_share(self.tokens, self.ranks, rank), _share(self.tokens, self.ranks, rank + 1)),
        )

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        if places:
            yield from range(
                _holder(self.tokens, self.ranks, places[0]),
                _holder(self.tokens, self.ranks, places[-1]) + 1,
            )

    @property
    def order(self) -> Order:
        return self.along

    @property
    def name(self) -> str:
        if self.along == Identity():
            return "contiguous"
        return repr(self.along)


@dataclass(frozen=True)
class Zigzag(Layout):
    """Rank i of a group holds chunks i and 2 * group - 1 - i: even causal work.

    group: ranks that share a part of the sequence, such as one segment; divides `ranks`.
    """

    group: int

    def _chunk(self, index: int) -> range:
        return range(
            _share(self.tokens, 2 * self.ranks, index),
            _share(self.tokens, 2 * self.ranks, index + 1),
        )

    def runs(self, rank: int) -> tuple[range, ...]:
        first = rank // self.group * self.group
        i = rank - first
        return _some(self._chunk(2 * first + i), self._chunk(2 * first + 2 * self.group - 1 - i))

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        if places:
            first = _holder(self.tokens, 2 * self.ranks, places[0])
            last = _holder(self.tokens, 2 * self.ranks, places[-1])
            yield from sorted({self._rank(chunk) for chunk in range(first, last + 1)})

    def _rank(self, chunk: int) -> int:
        first, i = divmod(chunk, 2 * self.group)
        return first * self.group + min(i, 2 * self.group - 1 - i)

    @property
    def name(self) -> str:
        if self.group == self.ranks:
            return "zigzag"
        return f"zigzag of {self.group}"


@dataclass(frozen=True)
class Striped(Layout):
    """Rank i holds tokens i, i + ranks, ...: even causal work.

    A mask dilated by a multiple of `ranks` needs no messages.
    """

    def runs(self, rank: int) -> tuple[range, ...]:
        return _some(range(rank, self.tokens, self.ranks))

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        if len(places) * math.gcd(places.step, self.ranks) >= self.ranks:
            step = math.gcd(places.step, self.ranks)
            yield from range(places.start % step, self.ranks, step)
        else:
            yield from sorted({place % self.ranks for place in places})

    @property
    def name(self) -> str:
        return "striped"


@dataclass(frozen=True)
class ByResidue(Layout):
    """The residue classes of position % rate, one after the other, cut into shards."""

    rate: int

    def runs(self, rank: int) -> tuple[range, ...]:
        start, stop = (
            _share(self.tokens, self.ranks, rank),
            _share(self.tokens, self.ranks, rank + 1),
        )
        out, before = [], 0
        for residue in range(self.rate):
            members = range(residue, self.tokens, self.rate)
            out.append(members[max(0, start - before) : max(0, stop - before)])
            before += len(members)
        return _some(*out)

    def owners(self, places: range) -> Iterator[int]:
        owners: set[int] = set()
        before = 0
        for residue in range(self.rate):
            members = range(residue, self.tokens, self.rate)
            common = intersection(clip(places, 0, self.tokens), members) if members else range(0)
            if common:
                first, last = (
                    before + (at - residue) // self.rate for at in (common[0], common[-1])
                )
                owners.update(
                    range(
                        _holder(self.tokens, self.ranks, first),
                        _holder(self.tokens, self.ranks, last) + 1,
                    ),
                )
            before += len(members)
        yield from sorted(owners)

    @property
    def name(self) -> str:
        return f"residue {self.rate}"
