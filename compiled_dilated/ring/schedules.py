"""Schedules: the blocks that each rank computes and the messages it sends. Pure data.

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

# A run is classified in this many parts, to cut off empty parts at its ends.
_PARTS = 16
# Ranges of at most this many ranks are not bisected further.
_FEW_RANKS = 8
# `Schedule.summary` uses periodicity for at most this many phases.
_MOST_PHASES = 4096


@dataclass(frozen=True)
class Message:
    """Rows of some key heads (K and V), within one run of the sender.

    rows: places of the order.
    """

    kv_heads: HeadRange
    rows: range


@dataclass(frozen=True)
class Block:
    """Queries of one run and keys of one run under one mask, for some heads.

    message: the message that contains the keys; None for the rank's own keys.
    """

    heads: HeadRange
    kv_heads: HeadRange
    mask: Mask
    queries: range
    keys: range
    message: Message | None = None


@dataclass(frozen=True)
class Step:
    """Messages and blocks of a rank for the keys of one source."""

    source: int
    messages: tuple[Message, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Summary:
    """Per rank: numbers of steps, of received messages, and of received rows per key head."""

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
        """Disjoint masks over places, with the query and key heads that they apply to.

        A pair that several branches allow is in one mask per branch.
        """
        order, out = self.layout.order, []
        for branch in self.program.branches:
            for mask, heads, kv_heads in head_groups(branch, self.heads, self.kv_heads):
                for part in disjoint(mask):
                    there = (
                        part
                        if order == identity()
                        else Moved(part, 0, 1, 0, 1, order, self.layout.tokens)
                    )
                    out.append((there, heads, kv_heads))
        return tuple(out)

    def steps(self, rank: int) -> Iterator[Step]:
        """Steps of a rank: its own keys, then those of the ranks before it around the ring."""
        for source in self.sources(rank):
            step = self.step(rank, source)
            if step is not None:
                yield step

    def sources(self, rank: int) -> list[int]:
        """Ranks whose keys a rank may need, in the order of its steps."""
        return sorted(
            self._met(rank, by_keys=False),
            key=lambda source: self.distance(rank, source),
        )

    def targets(self, rank: int) -> list[int]:
        """Other ranks that may need a rank's keys, by distance around the ring."""
        return sorted(
            self._met(rank, by_keys=True) - {rank},
            key=lambda target: self.distance(target, rank),
        )

    def distance(self, rank: int, source: int) -> int:
        """Distance around the ring from a source to a rank."""
        return (rank - source) % self.layout.ranks

    def _met(self, rank: int, by_keys: bool) -> set[int]:
        """Ranks whose keys a rank's queries may need.

        by_keys: ranks whose queries may need this rank's keys instead.
        """
        everything = range(self.layout.tokens)
        met: set[int] = set()
        for mask, _, _ in self.groups:
            for run in self.layout.runs(rank):
                q, kv = mask.shrink(*_pair(run, everything, by_keys))
                if q and kv:
                    own, others = (kv, q) if by_keys else (q, kv)
                    met.update(self._owners(mask, own, others, by_keys))
        return met

    def _owners(self, mask: Mask, own: range, others: range, by_keys: bool) -> Iterator[int]:
        """Owners of `others` for which the mask leaves some pairs.

        Contiguous layouts are bisected: a range of ranks without pairs is dropped at once.
        """
        owners = self.layout.owners(others)
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
            if _verdict(mask, *_pair(own, span, by_keys)) != EMPTY:
                middle = (first + last) // 2
                todo += [(first, middle), (middle, last)]

    def step(self, rank: int, source: int) -> Step | None:
        """Step of `rank` for the keys of `source`; None without blocks."""
        return _step(self, rank, source)

    def summary(self) -> Summary:
        """Steps, messages and rows of every rank, for any number of ranks.

        Ranks in the same phase of the masks' periods, and away from both ends of the sequence, have
        equal steps up to a shift: one of them is counted.
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
        steps = list(self.steps(rank))
        messages = [message for step in steps for message in step.messages]
        rows = sum(message.kv_heads.count * len(message.rows) for message in messages)
        return np.array([len(steps), len(messages), rows])

    def _equal_ranks(self) -> Iterator[tuple[int, IntArray]]:
        """A rank, and all ranks whose steps equal its steps up to a shift."""
        layout, periods = self.layout, [mask.period for mask, _, _ in self.groups]
        finite = [period for period in periods if period is not None]
        if (
            not isinstance(layout, Contiguous)
            or layout.tokens % layout.ranks
            or len(finite) < len(periods)
        ):
            return
        size = layout.tokens // layout.ranks
        period = math.lcm(*finite)
        phases = period // math.gcd(size, period)
        for phase in range(min(phases, layout.ranks) if phases <= _MOST_PHASES else 0):
            middle = (layout.ranks // 2) // phases * phases + phase
            sources = self.sources(middle) if middle < layout.ranks else []
            if not sources:
                continue
            first, last = min(sources) - middle, max(sources) - middle
            # At the ends of the sequence a mask may be cut, which breaks the shift.
            if middle + first > 0 and middle + last < layout.ranks - 1:
                equal = np.arange(phase, layout.ranks, phases)
                yield middle, equal[(equal + first >= 0) & (equal + last < layout.ranks)]

    def _blocks(self, rank: int, source: int) -> Iterator[Block]:
        for mask, heads, kv_heads in self.groups:
            period = mask.period
            for queries, keys in itertools.product(
                _cut(self.layout.runs(rank), period),
                _cut(self.layout.runs(source), period),
            ):
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
    return Step(
        source,
        messages,
        tuple(part for block in blocks for part in _by_message(block, messages, group)),
    )


def _cut(runs: Sequence[range], period: int | None) -> Iterator[range]:
    """Cut runs at the first multiple of a mask's period.

    Tokens before it are in one period; after it the mask repeats.
    """
    for run in runs:
        start = run.start if period is None else -(-run.start // period) * period
        at = -(-(start - run.start) // run.step)
        yield from (part for part in (run[:at], run[at:]) if part)


def _needed(mask: Mask, queries: range, keys: range) -> tuple[range, range]:
    """The narrowest queries and keys that contain all allowed pairs; both empty if none."""
    q, kv = mask.shrink(queries, keys)
    if not q or not kv:
        return NOTHING
    verdict = _verdict(mask, q, kv)
    if verdict == PARTIAL:
        kv = _trimmed(mask, q, kv, of_queries=False)
        q = _trimmed(mask, q, kv, of_queries=True) if kv else kv
    if verdict == EMPTY or not q or not kv:
        return NOTHING
    return (q, kv)


def _pair(own: range, others: range, by_keys: bool) -> tuple[range, range]:
    """(queries, keys): `own` are the keys if `by_keys`, else the queries."""
    if by_keys:
        return (others, own)
    return (own, others)


def _verdict(mask: Mask, q: range, kv: range) -> int:
    return int(mask.classify(regions([q]), regions([kv]))[0])


def regions(runs: Sequence[range]) -> Regions:
    """Runs as regions."""
    columns = np.array([[run.start, len(run), run.step] for run in runs], dtype=np.int64).T
    return Regions.strided(*columns)


def _trimmed(mask: Mask, q: range, kv: range, of_queries: bool) -> range:
    """The queries (or the keys) without parts at the ends that the mask leaves empty."""
    run = q if of_queries else kv
    size = -(-len(run) // _PARTS)
    parts = [run[at : at + size] for at in range(0, len(run), size)]
    sides = (parts, [kv] * len(parts)) if of_queries else ([q] * len(parts), parts)
    visible = [
        part
        for part, verdict in zip(parts, mask.classify(*map(regions, sides)), strict=True)
        if verdict != EMPTY
    ]
    if visible:
        return range(visible[0].start, visible[-1].stop, run.step)
    return range(0)


def _within(inner: range, outer: range) -> bool:
    return (
        inner[0] in outer
        and inner[-1] in outer
        and (len(inner) == 1 or inner.step % outer.step == 0)
    )


def _messages(blocks: Sequence[Block], runs: Sequence[range]) -> tuple[Message, ...]:
    """Messages for some blocks, without duplicate rows per key head.

    Rows that nest, or that continue each other, are sent once.
    """
    rows_of: dict[int, list[range]] = defaultdict(list)
    for block in blocks:
        for head in block.kv_heads.indices():
            rows_of[head].append(block.keys)
    heads_of: dict[range, list[int]] = defaultdict(list)
    for head, spans in rows_of.items():
        for rows in _union(spans, runs):
            heads_of[rows].append(head)
    return tuple(
        Message(heads, rows)
        for rows, same in heads_of.items()
        for heads, _ in head_ranges(tuple(sorted(same)), 1)
    )


def _union(spans: Sequence[range], runs: Sequence[range]) -> list[range]:
    """Few ranges that contain all of `spans`.

    Nested ranges are dropped; ranges of equal step that touch are joined within a run.
    """
    out: list[range] = []
    for run in runs:
        here = sorted(
            {span for span in spans if span[0] in run},
            key=lambda span: (span.step, span[0], -len(span)),
        )
        merged: list[range] = []
        for span in here:
            if any(_within(span, other) for other in merged):
                continue
            if (
                merged
                and merged[-1].step == span.step
                and span[0] in range(merged[-1].start, merged[-1][-1] + span.step + 1, span.step)
            ):
                merged[-1] = hull([merged[-1], span])
            else:
                merged.append(span)
        out += merged
    return out


def _by_message(block: Block, messages: Sequence[Message], group: int) -> Iterator[Block]:
    """Split a block so that the keys of each part are in one message."""
    remaining = set(block.kv_heads.indices())
    heads_of: dict[int, list[int]] = defaultdict(list)
    for head in block.heads.indices():
        heads_of[head // group].append(head)
    for message in messages:
        common = remaining & set(message.kv_heads.indices())
        if common and _within(block.keys, message.rows):
            remaining -= common
            heads = tuple(sorted(head for kv_head in common for head in heads_of[kv_head]))
            for query_heads, kv_heads in head_ranges(heads, group):
                yield Block(query_heads, kv_heads, block.mask, block.queries, block.keys, message)
    assert not remaining, f"no message holds {block.keys} of key heads {sorted(remaining)}"
