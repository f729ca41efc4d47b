"""Run the batches of a plan: forward into (out, lse), backward from them. The working set stays within the plan's budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..calls import Call
from ..partials import Saved, empty_out, is_by_token, lse_dtype
from ..plans import Plan, Problem
from . import batches as running
from . import costs, flex, hidden, native, single
from .batches import Batch, Grads, Scratch
from .workspace import Workspace


def merge_into(plan: Plan, call: Call, workspace: Workspace, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge a part of a larger softmax into out (B, Hq, N, Dv) and lse (B, Hq, N), which are (0, -inf) where nothing was seen."""
    if plan.lowering == "native":
        native.merge_into(plan.chosen[0].work[0], call, q, k, v, out, lse)
        return
    scratch = Scratch(workspace)
    for batch in _work(plan):
        for piece in _pieces(replace(batch, first=False), plan.problem, backward=False):
            running.forward(piece, call, scratch, q, k, v, out, lse)


def forward(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) in the dtype of q and lse (B, Hq, N)."""
    if not computes_hidden_pairs(plan):
        return _forward(plan, call, q, k, v)
    return hidden.forward(partial(_forward, plan), call, q, k, v)


def computes_hidden_pairs(plan: Plan) -> bool:
    """Whether a kernel call computes pairs that the program does not allow, with weight 0."""
    if plan.lowering == "flex":
        return True
    if plan.lowering == "native":  # which sees to them itself
        return False
    if _is_single(plan):
        return any(group.rest is not None for group in plan.chosen[0].work)
    return any(batch.masks or batch.causal for batch in _work(plan))


def _is_single(plan: Plan) -> bool:
    return bool(plan.chosen and plan.chosen[0].work and isinstance(plan.chosen[0].work[0], single.Group))


def _forward(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if plan.lowering == "native":
        return native.forward(plan.chosen[0].work[0], call, q, k, v)
    if plan.lowering == "flex":
        return flex.forward(plan.chosen[0].work[0], plan.problem, call, q, k, v)
    if _is_single(plan):
        return single.forward(plan.chosen[0].work, call, q, k, v)
    work, problem, scratch = _work(plan), plan.problem, Scratch()
    if work and work[0].is_whole(problem):
        out, lse = running.whole(work.pop(0), call, scratch, q, k, v)
    else:
        out, lse = empty_out(q, v, is_by_token(q)), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
        if sum(batch.rows for batch in work if batch.first) < problem.heads * problem.q_len:
            # Some rows are merged into before anything is written, or not at all.
            out.zero_()
            lse.fill_(-math.inf)
    for batch in work:
        for piece in _pieces(batch, problem, backward=False):
            running.forward(piece, call, scratch, q, k, v, out, lse)
    return out, lse


def backward(plan: Plan, call: Call, saved: Saved, workspace: Workspace | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype; those of a score_mod's operands are added to its sums."""
    scratch = Scratch() if workspace is None else Scratch(workspace)
    # Rows that see nothing: with lse = +inf every weight is exp(-inf) = 0, so they send no gradient and make no NaN.
    dead = saved.lse == -math.inf
    grad_lse = None if saved.grad_lse is None else saved.grad_lse.masked_fill(dead, 0.0)
    saved = replace(saved, lse=saved.lse.masked_fill(dead, math.inf), grad_lse=grad_lse)
    if plan.lowering != "native" and not computes_hidden_pairs(plan):
        return _backward(plan, scratch, call, saved)
    return hidden.backward(partial(_backward, plan, scratch), call, saved)


def _backward(plan: Plan, scratch: Scratch, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    if plan.lowering == "native":
        return native.backward(plan.chosen[0].work[0], call, saved)
    if plan.lowering == "flex":
        return flex.backward(plan.chosen[0].work[0], plan.problem, call, saved)
    work, problem = _work(plan), plan.problem
    if work and work[0].is_whole(problem):
        grad_q, grad_k, grad_v = running.whole_backward(work.pop(0), call, scratch, saved)
    else:
        inputs = (saved.q, saved.k, saved.v)
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    for batch in work:
        # Tiles that share keys add to the same gradients: in low precision, in float32 first.
        summed = saved.q.element_size() < 4 and batch.overlaps
        for piece in _summed_pieces(batch, problem) if summed else _pieces(batch, problem, backward=True):
            into = Grads(piece.of_queries(grad_q), piece.of_keys(grad_k), piece.of_keys(grad_v))
            with _Sums(piece, into) if summed else contextlib.nullcontext(into) as sums:
                running.backward(piece, call, scratch, saved, sums)
            del sums  # before the next piece's are made
    return grad_q, grad_k, grad_v


def _work(plan: Plan) -> list[Batch]:
    return [batch for proposal in plan.chosen for batch in proposal.work]


def _pieces(batch: Batch, problem: Problem, backward: bool) -> Iterator[Batch]:
    """The batch in pieces that fit the budget; one key head at a time where a tile for all heads does not fit."""
    for part in batch.by_kv_head() if costs.exceeds(batch, problem, backward) else (batch,):
        yield from part.split(costs.tiles_at_once(part, problem, backward))


def _summed_pieces(batch: Batch, problem: Problem) -> Iterator[Batch]:
    """Pieces of a backward whose float32 sums fit the budget too: one key head at a time, then fewer tiles."""
    if not all(_sums_fit(piece, problem) for piece in _pieces(batch, problem, backward=True)):
        for part in batch.by_kv_head():
            for piece in _pieces(part, problem, backward=True):
                yield from _halves(piece, problem)
        return
    yield from _pieces(batch, problem, backward=True)


def _halves(piece: Batch, problem: Problem) -> Iterator[Batch]:
    if piece.queries.count == 1 or _sums_fit(piece, problem):
        yield piece
        return
    for half in piece.split(piece.queries.count // 2):
        yield from _halves(half, problem)


def _sums_fit(piece: Batch, problem: Problem) -> bool:
    """Whether float32 sums over the keys of a piece fit the budget, twice: adding them to what is there converts that."""
    keys = piece.keys.last - piece.keys.start + 1
    sums = keys * piece.kv_heads.count * problem.batch * (problem.head_dim + problem.value_dim) * 4
    return 2 * sums <= costs.budget(problem, backward=True)


class _Sums:
    """float32 sums of grad_k and grad_v over the keys of one piece, rounded once into the low-precision gradients."""

    def __init__(self, batch: Batch, into: Grads) -> None:
        self.into, self.start, self.stop = into, batch.keys.start, batch.keys.last + 1

    def __enter__(self) -> Grads:
        sum_k, sum_v = (torch.zeros_like(self._span(x), dtype=torch.float32) for x in (self.into.k, self.into.v))
        self.sums = Grads(self.into.q, sum_k, sum_v, self.start)
        return self.sums

    def _span(self, x: Tensor) -> Tensor:
        return x[:, :, self.start : self.stop]

    def __exit__(self, *error: object) -> None:
        self._span(self.into.k).add_(self.sums.k)
        self._span(self.into.v).add_(self.sums.v)
