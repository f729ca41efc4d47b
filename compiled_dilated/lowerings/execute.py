"""Run a plan: forward into (out, lse), backward from them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calls import Call
from ..partials import Saved, empty_out, is_by_token, lse_dtype, merge_
from ..plans import Plan, Proposal
from . import batches as running
from . import costs, flex, hidden, lanes, native
from .batches import Batch, Sums

# Lowerings that compute a whole program in kernels of their own, on the terms of `plans.Problem`.
_OF_PROGRAMS: dict[str, Any] = {"flex": flex, "lanes": lanes}


def merge_into(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge a part of a larger softmax into out (B, Hq, N, Dv) and lse (B, Hq, N), which are (0, -inf) where nothing was seen."""
    if plan.lowering == "native":
        native.merge_into(plan.chosen[0].work[0], call, q, k, v, out, lse)
        return
    if plan.lowering in _OF_PROGRAMS:
        merge_(out, lse, *_forward(plan, call, q, k, v))
        return
    for batch in _batches(plan):
        for piece, entries in costs.pieces(batch, plan.problem, backward=False):
            running.forward(piece, call, entries, q, k, v, out, lse)


def forward(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) in the dtype of q and lse (B, Hq, N)."""
    if plan.lowering == "native":  # which sees to bad numbers itself
        return native.forward(plan.chosen[0].work[0], call, q, k, v)
    return hidden.forward(partial(_forward, plan), call, q, k, v)


def _forward(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    kernel = _OF_PROGRAMS.get(plan.lowering)
    if kernel is not None:
        result: tuple[Tensor, Tensor] = kernel.forward(plan.chosen[0].work[0], plan.problem, call, q, k, v)
        return result
    out, lse = empty_out(q, v, is_by_token(q)).zero_(), q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    merge_into(plan, call, q, k, v, out, lse)
    return out, lse


def backward(plan: Plan, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype; those of a score_mod's operands are added to its sums."""
    # Rows that see nothing: with lse = +inf every weight is exp(-inf) = 0, so they send no gradient and make no NaN.
    dead = saved.lse == -math.inf
    grad_lse = None if saved.grad_lse is None else saved.grad_lse.masked_fill(dead, 0.0)
    saved = replace(saved, lse=saved.lse.masked_fill(dead, math.inf), grad_lse=grad_lse)
    return hidden.backward(partial(_backward, plan), call, saved)


def _backward(plan: Plan, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    if plan.lowering == "native":
        return native.backward(_native_work(plan, call), call, saved)
    kernel = _OF_PROGRAMS.get(plan.lowering)
    if kernel is not None:
        gradients: tuple[Tensor, Tensor, Tensor] = kernel.backward(plan.chosen[0].work[0], plan.problem, call, saved)
        return gradients
    inputs = (saved.q, saved.k, saved.v)
    sums = [torch.zeros(x.shape, dtype=lse_dtype(x.dtype), device=x.device) for x in inputs]
    for batch in _batches(plan):
        for piece, entries in costs.pieces(batch, plan.problem, backward=True):
            running.backward(piece, call, entries, saved, Sums(*sums))
    # One by one: of what has been rounded the sum is freed.
    grad_q, grad_k, grad_v = (sums.pop(0).to(x.dtype) for x in inputs)
    return grad_q, grad_k, grad_v


def _native_work(plan: Plan, call: Call) -> native.Work:
    """The program as the kernel reads it, without a score_mod where the call has none: which keys are seen is asked so."""
    work: native.Work = plan.chosen[0].work[0]
    if call.score_mod is None and plan.problem.scores is not None:
        plain = native.propose(replace(plan.problem, scores=None))
        assert isinstance(plain, Proposal)
        work = plain.work[0]
    return work


def _batches(plan: Plan) -> list[Batch]:
    return [batch for proposal in plan.chosen for batch in proposal.work]
