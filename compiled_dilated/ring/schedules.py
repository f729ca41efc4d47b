"""Schedules: what each rank computes from whose keys, and what it sends to whom. Pure data, made rank by rank when asked.

causal window of 3, 4 ranks of 4 tokens       rank 1, keys of rank 0       rank 1, its own keys
                                              0 1 2 3                      4 5 6 7
                                            4     # #                    4 #
message from rank 0: rows 2 .. 3            5       #                    5 # #
step of rank 1: queries 4 .. 5              6                            6 # # #
rank 2 is nothing's source here             7                            7   # # #

Each pair that the program allows is in exactly one block of each branch that allows it; steps without a block do not exist.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..heads import HeadRange, head_groups, head_ranges
from ..masks import Mask, disjoint
from ..masks.core import NOTHING, hull
from ..orders import identity
from ..programs import Program
from ..regions import EMPTY, PARTIAL, IntArray, Regions
from .layouts import Contiguous, Layout
from .moved import Moved

# Where a mask cannot name the keys that queries see, so many parts of a run are looked at, and empty ones at its ends cut.
_PARTS = 16
_FEW_RANKS = 8
# Ranks are told apart by so many phases; by more, each is looked at.
_MOST_PHASES = 4096


@dataclass(frozen=True)
class Message:
    """Rows of some key heads (of K and of V), at these places, inside one run of the sender."""

    kv_heads: HeadRange
    rows: range


@dataclass(frozen=True)
class Block:
    """Queries of one run and keys of one run under one mask, for some heads; `message` holds the keys, None: its own rank."""

    heads: HeadRange
    kv_heads: HeadRange
    mask: Mask
    queries: range
    keys: range
    message: Message | None = None


@dataclass(frozen=True)
class Step:
    """What a rank does with the keys of one source: receive the messages, compute the blocks."""

    source: int
    messages: tuple[Message, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Summary:
    """By rank: how many steps it takes, messages it receives, and rows of a key head (of K and of V) in them."""

    steps: IntArray
    messages: IntArray
    rows: IntArray


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank, for a program of `heads` query heads and `kv_heads` key heads over a layout."""

    program: Program
    layout: Layout
    heads: int
    kv_heads: int

    @cached_property
    def groups(self) -> tuple[tuple[Mask, HeadRange, HeadRange], ...]:
        """Masks over places that name no two pairs twice within a branch, and the heads that follow them."""
        order, out = self.layout.order, []
        for branch in self.program.branches:
            for mask, heads, kv_heads in head_groups(branch, self.heads, self.kv_heads):
                for part in disjoint(mask):
                    there = part if order == identity() else Moved(part, 0, 1, 0, 1, order, self.layout.tokens)
                    out.append((there, heads, kv_heads))
        return tuple(out)

    def steps(self, rank: int) -> Iterator[Step]:
        """A rank's steps: its own keys, then those of the rank before it, two before it, and so on around the ring."""
        for source in self.sources(rank):
            step = self.step(rank, source)
            if step is not None:
                yield step

    def sources(self, rank: int) -> list[int]:
        """The ranks whose keys a rank may need, in the order of its steps."""
        return sorted(self._met(rank, by_keys=False), key=lambda source: self.distance(rank, source))

    def targets(self, rank: int) -> list[int]:
        """The other ranks that may need a rank's keys, in the order of their distance around the ring."""
        return sorted(self._met(rank, by_keys=True) - {rank}, key=lambda target: self.distance(target, rank))

    def distance(self, rank: int, source: int) -> int:
        """How far around the ring a source stands before a rank."""
        return (rank - source) % self.layout.ranks

    def _met(self, rank: int, by_keys: bool) -> set[int]:
        """The ranks whose queries the keys of a rank may meet; or, not `by_keys`, whose keys its queries may."""
        everything = range(self.layout.tokens)
        found: set[int] = set()
        for mask, _, _ in self.groups:
            for run in self.layout.runs(rank):
                q, kv = mask.shrink(*_pair(run, everything, by_keys))
                if q and kv:
                    mine, theirs = (kv, q) if by_keys else (q, kv)
                    found.update(self._owners(mask, mine, theirs, by_keys))
        return found

    def _owners(self, mask: Mask, mine: range, theirs: range, by_keys: bool) -> Iterator[int]:
        """The owners of `theirs`, less those that a mask leaves nothing of: halves of the ring are asked about first."""
        owners = self.layout.owners(theirs)
        if not isinstance(self.layout, Contiguous):
            yield from owners
            return
        ranks = list(owners)
        todo = [(ranks[0], ranks[-1] + 1)] if ranks else []
        while todo:
            first, last = todo.pop()
            if last - first <= _FEW_RANKS:
                yield from range(first, last)
                continue
            span = range(self.layout.runs(first)[0].start, self.layout.runs(last - 1)[0].stop)
            if _verdict(mask, *_pair(mine, span, by_keys)) != EMPTY:
                middle = (first + last) // 2
                todo += [(first, middle), (middle, last)]

    def step(self, rank: int, source: int) -> Step | None:
        """What `rank` computes from the keys of `source`; None where that is nothing."""
        return _step(self, rank, source)

    def summary(self) -> Summary:
        """Steps, messages and rows of every rank, for any number of ranks.

        Ranks that stand alike to the masks' periods, and from whom the ends of the sequence are out of sight, have the same
        steps but for where they start: of those one is looked at.
        """
        ranks = self.layout.ranks
        found = np.zeros((3, ranks), dtype=np.int64)
        left = np.ones(ranks, dtype=bool)
        for rank, alike in self._alike():
            found[:, alike] = self._counts(rank)[:, None]
            left[alike] = False
        for each in np.flatnonzero(left):
            found[:, each] = self._counts(int(each))
        return Summary(*found)

    def _counts(self, rank: int) -> IntArray:
        steps = list(self.steps(rank))
        messages = [message for step in steps for message in step.messages]
        rows = sum(message.kv_heads.count * len(message.rows) for message in messages)
        return np.array([len(steps), len(messages), rows])

    def _alike(self) -> Iterator[tuple[int, IntArray]]:
        """A rank, and all the ranks whose steps are its own, moved."""
        layout, periods = self.layout, [mask.period for mask, _, _ in self.groups]
        known = [period for period in periods if period is not None]
        if not isinstance(layout, Contiguous) or layout.tokens % layout.ranks or len(known) < len(periods):
            return
        size = layout.tokens // layout.ranks
        period = math.lcm(*known)
        phases = period // math.gcd(size, period)
        for phase in range(min(phases, layout.ranks) if phases <= _MOST_PHASES else 0):
            middle = (layout.ranks // 2) // phases * phases + phase
            sources = self.sources(middle) if middle < layout.ranks else []
            if not sources:
                continue
            first, last = min(sources) - middle, max(sources) - middle
            if middle + first > 0 and middle + last < layout.ranks - 1:  # else the ends of the sequence are in sight
                alike = np.arange(phase, layout.ranks, phases)
                yield middle, alike[(alike + first >= 0) & (alike + last < layout.ranks)]

    def _blocks(self, rank: int, source: int) -> Iterator[Block]:
        for mask, heads, kv_heads in self.groups:
            period = mask.period
            for queries, keys in itertools.product(_cut(self.layout.runs(rank), period), _cut(self.layout.runs(source), period)):
                q, kv = _needed(mask, queries, keys)
                if q:
                    yield Block(heads, kv_heads, mask, q, kv)


@lru_cache(maxsize=4096)
def _step(schedule: Schedule, rank: int, source: int) -> Step | None:
    blocks = list(schedule._blocks(rank, source))
    if not blocks:
        return None
    if rank == source:
        return Step(source, (), tuple(blocks))
    messages = _messages(blocks, schedule.layout.runs(source))
    group = schedule.heads // schedule.kv_heads
    return Step(source, messages, tuple(part for block in blocks for part in _by_message(block, messages, group)))


def _cut(runs: Sequence[range], period: int | None) -> Iterator[range]:
    """Runs, cut where the first whole period of a mask starts: before it all tokens are of one period, after it it repeats."""
    for run in runs:
        start = run.start if period is None else -(-run.start // period) * period
        at = -(-(start - run.start) // run.step)
        yield from (part for part in (run[:at], run[at:]) if part)


def _needed(mask: Mask, queries: range, keys: range) -> tuple[range, range]:
    """The queries that see some of the keys, and the keys that they see, as narrow as the mask can say; both empty or neither."""
    q, kv = mask.shrink(queries, keys)
    if not q or not kv:
        return NOTHING
    verdict = _verdict(mask, q, kv)
    if verdict == PARTIAL:
        kv = _trimmed(mask, q, kv, of_queries=False)
        q = _trimmed(mask, q, kv, of_queries=True) if kv else kv
    return NOTHING if verdict == EMPTY or not q or not kv else (q, kv)


def _pair(mine: range, theirs: range, by_keys: bool) -> tuple[range, range]:
    """Queries and keys, of which the keys are `mine` if `by_keys`, else the queries."""
    return (theirs, mine) if by_keys else (mine, theirs)


def _verdict(mask: Mask, q: range, kv: range) -> int:
    return int(mask.classify(regions([q]), regions([kv]))[0])


def regions(runs: Sequence[range]) -> Regions:
    """Runs as regions."""
    columns = np.array([[run.start, len(run), run.step] for run in runs], dtype=np.int64).T
    return Regions.strided(*columns)


def _trimmed(mask: Mask, q: range, kv: range, of_queries: bool) -> range:
    """One of two runs without the parts at its ends that the mask leaves empty."""
    run = q if of_queries else kv
    size = -(-len(run) // _PARTS)
    parts = [run[at : at + size] for at in range(0, len(run), size)]
    sides = (parts, [kv] * len(parts)) if of_queries else ([q] * len(parts), parts)
    seen = [part for part, verdict in zip(parts, mask.classify(*map(regions, sides)), strict=True) if verdict != EMPTY]
    return range(seen[0].start, seen[-1].stop, run.step) if seen else range(0)


def _within(inner: range, outer: range) -> bool:
    return inner[0] in outer and inner[-1] in outer and (len(inner) == 1 or inner.step % outer.step == 0)


def _messages(blocks: Sequence[Block], runs: Sequence[range]) -> tuple[Message, ...]:
    """What has to be sent for some blocks: of each key head no row twice where rows nest or follow each other."""
    wanted: dict[int, list[range]] = defaultdict(list)
    for block in blocks:
        for head in block.kv_heads.indices():
            wanted[head].append(block.keys)
    heads_of: dict[range, list[int]] = defaultdict(list)
    for head, spans in wanted.items():
        for rows in _union(spans, runs):
            heads_of[rows].append(head)
    return tuple(Message(heads, rows) for rows, alike in heads_of.items() for heads, _ in head_ranges(tuple(sorted(alike)), 1))


def _union(spans: Sequence[range], runs: Sequence[range]) -> list[range]:
    """Few ranges that hold all of `spans`: those inside others left out, those of one step that meet joined within a run."""
    out: list[range] = []
    for run in runs:
        here = sorted({span for span in spans if span[0] in run}, key=lambda span: (span.step, span[0], -len(span)))
        kept: list[range] = []
        for span in here:
            if any(_within(span, other) for other in kept):
                continue
            if kept and kept[-1].step == span.step and span[0] in range(kept[-1].start, kept[-1][-1] + span.step + 1, span.step):
                kept[-1] = hull([kept[-1], span])
            else:
                kept.append(span)
        out += kept
    return out


def _by_message(block: Block, messages: Sequence[Message], group: int) -> Iterator[Block]:
    """A block as blocks each of whose keys are in one message."""
    left = set(block.kv_heads.indices())
    heads_of: dict[int, list[int]] = defaultdict(list)
    for head in block.heads.indices():
        heads_of[head // group].append(head)
    for message in messages:
        common = left & set(message.kv_heads.indices())
        if common and _within(block.keys, message.rows):
            left -= common
            heads = tuple(sorted(head for kv_head in common for head in heads_of[kv_head]))
            for some, kv_heads in head_ranges(heads, group):
                yield Block(some, kv_heads, block.mask, block.queries, block.keys, message)
    assert not left, f"no message holds {block.keys} of key heads {sorted(left)}"
