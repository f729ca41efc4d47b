"""FlexAttention under torch.compile, over narrow analytic block masks.

One fused kernel for any program. A pair is visible if any branch links it; if c > 1 branches do,
log c is added to its score. On a CPU, torch has neither a backward nor a log-sum-exp for it.

    linked: the mask of all branches -> running: kernels, forward and backward
"""

from __future__ import annotations

from ... import counting
from ...masks import Mask
from ...orders import Order, identity
from ...plans import Cost, Problem, Proposal, Refusal
from ...tiles import TileMap, split
from ..devices import constants
from ..fused import Fused
from .linked import TILE, Linked, Work
from .running import MOST_OFFSET, backward, forward, gives_lse

__all__ = ["LOWERING", "gives_lse", "propose"]

# Head widths that torch's Triton kernels take: products of tl.dot, and what fits 227 KiB of shared
# memory.
_NARROWEST, _WIDEST, _WIDEST_FLOAT32 = 16, 256, 128

_ALTERNATIVES = "Use lowering='auto', 'strided' or 'tiled'"


def propose(problem: Problem) -> Proposal | Refusal:
    """The whole program as one kernel."""
    refusal = _refusal(problem)
    if refusal is not None:
        return refusal
    branches = problem.program.branches
    # Branches in different orders are computed in the original order.
    order = identity()
    if len(branches) == 1:
        order = branches[0].order
    linked = Linked(problem.program, problem.heads)
    # Heads with equal masks have equally many tiles: count them once.
    listed: dict[Mask, int] = {}
    tiles = 0
    for head in range(problem.heads):
        mask = linked.at_head(head, problem.heads)
        if mask not in listed:
            listed[mask] = _listed_tiles(mask, order, problem)
        tiles += listed[mask]
    if problem.device == "cpu" and len(listed) == 1:
        (mask,) = listed
        if len(split(_tile_map(mask, order, problem))) > 1:
            reason = (
                "the mask takes several block masks, "
                "and torch gives no lse on a CPU to merge them by"
            )
            return Refusal("flex", None, reason, "Use lowering='auto'")
    cost = _cost(problem, tiles * TILE**2 * problem.batch, order)
    return Proposal("flex", None, cost, (Work(linked, order),))


def _refusal(problem: Problem) -> Refusal | None:
    """The refusal of a problem whatever its mask, or None."""
    if problem.device == "cpu" and problem.training:
        reason = "torch has no backward of FlexAttention on a CPU"
        return Refusal("flex", None, reason, f"{_ALTERNATIVES} to train")
    if problem.partial:
        # The backward of a part needs the lse of the complete softmax.
        reason = "its backward takes no lse but its own"
        return Refusal("flex", None, reason, _ALTERNATIVES)
    if problem.dtype == "float64":
        reason = "FlexAttention does not compute in float64"
        return Refusal("flex", None, reason, "Use another dtype or lowering")
    if problem.device != "cpu":
        unfit = _unfit_for_triton(problem)
        if unfit is not None:
            return Refusal("flex", None, unfit, _ALTERNATIVES)
    return None


def _unfit_for_triton(problem: Problem) -> str | None:
    """Reason why Triton's kernels refuse widths or lengths, or None."""
    narrowest, widest = sorted((problem.head_dim, problem.value_dim))
    if narrowest < _NARROWEST:
        least = f"heads of at least {_NARROWEST} numbers on a GPU"
        return f"FlexAttention takes {least}; got {narrowest}"
    most = _WIDEST
    if problem.itemsize >= 4:
        most = _WIDEST_FLOAT32
    if widest > most:
        block = f"a block of {problem.dtype} heads of {widest} numbers"
        return f"{block} exceeds shared memory; at most {most} fit"
    if max(problem.q_len, problem.kv_len) * widest > MOST_OFFSET:
        return "Triton's kernels address a head in 32 bits, and this one has more elements"
    return None


def _listed_tiles(mask: Mask, order: Order, problem: Problem) -> int:
    """Number of tiles that the block mask of a head lists."""
    counts = counting.tiles(mask, problem.q_len, problem.kv_len, TILE, order, problem.q_offset)
    if counts is None:
        return len(_tile_map(mask, order, problem).indices)
    return counts.full + counts.partial


def _tile_map(mask: Mask, order: Order, problem: Problem) -> TileMap:
    return TileMap.build(
        mask, problem.q_len, problem.kv_len,
        q_tile=TILE, kv_tile=TILE, order=order, q_offset=problem.q_offset,
    )  # fmt: skip


def _cost(problem: Problem, pairs: int, order: Order) -> Cost:
    """Cost of computing these pairs.

    Any order but the identity copies q, k, v and out.
    """
    device = constants(problem.device)
    flops = pairs * 2 * (problem.head_dim + problem.value_dim)
    rate, launch, copied = device.flex, device.flops_per_call, 0
    if problem.itemsize >= 4:
        rate = device.flex_float32
    if problem.device == "cpu":
        launch = 0.0
    if order != identity():
        copied = problem.tensor_bytes
    return Cost(
        pairs=pairs,
        kernel_flops=flops,
        copied_bytes=copied,
        calls=1,
        peak_bytes=copied,
        dense_flops=flops / rate + launch,
    )


LOWERING = Fused("flex", propose, forward, backward)
