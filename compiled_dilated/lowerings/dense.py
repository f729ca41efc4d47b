"""One kernel call over all pairs, masked by an additive bias.

The bias of a pair is log c if c branches link it, -inf if none does. Best for short
sequences, and masks that allow most pairs.
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

# Entries of a bias, q_len x kv_len, beyond which its memory is no longer negligible.
_MOST_MASKED_PAIRS = 2**22


def propose(problem: Problem) -> list[Proposal | Refusal]:
    """One proposal for all branches, or a refusal."""
    queries = Lattice(problem.q_offset, 1, 0, problem.q_len, 1)
    keys = Lattice(0, 1, 0, problem.kv_len, 1)
    batches = []
    for masks, heads in _heads_by_masks(problem).items():
        if not masks:
            continue
        # The kernel's causal triangle starts at query 0 and key 0.
        causal = problem.q_offset == 0 and all(Causal() in conjuncts(mask) for mask in masks)
        bias_masks = _bias_masks(masks, causal)
        if bias_masks and problem.q_len * problem.kv_len > _MOST_MASKED_PAIRS:
            pairs = f"{problem.q_len} x {problem.kv_len} pairs"
            reason = f"a bias over {pairs} is larger than {_MOST_MASKED_PAIRS:,} entries"
            return [Refusal("dense", None, reason, "Use lowering='tiled' or 'auto'")]
        group = problem.heads // problem.kv_heads
        for query_heads, key_heads in head_ranges(tuple(heads), group):
            batches.append(Batch(query_heads, key_heads, queries, keys, bias_masks, causal))
    return [Proposal("dense", None, costs.of(batches, problem), tuple(batches))]


def _heads_by_masks(problem: Problem) -> dict[tuple[Mask, ...], list[int]]:
    """Query heads by their masks, one per branch that covers the head."""
    groups: dict[tuple[Mask, ...], list[int]] = {}
    for head in range(problem.heads):
        masks = problem.program.masks_at(head, problem.heads)
        groups.setdefault(masks, []).append(head)
    return groups


def _bias_masks(masks: tuple[Mask, ...], causal: bool) -> tuple[Mask, ...]:
    """Masks that need a bias, without causal() if the kernel applies it."""
    if causal:
        masks = tuple(_without_causal(mask) for mask in masks)
    if len(masks) == 1 and not conjuncts(masks[0]):
        return ()
    return masks


def _without_causal(mask: Mask) -> Mask:
    return conjunction(tuple(part for part in conjuncts(mask) if part != Causal()))


LOWERING = Batched("dense", propose)
