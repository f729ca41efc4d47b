"""Segments and residue classes as dense problems on strided views.

No index tensors and no bias. segments(8) & congruent(2, 1): tokens 1 3 5 7, then 9 11 13 15, ...
are dense problems; all complete ones form one batch. The kernel applies causal(); masks that hide
other pairs are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """A conjunction that splits into dense problems.

    segments: length of the segments; None without segments.
    """

    segments: int | None
    congruent: Congruent | None
    causal: bool


@dataclass(frozen=True)
class Stretch:
    """Tokens of `count` segments, `stride` apart; no pair crosses a segment's ends.

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
    """A proposal for all heads of a branch, or a refusal."""
    batches: list[Batch] = []
    for mask, heads, kv_heads in head_groups(branch, problem.heads, problem.kv_heads):
        try:
            pieces = _pieces(mask)
        except _Irregular as error:
            return Refusal("strided", index, str(error), "Use lowering='tiled' or 'auto'")
        for queries, keys, causal in _lattices(pieces, problem):
            batches.append(Batch(heads, kv_heads, queries, keys, causal=causal))
    return Proposal("strided", index, costs.of(batches, problem), tuple(batches))


class _Irregular(ValueError):
    """The reason why a mask does not split into dense problems."""


def _pieces(mask: Mask) -> Pieces:
    """The roles of a conjunction's parts.

    Raises _Irregular if a part has none.
    """
    parts = conjuncts(mask)
    for part in parts:
        if not isinstance(part, (Causal, Congruent, Segments)):
            raise _Irregular(f"{part} is not made of regular blocks")
    # 1. Nested segments are equal to the shortest ones.
    lengths = [part.length for part in parts if isinstance(part, Segments)]
    length = min(lengths, default=None)
    if length is not None and any(longer % length for longer in lengths):
        raise _Irregular(
            "segments of lengths that do not divide each other do not form regular blocks"
        )
    # 2. At most one residue class, which fits the segments.
    classes = [part for part in parts if isinstance(part, Congruent)]
    if len(classes) > 1:
        raise _Irregular("more than one congruent in one mask")
    congruent = None
    if classes:
        congruent = classes[0]
        _check_residues(congruent, length)
    return Pieces(length, congruent, Causal() in parts)


def _check_residues(congruent: Congruent, length: int | None) -> None:
    """Raise unless a residue class is regular within all segments.

    Either it is equal in all segments, or it starts anew in each.

    length: length of the segments, None without segments.
    """
    rate, period = congruent.modulus, congruent.period
    if period != rate and period != length:
        raise _Irregular(f"{congruent!r} starts anew where no segment does")
    if period == rate and length is not None and length % rate:
        raise _Irregular(f"{congruent!r} meets every segment of {length} at another residue")


def _lattices(pieces: Pieces, problem: Problem) -> Iterator[tuple[Lattice, Lattice, bool]]:
    """Queries and keys of each batch, and whether it is causal."""
    for stretch in _stretches(pieces.segments, problem):
        queries, keys = stretch.queries, stretch.keys
        # 1. Keep one residue class.
        congruent = pieces.congruent
        if congruent is not None:
            assert isinstance(congruent.offset, int)
            first, rate = congruent.offset, congruent.modulus
            if congruent.period != rate:
                # Residues are counted from the start of each segment.
                first += stretch.start
            queries, keys = _congruent(queries, first, rate), _congruent(keys, first, rate)
        # 2. Split at the diagonal.
        parts: Iterable[tuple[range, range, bool]] = ((queries, keys, False),)
        if pieces.causal:
            parts = _causal(queries, keys)
        # 3. Repeat in all segments of the stretch.
        for part_queries, part_keys, causal in parts:
            if part_queries and part_keys:
                yield _repeated(part_queries, stretch), _repeated(part_keys, stretch), causal


def _repeated(tokens: range, stretch: Stretch) -> Lattice:
    """Tokens of a stretch's first segment, repeated in all its segments."""
    return Lattice(tokens.start, stretch.count, stretch.stride, len(tokens), tokens.step)


def _stretches(length: int | None, problem: Problem) -> Iterator[Stretch]:
    """Stretches of complete segments, and single segments that are cut.

    The first or last query or key may cut a segment.

    length: length of the segments, None without segments.
    """
    queries, keys = range(problem.q_offset, problem.q_offset + problem.q_len), range(problem.kv_len)
    if length is None:
        yield Stretch(1, 0, 0, queries, keys)
        return
    ends = (queries.start, queries.stop - 1, keys.start, keys.stop)
    clipped = sorted({end // length for end in ends})
    segment, stop = queries.start // length, -(-queries.stop // length)
    while segment < stop:
        count = 1
        if segment not in clipped:
            # All segments up to the next clipped one are complete.
            count = min([clip for clip in clipped if clip > segment] + [stop]) - segment
        start = segment * length
        parts = [_between(tokens, start, start + length) for tokens in (queries, keys)]
        yield Stretch(count, length, start, *parts)
        segment += count


def _between(tokens: range, start: int, stop: int) -> range:
    """Tokens of a contiguous range in [start, stop)."""
    return range(max(tokens.start, start), min(tokens.stop, stop))


def _congruent(tokens: range, first: int, rate: int) -> range:
    """Tokens that differ from `first` by a multiple of `rate`."""
    return range(tokens.start + (first - tokens.start) % rate, tokens.stop, rate)


def _causal(queries: range, keys: range) -> Iterator[tuple[range, range, bool]]:
    """A dense block of earlier keys, and a causal triangle.

    queries, keys: ranges of equal steps on one lattice. Queries before the first key see no key
        and are in no block.
    """
    queries = queries[len(range(queries.start, keys.start, queries.step)) :]
    before = keys[: len(range(keys.start, queries.start, keys.step))]
    yield queries, before, False
    yield queries, keys[len(before) :][: len(queries)], True


LOWERING = Batched("strided", propose)
