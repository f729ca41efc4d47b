"""Blocks as problems: planned and computed on views of a rank's rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

from torch import Tensor

from .. import planner
from ..calls import Call
from ..heads import HeadRange
from ..lowerings import execute, hidden
from ..masks import Mask, causal, conjunction, conjuncts, full
from ..masks.bands import Causal, Window
from ..masks.congruent import Congruent
from ..masks.segments import Segments
from ..orders import identity
from ..partials import Saved
from ..plans import Plan, Problem, Scores
from ..programs import Branch, Program
from ..regions import FULL
from .extents import regions
from .layouts import Layout
from .moved import Moved, positions
from .steps import Block


@lru_cache(maxsize=4096)
def in_place(mask: Mask, queries: range, keys: range) -> tuple[Mask, int]:
    """A block's mask over indices from 0, and its first query's index.

    The result is as simple as possible, so that the blocks of many ranks share one plan: parts that
    allow all pairs are dropped, and periodic masks are shifted to their start.

    queries, keys: places of the order.
    """
    q, kv = regions([queries]), regions([keys])
    parts = tuple(part for part in conjuncts(mask) if part.classify(q, kv)[0] != FULL)
    if not parts:
        return full(), 0
    partial_mask = conjunction(parts)
    ahead, step = queries.start - keys.start, _common_step(queries, keys)
    if step is None:
        return _moved(partial_mask, queries, keys), 0
    # A shift by a multiple of the period changes nothing.
    period = partial_mask.period
    if not partial_mask.names and step == 1 and period is not None and keys.start % period == 0:
        return partial_mask, ahead
    # Causal masks only compare places, whatever the step.
    if all(isinstance(part, Causal) for part in parts):
        return causal(), ahead // step
    # Equal steps: count places in units of the step.
    scaled = [_in_steps(part, step, keys.start) for part in parts]
    masks = tuple(part for part in scaled if part is not None)
    if len(masks) == len(parts):
        # Segments of a multiple of the step compare units, whatever the places within them.
        if all(isinstance(part, Segments) for part in parts):
            return conjunction(masks), queries.start // step - keys.start // step
        if ahead % step == 0:
            return conjunction(masks), ahead // step
    return _moved(partial_mask, queries, keys), 0


def _common_step(queries: range, keys: range) -> int | None:
    """The step of queries and keys; None if theirs differ."""
    # A single token fits any step.
    steps = {run.step for run in (queries, keys) if len(run) > 1}
    if len(steps) > 1:
        return None
    return max(steps, default=1)


def _in_steps(mask: Mask, step: int, start: int) -> Mask | None:
    """The mask over places start, start + step, ... counted from 0.

    None if that is not a mask of the same kind.
    """
    if isinstance(mask, Causal):
        return mask
    if isinstance(mask, Window) and step % mask.dilation == 0:
        return Window(mask.left // step, mask.right // step, 1)
    if isinstance(mask, Segments) and mask.length % step == 0 and start % mask.length < step:
        return Segments(mask.length // step)
    if isinstance(mask, Congruent) and mask.period == mask.modulus:
        return _congruent_in_steps(mask, step, start)
    return None


def _congruent_in_steps(mask: Congruent, step: int, start: int) -> Mask | None:
    """The mask over indices i of positions start + step * i.

    None if no position has its residue.
    """
    shared = math.gcd(step, mask.modulus)
    modulus = mask.modulus // shared
    if not isinstance(mask.offset, int) or (mask.offset - start) % shared:
        return None
    first = (mask.offset - start) // shared * pow(step // shared, -1, modulus)
    return Congruent(modulus, first % modulus, None)


def _moved(mask: Mask, queries: range, keys: range) -> Mask:
    """The mask over indices from 0 of queries and keys."""
    order, tokens = identity(), 0
    if isinstance(mask, Moved):
        # A Moved mask of a schedule has unit steps: replace its offsets instead of nesting.
        order, tokens, mask = mask.order, mask.tokens, mask.mask
    return Moved(mask, queries.start, queries.step, keys.start, keys.step, order, tokens)


def plan_of(
    block: Block,
    batch: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    device: str,
    scores: Scores | None,
) -> Plan:
    """The plan of a block."""
    mask, q_offset = in_place(block.mask, block.queries, block.keys)
    # training=True in a forward too: a plan for a single query cannot merge into a partial result.
    problem = Problem(
        Program((Branch(mask),)), batch, block.heads.count, block.kv_heads.count,
        len(block.queries), len(block.keys), head_dim, value_dim, dtype, device, q_offset,
        training=True, scores=scores, partial=True,
    )  # fmt: skip
    return planner.plan_for(problem)


def rows(runs: tuple[range, ...], places: range) -> slice:
    """Slice of a rank's memory with some places of one run."""
    before = 0
    for run in runs:
        if places[0] in run:
            # Earlier runs come first in memory; places may skip rows of their run.
            first, step = before + run.index(places[0]), max(1, places.step // run.step)
            return slice(first, first + (len(places) - 1) * step + 1, step)
        before += len(run)
    raise AssertionError(f"{places} is in none of {runs}")


def view(x: Tensor, heads: HeadRange, at: slice) -> Tensor:
    """View of rows of some heads of x (B, H, rows, ...)."""
    return heads.of(x)[:, :, at]


def _call(block: Block, layout: Layout, call: Call, plan: Plan) -> Call:
    """The call of a block: queries, keys and heads counted from 0."""
    mod = call.score_mod
    if mod is not None:
        mod = replace(mod, places=partial(_places, block, layout, plan.problem.q_offset))
    return replace(call, q_offset=plan.problem.q_offset, score_mod=mod)


def _places(
    block: Block, layout: Layout, q_offset: int, b: Tensor, h: Tensor, q: Tensor, kv: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the complete sequence for those of a block."""

    def in_sequence(index: Tensor, run: range) -> Any:
        return positions(index * run.step + run.start, layout.order, layout.tokens)

    heads = h * block.heads.step + block.heads.start
    return b, heads, in_sequence(q - q_offset, block.queries), in_sequence(kv, block.keys)


class Keys:
    """K and V of a rank's own rows, or of a message.

    runs: places of the rows, in memory order.
    kv_heads: the heads of k and v.
    """

    def __init__(self, runs: tuple[range, ...], kv_heads: HeadRange, k: Tensor, v: Tensor) -> None:
        self.runs, self.kv_heads, self.k, self.v = runs, kv_heads, k, v

    def of(self, block: Block) -> tuple[Tensor, Tensor]:
        """The keys and values of a block."""
        return self.view(block, self.k), self.view(block, self.v)

    @cached_property
    def is_finite(self) -> bool:
        """Whether all values are finite; computed once for all blocks."""
        return hidden.is_finite(self.k) and hidden.is_finite(self.v)

    def bad_of(self, block: Block) -> hidden.Bad | None:
        """The non-finite keys and values of a block, if any."""
        if self.is_finite:
            return None
        return hidden.Bad.of(*self.of(block))

    def view(self, block: Block, x: Tensor) -> Tensor:
        """A block's part of x, a tensor shaped as k or v."""
        # The block's heads as indices among the heads present here.
        heads, present = block.kv_heads, self.kv_heads
        step = max(1, heads.step // present.step)
        local = HeadRange((heads.start - present.start) // present.step, step, heads.count)
        return view(x, local, rows(self.runs, block.keys))


@dataclass(frozen=True)
class Queries:
    """A rank's query rows and their results, (B, Hq, rows, ...).

    grad_out, grad_lse, grad_q: present only in a backward.
    """

    runs: tuple[range, ...]
    q: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None
    grad_q: Tensor | None = None

    def of(self, block: Block) -> Queries:
        """The rows of a block, as views."""
        at = rows(self.runs, block.queries)

        def part(x: Tensor) -> Tensor:
            return view(x, block.heads, at)

        def part_of_grad(x: Tensor | None) -> Tensor | None:
            # Absent in a forward.
            return None if x is None else part(x)

        return Queries(
            (block.queries,),
            part(self.q),
            part(self.out),
            part(self.lse),
            part_of_grad(self.grad_out),
            part_of_grad(self.grad_lse),
            part_of_grad(self.grad_q),
        )


def forward(block: Block, layout: Layout, call: Call, queries: Queries, keys: Keys) -> None:
    """Merge a block into a rank's out and lse."""
    part, (k, v) = queries.of(block), keys.of(block)
    plan = _plan(block, call, part.q, v)
    local = _call(block, layout, call, plan)
    bad = None
    if not execute.keeps_hidden_out(plan):
        bad = keys.bad_of(block)
    if bad is None:
        execute.merge_into(plan, local, part.q, k, v, part.out, part.lse)
        return
    # A merge cannot be repeated: clean the keys first, then mark the rows that see bad ones.
    execute.merge_into(plan, local, part.q, bad.k, bad.v, part.out, part.lse)
    hidden.spoil(partial(_alone, plan), local, part.q, bad, part.out, part.lse)


def _alone(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Result of a block without the rank's other blocks."""
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full(q.shape[:3], -math.inf)
    execute.merge_into(plan, call, q, k, v, out, lse)
    return out, lse


def backward(
    block: Block,
    layout: Layout,
    call: Call,
    queries: Queries,
    keys: Keys,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Add a block's gradients to the rank's grad_q, grad_k and grad_v.

    grad_k, grad_v: shaped as the keys and values.
    """
    part, (k, v) = queries.of(block), keys.of(block)
    assert part.grad_out is not None
    assert part.grad_q is not None
    plan = _plan(block, call, part.q, v)
    # With the merged out and lse the backward gives the block's share of the joint gradient.
    saved = Saved(part.q, k, v, part.out, part.lse, part.grad_out, part.grad_lse)
    totals = (part.grad_q, keys.view(block, grad_k), keys.view(block, grad_v))
    grads = execute.backward(plan, _call(block, layout, call, plan), saved)
    for total, grad in zip(totals, grads, strict=True):
        total.add_(grad)


def _plan(block: Block, call: Call, q: Tensor, v: Tensor) -> Plan:
    """The plan of a block, for the shapes of its tensors."""
    dtype, scores = str(q.dtype).removeprefix("torch."), Scores.of(call.score_mod)
    return plan_of(block, q.shape[0], q.shape[3], v.shape[3], dtype, q.device.type, scores)
