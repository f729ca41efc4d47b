"""One kernel call over all pairs, hidden ones masked by an additive log c.

Best for short sequences and masks that allow most pairs.
"""

from __future__ import annotations

from dataclasses import replace

from ..heads import HeadRange, head_ranges
from ..masks import Mask, conjunction, conjuncts
from ..masks.positions import Causal
from ..plans import Problem, Proposal, Refusal
from . import costs
from .batches import Batch, as_one
from .lattice import Lattice

# The bias of one kernel call is q_len x kv_len for each group of heads: past so many pairs it is not small beside anything.
_MOST_MASKED_PAIRS = 2**22


def propose(problem: Problem) -> Proposal | Refusal:
    """All branches at once: a pair that c branches link gets log c."""
    groups: dict[tuple[Mask, ...], list[int]] = {}
    for head in range(problem.heads):
        branches = [branch for branch in problem.program.branches if head in branch.head_range(problem.heads)]
        groups.setdefault(tuple(branch.mask_at(head, problem.heads) for branch in branches), []).append(head)
    batches = []
    for masks, heads in groups.items():
        if not masks:
            continue
        causal = problem.q_offset == 0 and all(Causal() in conjuncts(mask) for mask in masks)
        hidden = _hidden(masks, causal)
        if hidden and problem.q_len * problem.kv_len > _MOST_MASKED_PAIRS:
            return Refusal(
                "dense",
                None,
                f"a bias over {problem.q_len} x {problem.kv_len} pairs is larger than {_MOST_MASKED_PAIRS:,} entries",
                "Use lowering='tiled' or 'auto'",
            )
        batches += [
            _batch(problem, *ranges, hidden, causal) for ranges in head_ranges(tuple(heads), problem.heads // problem.kv_heads)
        ]
    batches = costs.keep_biases(_as_one(batches, problem), problem)
    return Proposal("dense", None, costs.of(batches, problem), tuple(batches))


def _hidden(masks: tuple[Mask, ...], causal: bool) -> tuple[Mask, ...]:
    """The masks that a bias has to speak for: all but causal(), where the kernel leaves later keys out by itself."""
    if causal:
        masks = tuple(conjunction(tuple(part for part in conjuncts(mask) if part != Causal())) for mask in masks)
    return () if len(masks) == 1 and not conjuncts(masks[0]) else masks


def _batch(problem: Problem, heads: HeadRange, kv_heads: HeadRange, masks: tuple[Mask, ...], causal: bool) -> Batch:
    queries = Lattice(problem.q_offset, ((1, 0),), ((problem.q_len, 1),))
    keys = Lattice(0, ((1, 0),), ((problem.kv_len, 1),))
    return Batch(heads, kv_heads, queries, keys, masks, causal=causal, shared=True, first=True)


def _as_one(batches: list[Batch], problem: Problem) -> list[Batch]:
    """One batch for all heads, where the same branches say other things to heads that stand evenly apart."""
    branches = problem.program.branches
    alike = {(each.heads.step, each.heads.count, each.kv_heads.step, each.kv_heads.count, each.causal) for each in batches}
    partial = any(branch.head_range(problem.heads) != range(problem.heads) for branch in branches)
    if problem.batch > 1 or problem.scores or partial or len(batches) < 2 or len(alike) > 1:
        return batches
    one, *others = as_one(batches)
    if others or one.bias.lasting_entries > _MOST_MASKED_PAIRS:
        return batches
    return [replace(one, masks=_hidden(tuple(branch.mask.for_heads(problem.heads) for branch in branches), one.causal))]
