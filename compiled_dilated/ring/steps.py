"""Steps of a rank: blocks, and the messages with their keys.

blocks over keys of one source         messages
#####        key head 0                #########    key heads 0 and 1: rows that touch or nest
    #####    key head 0                             are joined, and equal rows of several heads
#########    key head 1                             travel together
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..heads import HeadRange, head_ranges
from ..masks import Mask
from ..masks.ranges import hull


@dataclass(frozen=True)
class Message:
    """Rows of K and V for some key heads.

    rows: places of the order, within one run of the sender.
    """

    kv_heads: HeadRange
    rows: range


@dataclass(frozen=True)
class Block:
    """One run of queries and of keys under a mask.

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


def with_messages(source: int, runs: Sequence[range], blocks: Sequence[Block], group: int) -> Step:
    """The step of some blocks, with the messages of their keys.

    runs: runs of the source.
    group: query heads per key head.
    """
    messages = _messages(blocks, runs)
    parts: list[Block] = []
    for block in blocks:
        parts += _by_message(block, messages, group)
    return Step(source, messages, tuple(parts))


def _messages(blocks: Sequence[Block], runs: Sequence[range]) -> tuple[Message, ...]:
    """Messages for some blocks, without duplicate rows per key head."""
    # 1. The keys that each key head needs.
    spans_of: dict[int, list[range]] = defaultdict(list)
    for block in blocks:
        for head in block.kv_heads.indices():
            spans_of[head].append(block.keys)
    # 2. Few rows that contain them, and the heads with equal rows.
    heads_of: dict[range, list[int]] = defaultdict(list)
    for head, spans in spans_of.items():
        for rows in _union(spans, runs):
            heads_of[rows].append(head)
    # 3. One message per range of heads.
    out = []
    for rows, kv_heads in heads_of.items():
        for heads, _ in head_ranges(tuple(sorted(kv_heads)), 1):
            out.append(Message(heads, rows))
    return tuple(out)


def _union(spans: Sequence[range], runs: Sequence[range]) -> list[range]:
    """Few ranges that contain all of `spans`, each within a run."""
    out: list[range] = []
    for run in runs:
        spans_of_run = {span for span in spans if span[0] in run}
        out += _joined(sorted(spans_of_run, key=lambda span: (span.step, span[0], -len(span))))
    return out


def _joined(spans: Sequence[range]) -> list[range]:
    """Ranges without nested ones; those of equal step that touch are joined.

    spans: sorted by step and start, the longest first.
    """
    out: list[range] = []
    for span in spans:
        if any(_within(span, outer) for outer in out):
            continue
        if out and _touches(out[-1], span):
            out[-1] = hull([out[-1], span])
        else:
            out.append(span)
    return out


def _touches(before: range, span: range) -> bool:
    """Whether a range of equal step overlaps or continues another."""
    if before.step != span.step:
        return False
    return span[0] in range(before.start, before[-1] + span.step + 1, span.step)


def _within(inner: range, outer: range) -> bool:
    """Whether one range is a part of another."""
    if inner[0] not in outer or inner[-1] not in outer:
        return False
    return len(inner) == 1 or inner.step % outer.step == 0


def _by_message(block: Block, messages: Sequence[Message], group: int) -> Iterator[Block]:
    """Split a block into parts with keys of one message each."""
    remaining = set(block.kv_heads.indices())
    heads_of: dict[int, list[int]] = defaultdict(list)
    for head in block.heads.indices():
        heads_of[head // group].append(head)
    for message in messages:
        common = remaining & set(message.kv_heads.indices())
        if common and _within(block.keys, message.rows):
            remaining -= common
            # The query heads that read these key heads.
            heads: list[int] = []
            for kv_head in common:
                heads += heads_of[kv_head]
            for query_heads, kv_heads in head_ranges(tuple(sorted(heads)), group):
                yield Block(query_heads, kv_heads, block.mask, block.queries, block.keys, message)
    assert not remaining, f"no message holds {block.keys} of key heads {sorted(remaining)}"
