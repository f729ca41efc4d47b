"""Attention by a rule as one operator, one node for any length.

    compiled_dilated::attend -> execution.run

Differentiable, and opaque to torch.compile and torch.export; graphs.py replaces it in graphs that
may contain more. Its arguments define all that it computes: the rule is a text (see rules.py), and
tensors that functions capture are operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .execution import Options, run, run_backward
from .mods import sums_dtype, unflat
from .partials import Saved, empty_out, laid_out, lse_dtype
from .rules import score_slots

# Explicit schemas: torch infers no optional lists of tensors, and AOTInductor writes empty lists
# as such.
_OPTIONS = "Tensor[]? data, Tensor[]? operands, str rule, float scale, SymInt q_offset"
_INPUTS = f"Tensor q, Tensor k, Tensor v, {_OPTIONS}"
_SAVED = f"Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}"
_GRADIENTS = "Tensor grad_out, Tensor? grad_lse"


@torch.library.custom_op(
    "compiled_dilated::attend",
    mutates_args=(),
    schema=f"({_INPUTS}, bool training, bool by_token) -> (Tensor, Tensor)",
)
def attend_operator(
    q: Tensor, k: Tensor, v: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, training: bool, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = Options(rule, scale, q_offset, training, True, (), len(data or ()))
    out, lse = run(q, k, v, data, operands, options)
    return laid_out(out, by_token), lse.contiguous()  # the strides of the fake results


@attend_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, training: bool, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_out(q, v, by_token), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


@torch.library.custom_op(
    "compiled_dilated::attend_backward",
    mutates_args=(),
    schema=f"({_GRADIENTS}, {_SAVED}, int[] learned) -> (Tensor, Tensor, Tensor, Tensor)",
)
def attend_backward_operator(
    grad_out: Tensor, grad_lse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, learned: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options(rule, scale, q_offset, True, True, tuple(learned), len(data or ()))
    return run_backward(Saved(q, k, v, out, lse, grad_out, grad_lse), data, operands, options)


@attend_backward_operator.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, learned: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = sum((operands or ())[number].numel() for number in learned)
    gradients = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return *gradients, q.new_empty((numbers,), dtype=sums_dtype(operands or (), learned))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the inputs and results of the operator for its gradient."""
    q, k, v, data, operands, ctx.rule, ctx.scale, ctx.q_offset, _, _ = inputs
    ctx.data, ctx.operands = len(data or ()), len(operands or ())
    ctx.save_for_backward(q, k, v, *output, *(data or ()), *(operands or ()))


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    """Gradients of the operator's inputs; None for those that have none."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    data, operands = tensors[: ctx.data], tensors[ctx.data :]
    needs_grad = ctx.needs_input_grad[4] if operands else ()
    learned = [slot for slot in score_slots(ctx.rule) if needs_grad[slot]]
    saved = (q, k, v, out, lse, data or None, operands or None)
    grad_q, grad_k, grad_v, vector = attend_backward_operator(
        grad_out, grad_lse, *saved, ctx.rule, ctx.scale, ctx.q_offset, learned
    )
    grads: list[Tensor | None] = [None] * ctx.operands
    for slot, grad in zip(learned, unflat(vector, operands, learned), strict=True):
        grads[slot] = grad
    of_data = [None] * ctx.data if ctx.data else None
    return grad_q, grad_k, grad_v, of_data, grads or None, None, None, None, None, None


# The gradient of the operator in an exported graph; calls from Python go through autograd.py.
torch.library.register_autograd("compiled_dilated::attend", _differentiate, setup_context=_save)
