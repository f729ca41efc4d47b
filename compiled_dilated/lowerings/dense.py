"""One kernel call over all pairs, hidden ones masked by an additive log c.

Best for short sequences, and masks that allow most pairs.
"""

from __future__ import annotations

from ..heads import head_ranges
from ..masks import Mask, conjunction, conjuncts
from ..masks.bands import Causal
from ..plans import Problem, Proposal, Refusal
from .batched import Batched
from .tiling import costs
from .tiling.batches import Batch
from .tiling.lattice import Lattice

# The bias of a kernel call has q_len x kv_len entries: past so many it is not small beside
# anything.
_MOST_MASKED_PAIRS = 2**22


def propose(problem: Problem) -> list[Proposal | Refusal]:
    """All branches at once: a pair that c branches link gets log c."""
    groups: dict[tuple[Mask, ...], list[int]] = {}
    for head in range(problem.heads):
        branches = [
            branch
            for branch in problem.program.branches
            if head in branch.head_range(problem.heads)
        ]
        groups.setdefault(
            tuple(branch.mask_at(head, problem.heads) for branch in branches),
            [],
        ).append(head)
    queries = Lattice(problem.q_offset, 1, 0, problem.q_len, 1)
    keys = Lattice(0, 1, 0, problem.kv_len, 1)
    batches = []
    for masks, heads in groups.items():
        if not masks:
            continue
        causal = problem.q_offset == 0 and all(Causal() in conjuncts(mask) for mask in masks)
        hiding = _hiding(masks, causal)
        if hiding and problem.q_len * problem.kv_len > _MOST_MASKED_PAIRS:
            reason = f"a bias over {problem.q_len} x {problem.kv_len} pairs is larger than {_MOST_MASKED_PAIRS:,} entries"
            return [Refusal("dense", None, reason, "Use lowering='tiled' or 'auto'")]
        ranges = head_ranges(tuple(heads), problem.heads // problem.kv_heads)
        batches += [Batch(*of_heads, queries, keys, hiding, causal) for of_heads in ranges]
    return [Proposal("dense", None, costs.of(batches, problem), tuple(batches))]


LOWERING = Batched("dense", propose)


def _hiding(masks: tuple[Mask, ...], causal: bool) -> tuple[Mask, ...]:
    """The masks that need a bias: without causal() if the kernel applies it."""
    if causal:
        masks = tuple(
            conjunction(tuple(part for part in conjuncts(mask) if part != Causal()))
            for mask in masks
        )
    if len(masks) == 1 and not conjuncts(masks[0]):
        return ()
    return masks
