"""Layouts: tokens of each rank, as runs of places of an order.

16 tokens, 4 ranks    rank 0         rank 1         rank 2         rank 3
contiguous            0  1  2  3     4  5  6  7     8  9 10 11     12 13 14 15
zigzag                0  1 14 15     2  3 12 13     4  5 10 11      6  7  8  9    causal work even
striped               0  4  8 12     1  5  9 13     2  6 10 14      3  7 11 15    arXiv 2311.09431
residue 2             0  2  4  6     8 10 12 14     1  3  5  7      9 11 13 15    dilated masks
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from ..masks.ranges import clip, intersection
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


def _non_empty(*runs: range) -> tuple[range, ...]:
    return tuple(run for run in runs if run)


def _share(total: int, shares: int, i: int) -> range:
    """The i-th of some even shares of places.

    Sizes differ by at most one.
    """
    size, longer = divmod(total, shares)
    return range(i * size + min(i, longer), (i + 1) * size + min(i + 1, longer))


def _share_of(total: int, shares: int, place: int) -> int:
    """Index of the share that contains a place."""
    size, longer = divmod(total, shares)
    # The first `longer` shares have one place more than the others.
    if place < longer * (size + 1):
        return place // (size + 1)
    return longer + (place - longer * (size + 1)) // size


def _shares_of(total: int, shares: int, first: int, last: int) -> range:
    """Indices of the shares that contain the places from `first` to `last`."""
    return range(_share_of(total, shares, first), _share_of(total, shares, last) + 1)


@dataclass(frozen=True)
class Contiguous(Layout):
    """Consecutive shards along an order: the sequence, or a Hilbert curve."""

    along: Order = Identity()  # noqa: RUF009  a value

    def runs(self, rank: int) -> tuple[range, ...]:
        return _non_empty(_share(self.tokens, self.ranks, rank))

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        if places:
            yield from _shares_of(self.tokens, self.ranks, places[0], places[-1])

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
    """Two chunks per rank, one from each end: even causal work.

    Rank i of a group has chunks i and 2 * group - 1 - i.

    group: ranks that share a part of the sequence, such as one segment; divides `ranks`.
    """

    group: int

    def runs(self, rank: int) -> tuple[range, ...]:
        first, i = rank // self.group * self.group, rank % self.group
        chunks = (2 * first + i, 2 * first + 2 * self.group - 1 - i)
        return _non_empty(*(_share(self.tokens, 2 * self.ranks, chunk) for chunk in chunks))

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        if places:
            chunks = _shares_of(self.tokens, 2 * self.ranks, places[0], places[-1])
            yield from sorted({self._owner(chunk) for chunk in chunks})

    def _owner(self, chunk: int) -> int:
        """The rank of a chunk."""
        first, i = divmod(chunk, 2 * self.group)
        return first * self.group + min(i, 2 * self.group - 1 - i)

    @property
    def name(self) -> str:
        if self.group == self.ranks:
            return "zigzag"
        return f"zigzag of {self.group}"


@dataclass(frozen=True)
class Striped(Layout):
    """Tokens i, i + ranks, ... at rank i: even causal work.

    A mask dilated by a multiple of `ranks` needs no messages.
    """

    def runs(self, rank: int) -> tuple[range, ...]:
        return _non_empty(range(rank, self.tokens, self.ranks))

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        # Enough places meet every rank that their step can reach.
        step = math.gcd(places.step, self.ranks)
        if len(places) * step >= self.ranks:
            yield from range(places.start % step, self.ranks, step)
        else:
            yield from sorted({place % self.ranks for place in places})

    @property
    def name(self) -> str:
        return "striped"


@dataclass(frozen=True)
class ByResidue(Layout):
    """The residue classes of positions, one after another, cut into shards.

    rate: modulus of the classes.
    """

    rate: int

    def _classes(self) -> Iterator[tuple[int, range]]:
        """The non-empty residue classes, and the number of tokens before each."""
        before = 0
        for residue in range(self.rate):
            members = range(residue, self.tokens, self.rate)
            if members:
                yield before, members
            before += len(members)

    def runs(self, rank: int) -> tuple[range, ...]:
        share = _share(self.tokens, self.ranks, rank)
        runs = []
        for before, members in self._classes():
            first, end = max(0, share.start - before), max(0, share.stop - before)
            runs.append(members[first:end])
        return _non_empty(*runs)

    def owners(self, places: range) -> Iterator[int]:
        places = clip(places, 0, self.tokens)
        owners: set[int] = set()
        for before, members in self._classes():
            common = intersection(places, members)
            if common:
                # Indices along the classes, from which shares are cut.
                first = before + members.index(common[0])
                last = before + members.index(common[-1])
                owners.update(_shares_of(self.tokens, self.ranks, first, last))
        yield from sorted(owners)

    @property
    def name(self) -> str:
        return f"residue {self.rate}"
