"""Schedules: the steps of every rank of a ring. Pure data.

causal window of 3, 4 ranks of 4 tokens       rank 1, keys of rank 0       rank 1, its own keys
                                              0 1 2 3                      4 5 6 7
                                            4     # #                    4 #
message from rank 0: rows 2 .. 3            5       #                    5 # #
step of rank 1: queries 4 .. 5              6                            6 # # #
rank 2 receives nothing from rank 0         7                            7   # # #

Each allowed pair is in exactly one block of each branch that allows it. Steps without blocks are
left out. Steps of a rank are computed on demand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..heads import HeadRange, head_groups
from ..masks import Mask, disjoint
from ..orders import identity
from ..programs import Program
from ..regions import EMPTY, IntArray
from . import extents, steps
from .layouts import Contiguous, Layout
from .moved import Moved
from .steps import Block, Step

# Ranges of at most this many ranks are not bisected further.
_FEW_RANKS = 8
# `Schedule.summary` uses periodicity for at most this many phases.
_MOST_PHASES = 4096


@dataclass(frozen=True, eq=False)
class Summary:
    """Counts per rank.

    messages: received messages.
    rows: received rows, counted once per key head.
    """

    steps: IntArray
    messages: IntArray
    rows: IntArray


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank, for a program over a layout.

    heads, kv_heads: query heads and key heads of the program.
    """

    program: Program
    layout: Layout
    heads: int
    kv_heads: int

    @cached_property
    def groups(self) -> tuple[tuple[Mask, HeadRange, HeadRange], ...]:
        """Disjoint masks over places, with their query and key heads.

        A pair that several branches allow is in one mask per branch.
        """
        order, out = self.layout.order, []
        for branch in self.program.branches:
            for mask, heads, kv_heads in head_groups(branch, self.heads, self.kv_heads):
                for part in disjoint(mask):
                    if order != identity():
                        part = Moved(part, 0, 1, 0, 1, order, self.layout.tokens)
                    out.append((part, heads, kv_heads))
        return tuple(out)

    def steps(self, rank: int) -> Iterator[Step]:
        """Steps of a rank: its own keys first, then by distance."""
        for source in self.sources(rank):
            step = self.step(rank, source)
            if step is not None:
                yield step

    def step(self, rank: int, source: int) -> Step | None:
        """Step of `rank` for the keys of `source`; None without blocks."""
        return _step(self, rank, source)

    def sources(self, rank: int) -> list[int]:
        """Ranks whose keys a rank may need, in step order."""
        peers = self._peers(rank, by_keys=False)
        return sorted(peers, key=lambda source: self.distance(rank, source))

    def targets(self, rank: int) -> list[int]:
        """Other ranks that may need a rank's keys, by distance."""
        peers = self._peers(rank, by_keys=True) - {rank}
        return sorted(peers, key=lambda target: self.distance(target, rank))

    def distance(self, rank: int, source: int) -> int:
        """Distance around the ring from a source to a rank."""
        return (rank - source) % self.layout.ranks

    def _peers(self, rank: int, by_keys: bool) -> set[int]:
        """Ranks whose keys a rank's queries may need.

        by_keys: ranks whose queries may need this rank's keys instead.
        """
        everything = range(self.layout.tokens)
        peers: set[int] = set()
        for mask, _, _ in self.groups:
            for run in self.layout.runs(rank):
                q, kv = mask.shrink(*_sides(run, everything, by_keys))
                if q and kv:
                    # Swapped back: this rank's places come first again.
                    own, places = _sides(q, kv, by_keys)
                    peers.update(self._owners(mask, own, places, by_keys))
        return peers

    def _owners(self, mask: Mask, own: range, places: range, by_keys: bool) -> Iterator[int]:
        """Owners of places that the mask may pair with the own ones.

        Contiguous layouts are bisected: a range of ranks without pairs is dropped at once.
        """
        ranks = list(self.layout.owners(places))
        if not ranks:
            return
        if not isinstance(self.layout, Contiguous):
            yield from ranks
            return
        pending = [(ranks[0], ranks[-1] + 1)]
        while pending:
            first, last = pending.pop()
            if last - first <= _FEW_RANKS:
                yield from range(first, last)
                continue
            span = range(self.layout.runs(first)[0].start, self.layout.runs(last - 1)[0].stop)
            if extents.verdict(mask, *_sides(own, span, by_keys)) != EMPTY:
                middle = (first + last) // 2
                pending += [(first, middle), (middle, last)]

    def _blocks(self, rank: int, source: int) -> Iterator[Block]:
        """The blocks of a rank's queries and a source's keys, without messages."""
        for mask, heads, kv_heads in self.groups:
            runs = extents.cut(self.layout.runs(rank), mask.period)
            source_runs = extents.cut(self.layout.runs(source), mask.period)
            for queries, keys in itertools.product(runs, source_runs):
                q, kv = extents.narrowest(mask, queries, keys)
                if q:
                    yield Block(heads, kv_heads, mask, q, kv)

    def summary(self) -> Summary:
        """Steps, messages and rows of every rank, for any number of ranks.

        Ranks in the same phase of the masks' periods, and away from both ends of the sequence, have
        equal steps up to a shift: only one of them is counted.
        """
        ranks = self.layout.ranks
        counts = np.zeros((3, ranks), dtype=np.int64)
        remaining = np.ones(ranks, dtype=bool)
        for rank, equal in self._equal_ranks():
            counts[:, equal] = self._counts(rank)[:, None]
            remaining[equal] = False
        for number in np.flatnonzero(remaining):
            counts[:, number] = self._counts(int(number))
        return Summary(*counts)

    def _counts(self, rank: int) -> IntArray:
        """Numbers of steps, messages and rows of one rank."""
        steps = messages = rows = 0
        for step in self.steps(rank):
            steps += 1
            messages += len(step.messages)
            rows += sum(message.kv_heads.count * len(message.rows) for message in step.messages)
        return np.array([steps, messages, rows])

    def _equal_ranks(self) -> Iterator[tuple[int, IntArray]]:
        """A rank, and all ranks whose steps are shifted copies."""
        layout, phases = self.layout, self._phases()
        for phase in range(min(phases, layout.ranks)):
            # A rank of this phase near the middle of the sequence.
            middle = (layout.ranks // 2) // phases * phases + phase
            if middle >= layout.ranks:
                continue
            sources = self.sources(middle)
            if not sources:
                continue
            first, last = min(sources) - middle, max(sources) - middle
            # At the ends of the sequence a mask may be cut, which breaks the shift.
            if middle + first > 0 and middle + last < layout.ranks - 1:
                equal = np.arange(phase, layout.ranks, phases)
                yield middle, equal[(equal + first >= 0) & (equal + last < layout.ranks)]

    def _phases(self) -> int:
        """Number of ranks after which all masks repeat; 0 for too many."""
        layout = self.layout
        periods = [mask.period for mask, _, _ in self.groups]
        finite = [period for period in periods if period is not None]
        if not isinstance(layout, Contiguous) or layout.tokens % layout.ranks:
            return 0
        if len(finite) < len(periods):
            return 0
        size, period = layout.tokens // layout.ranks, math.lcm(*finite)
        phases = period // math.gcd(size, period)
        if phases > _MOST_PHASES:
            return 0
        return phases


@lru_cache(maxsize=4096)
def _step(schedule: Schedule, rank: int, source: int) -> Step | None:
    """The step of a rank for the keys of a source."""
    blocks = list(schedule._blocks(rank, source))
    if not blocks:
        return None
    if rank == source:
        return Step(source, (), tuple(blocks))
    group = schedule.heads // schedule.kv_heads
    return steps.with_messages(source, schedule.layout.runs(source), blocks, group)


def _sides(first: range, second: range, by_keys: bool) -> tuple[range, range]:
    """Own and peer places as queries and keys, or back.

    Own places are the keys if `by_keys`: the ranges are swapped.
    """
    if by_keys:
        return (second, first)
    return (first, second)
