"""Segments and residue classes as dense problems on strided views of q, k and v.

No index tensors and no bias. segments(8) & congruent(2, 1): tokens 1 3 5 7, then 9 11 13 15, ...
are dense problems; all complete ones form one batch. The kernel applies causal(); masks that hide
other pairs are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..heads import head_groups
from ..masks import Mask, conjuncts
from ..masks.bands import Causal
from ..masks.congruent import Congruent
from ..masks.segments import Segments
from ..plans import Problem, Proposal, Refusal
from ..programs import Branch
from .batched import Batched
from .tiling import costs
from .tiling.batches import Batch
from .tiling.lattice import Lattice


@dataclass(frozen=True)
class Pieces:
    """A conjunction that splits into dense problems. segments: their length, or None."""

    segments: int | None
    congruent: Congruent | None
    causal: bool


@dataclass(frozen=True)
class Stretch:
    """Tokens of `count` segments, `stride` apart, that see only themselves.

    start: position of the first segment.
    queries, keys: positions of the queries and keys of the first segment.
    """

    count: int
    stride: int
    start: int
    queries: range
    keys: range


def propose(problem: Problem) -> list[Proposal | Refusal]:
    """One proposal or refusal per branch."""
    return [
        propose_branch(index, branch, problem)
        for index, branch in enumerate(problem.program.branches)
    ]


def propose_branch(index: int, branch: Branch, problem: Problem) -> Proposal | Refusal:
    """A proposal for all heads of a branch, or a refusal of its mask."""
    batches: list[Batch] = []
    for mask, heads, kv_heads in head_groups(branch, problem.heads, problem.kv_heads):
        pieces = _sorted(mask)
        if isinstance(pieces, str):
            return Refusal("strided", index, pieces, "Use lowering='tiled' or 'auto'")
        batches += [
            Batch(heads, kv_heads, queries, keys, causal=causal)
            for queries, keys, causal in _tilings(pieces, problem)
        ]
    return Proposal("strided", index, costs.of(batches, problem), tuple(batches))


def _sorted(mask: Mask) -> Pieces | str:
    """The role of each part of a mask, or the reason why it is refused."""
    parts = conjuncts(mask)
    lengths = [part.length for part in parts if isinstance(part, Segments)]
    congruent = [part for part in parts if isinstance(part, Congruent)]
    for part in parts:
        if not isinstance(part, (Causal, Congruent, Segments)):
            return f"{part} is not made of regular blocks"
    # 1. Nested segments are equal to the shortest ones.
    if any(length % min(lengths) for length in lengths):
        return "segments of lengths that do not divide each other do not form regular blocks"
    if len(congruent) > 1:
        return "more than one congruent in one mask"
    # 2. A residue class must be the same in every segment, or start anew with it.
    length = min(lengths, default=None)
    if congruent:
        rate, period = congruent[0].modulus, congruent[0].period
        if period != rate and period != length:
            return f"{congruent[0]!r} starts anew where no segment does"
        if period == rate and length is not None and length % rate:
            return f"{congruent[0]!r} meets every segment of {length} at another residue"
    return Pieces(length, congruent[0] if congruent else None, Causal() in parts)


def _tilings(pieces: Pieces, problem: Problem) -> Iterator[tuple[Lattice, Lattice, bool]]:
    """Queries and keys of each batch, and whether it is causal."""
    for stretch in _stretches(pieces.segments, problem):
        queries, keys = stretch.queries, stretch.keys
        if pieces.congruent is not None:
            assert isinstance(pieces.congruent.offset, int)
            rate, period = pieces.congruent.modulus, pieces.congruent.period
            first = pieces.congruent.offset + (stretch.start if period != rate else 0)
            queries, keys = _congruent(queries, first, rate), _congruent(keys, first, rate)
        for part_queries, part_keys, causal in (
            _causal(queries, keys) if pieces.causal else ((queries, keys, False),)
        ):
            if part_queries and part_keys:
                of_queries, of_keys = (
                    Lattice(tokens.start, stretch.count, stretch.stride, len(tokens), tokens.step)
                    for tokens in (part_queries, part_keys)
                )
                yield of_queries, of_keys, causal


def _stretches(length: int | None, problem: Problem) -> Iterator[Stretch]:
    """Complete segments together; segments cut by an end of queries or keys singly."""
    queries, keys = range(problem.q_offset, problem.q_offset + problem.q_len), range(problem.kv_len)
    if length is None:
        yield Stretch(1, 0, 0, queries, keys)
        return
    clipped = sorted(
        {side // length for side in (queries.start, queries.stop - 1, keys.start, keys.stop)},
    )
    segment, end = queries.start // length, -(-queries.stop // length)
    while segment < end:
        count = (
            1
            if segment in clipped
            else min([other for other in clipped if other > segment] + [end]) - segment
        )
        start = segment * length
        yield Stretch(
            count,
            length,
            start,
            _meet(queries, start, start + length),
            _meet(keys, start, start + length),
        )
        segment += count


def _meet(tokens: range, start: int, stop: int) -> range:
    return range(max(tokens.start, start), min(tokens.stop, stop))


def _congruent(tokens: range, first: int, rate: int) -> range:
    """Tokens that differ from `first` by a multiple of `rate`."""
    return range(tokens.start + (first - tokens.start) % rate, tokens.stop, rate)


def _causal(queries: range, keys: range) -> Iterator[tuple[range, range, bool]]:
    """A dense block of the keys before the first query, and a causal triangle.

    Queries and keys have equal steps and lie on one lattice. Queries before the first key see
    nothing.
    """
    queries = queries[len(range(queries.start, keys.start, queries.step)) :]
    before = keys[: len(range(keys.start, queries.start, keys.step))]
    yield queries, before, False
    yield queries, keys[len(before) :][: len(queries)], True


LOWERING = Batched("strided", propose)
