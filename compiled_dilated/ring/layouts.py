"""Layouts: which tokens each rank holds, as runs of places of an order.

16 tokens, 4 ranks      rank 0         rank 1         rank 2         rank 3
contiguous              0  1  2  3     4  5  6  7     8  9 10 11     12 13 14 15
zigzag                  0  1 14 15     2  3 12 13     4  5 10 11      6  7  8  9     causal work even
striped                 0  4  8 12     1  5  9 13     2  6 10 14      3  7 11 15     (arXiv 2311.09431)
residue 2               0  2  4  6     8 10 12 14     1  3  5  7      9 11 13 15     a dilated mask stays within a class
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
    """`tokens` tokens dealt out over `ranks` ranks; every token to exactly one, none to some where there are too few."""

    tokens: int
    ranks: int

    @abstractmethod
    def runs(self, rank: int) -> tuple[range, ...]:
        """The places that a rank holds, in the order of its memory: non-empty ranges."""

    @abstractmethod
    def owners(self, places: range) -> Iterator[int]:
        """The ranks that may hold some of these places, each once, ascending."""

    @property
    def order(self) -> Order:
        """What places mean."""
        return Identity()

    @property
    @abstractmethod
    def name(self) -> str:
        """How a user asks for it."""

    def count(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return sum(map(len, self.runs(rank)))


def _some(*runs: range) -> tuple[range, ...]:
    return tuple(run for run in runs if run)


def _share(total: int, shares: int, i: int) -> int:
    """Where the i-th of some even shares starts: sizes differ by one at most."""
    size, longer = divmod(total, shares)
    return i * size + min(i, longer)


def _holder(total: int, shares: int, at: int) -> int:
    """The share that holds a place."""
    size, longer = divmod(total, shares)
    return at // (size + 1) if at < longer * (size + 1) else longer + (at - longer * (size + 1)) // size


@dataclass(frozen=True)
class Contiguous(Layout):
    """Shards one after the other along an order: the sequence itself, or a Hilbert curve through a grid."""

    along: Order = Identity()  # noqa: RUF009  a value

    def runs(self, rank: int) -> tuple[range, ...]:
        return _some(range(_share(self.tokens, self.ranks, rank), _share(self.tokens, self.ranks, rank + 1)))

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        if places:
            yield from range(_holder(self.tokens, self.ranks, places[0]), _holder(self.tokens, self.ranks, places[-1]) + 1)

    @property
    def order(self) -> Order:
        return self.along

    @property
    def name(self) -> str:
        return "contiguous" if self.along == Identity() else repr(self.along)


@dataclass(frozen=True)
class Zigzag(Layout):
    """Rank i of a group holds chunks i and 2 * group - 1 - i of the group's tokens, so that causal work is even.

    group: ranks that share a stretch of the sequence, as the ranks of one segment do; it divides `ranks`.
    """

    group: int

    def _chunk(self, index: int) -> range:
        return range(_share(self.tokens, 2 * self.ranks, index), _share(self.tokens, 2 * self.ranks, index + 1))

    def runs(self, rank: int) -> tuple[range, ...]:
        first = rank // self.group * self.group
        i = rank - first
        return _some(self._chunk(2 * first + i), self._chunk(2 * first + 2 * self.group - 1 - i))

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        if places:
            first, last = (_holder(self.tokens, 2 * self.ranks, at) for at in (places[0], places[-1]))
            yield from sorted({self._rank(chunk) for chunk in range(first, last + 1)})

    def _rank(self, chunk: int) -> int:
        first, i = divmod(chunk, 2 * self.group)
        return first * self.group + min(i, 2 * self.group - 1 - i)

    @property
    def name(self) -> str:
        return "zigzag" if self.group == self.ranks else f"zigzag of {self.group}"


@dataclass(frozen=True)
class Striped(Layout):
    """Rank i holds tokens i, i + ranks, ...: causal work is even, and a mask dilated by a multiple of `ranks` stays at home."""

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
    """The classes of position % rate one after the other, cut into shards."""

    rate: int

    def runs(self, rank: int) -> tuple[range, ...]:
        start, stop = _share(self.tokens, self.ranks, rank), _share(self.tokens, self.ranks, rank + 1)
        out, before = [], 0
        for residue in range(self.rate):
            members = range(residue, self.tokens, self.rate)
            out.append(members[max(0, start - before) : max(0, stop - before)])
            before += len(members)
        return _some(*out)

    def owners(self, places: range) -> Iterator[int]:
        found: set[int] = set()
        before = 0
        for residue in range(self.rate):
            members = range(residue, self.tokens, self.rate)
            here = intersection(clip(places, 0, self.tokens), members) if members else range(0)
            if here:
                first, last = (before + (at - residue) // self.rate for at in (here[0], here[-1]))
                found.update(range(_holder(self.tokens, self.ranks, first), _holder(self.tokens, self.ranks, last) + 1))
            before += len(members)
        yield from sorted(found)

    @property
    def name(self) -> str:
        return f"residue {self.rate}"
