"""Execution of plans by their lowerings: forward, merge and backward."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ..calls import Call
from ..partials import Saved
from ..plans import Plan
from . import registry


def keeps_hidden_out(plan: Plan) -> bool:
    """Whether `merge_into` accepts NaN and infinity in hidden keys."""
    return registry.of(plan.chosen).keeps_hidden_out


def merge_into(
    plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Merge a partial softmax into out and lse, in place.

    out: (B, Hq, N, Dv). lse: (B, Hq, N). Both are (0, -inf) in rows without keys so far.
    """
    registry.of(plan.chosen).merge_into(plan.chosen, plan.problem, call, q, k, v, out, lse)


def forward(plan: Plan, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N).

    out is in the dtype of q.
    """
    return registry.of(plan.chosen).forward(plan.chosen, plan.problem, call, q, k, v)


def backward(plan: Plan, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes.

    Gradients of a score_mod's operands are added to its sums.
    """
    # Rows that see no key get lse = +inf: every weight is exp(-inf) = 0, so their gradient is 0 and
    # never NaN.
    dead = saved.lse == -math.inf
    grad_lse = saved.grad_lse
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(dead, 0.0)
    saved = replace(saved, lse=saved.lse.masked_fill(dead, math.inf), grad_lse=grad_lse)
    return registry.of(plan.chosen).backward(plan.chosen, plan.problem, call, saved)
