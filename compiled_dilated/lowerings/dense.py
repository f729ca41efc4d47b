"""One kernel call over all pairs, hidden ones masked by an additive log c.

Best for short sequences and masks that allow most pairs.
"""

from __future__ import annotations

from ..masks import Mask, conjuncts
from ..masks.positions import Causal
from ..plans import Problem, Proposal, Refusal
from . import costs
from .batches import Batch, head_ranges
from .lattice import Lattice

# The bias of one group of heads is q_len x kv_len: past this many pairs it is no longer small beside anything.
_MOST_MASKED_PAIRS = 2**22


def propose(problem: Problem) -> Proposal | Refusal:
    """All branches at once: a pair that c branches link gets log c."""
    groups: dict[tuple[Mask, ...], list[int]] = {}
    for head in range(problem.heads):
        branches = [branch for branch in problem.program.branches if head in branch.head_range(problem.heads)]
        groups.setdefault(tuple(branch.mask_at(head, problem.heads) for branch in branches), []).append(head)
    queries = Lattice(problem.q_offset, ((1, 0),), ((problem.q_len, 1),))
    keys = Lattice(0, ((1, 0),), ((problem.kv_len, 1),))
    batches = []
    for masks, heads in groups.items():
        if not masks:
            continue
        everything = len(masks) == 1 and not conjuncts(masks[0])
        triangle = len(masks) == 1 and problem.q_offset == 0 and conjuncts(masks[0]) == (Causal(),)
        if not (everything or triangle) and problem.q_len * problem.kv_len > _MOST_MASKED_PAIRS:
            return Refusal(
                "dense",
                None,
                f"a bias over {problem.q_len} x {problem.kv_len} pairs is larger than {_MOST_MASKED_PAIRS:,} entries",
                "Use lowering='tiled' or 'auto'",
            )
        for head_range, kv_range in head_ranges(tuple(heads), problem.heads // problem.kv_heads):
            hidden = () if everything or triangle else masks
            batches.append(Batch(head_range, kv_range, queries, keys, hidden, causal=triangle, shared=True, first=True))
    batches = costs.keep_biases(batches, problem)
    return Proposal("dense", None, costs.of(batches, problem), tuple(batches))
