"""The operator with its gradients: eager, compiled and under torch.func.

attend_bound -> attend -> _Attention (autograd) -> compiled_dilated::attend
                                                -> execution.run, if nothing traces the call
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from .execution import Options, run, run_backward
from .graphs import attend_backward_operator, attend_operator
from .mods import unflat
from .partials import Saved, is_by_token
from .ring.rings import Ring
from .rules import Bound
from .tracing import is_traced
from .vmapped import batch_size, fold, fold_data, one_by_one, operands_vary

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _apply(function: Any, *inputs: Any) -> Any:
    """Call function.apply, which is untyped in torch."""
    return function.apply(*inputs)


class _Gradients(torch.autograd.Function):
    """The backward as an autograd function, whose own backward raises."""

    @staticmethod
    def forward(options: Options, *tensors: Tensor) -> Any:
        return _gradients(options, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "attention is not twice differentiable here: "
            "its gradient came from a fused backward kernel. "
            "Use compiled_dilated.reference, which is dense, where second derivatives are needed"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        options, *tensors = inputs
        # Gradients of learned operands must not be summed over the vmapped dimension.
        if operands_vary(options, in_dims[8:]) or options.learned:
            return one_by_one(_Gradients, info.batch_size, in_dims, inputs)
        q = tensors[2]
        batch = batch_size(q, in_dims[3])
        # grad_out, grad_lse, q, k, v, out and lse, then data and operands.
        folded = []
        for x, dim in zip(tensors[:7], in_dims[1:8], strict=True):
            folded.append(None if x is None else fold(x, dim, info.batch_size))
        extra = fold_data(options, tensors[7:], in_dims[8:], info.batch_size, batch)
        *grads, learned = _apply(_Gradients, options, *folded, *extra)
        unfolded = [x.unflatten(0, (info.batch_size, -1)) for x in grads]
        return (*unfolded, learned), (0, 0, 0, None)


def _gradients(
    options: Options,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *tensors: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the learned operands (one vector).

    tensors: data, then operands.
    """
    data, operands = options.split(tensors)
    if are_plain(grad_out, q, k, v, *tensors):
        return run_backward(Saved(q, k, v, out, lse, grad_out, grad_lse), data, operands, options)
    saved = (q, k, v, out, lse, data, operands)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = attend_backward_operator(
        grad_out, grad_lse, *saved, *options.plain, list(options.learned)
    )
    return gradients


class _Attention(torch.autograd.Function):
    """Attention with its gradient; saves its inputs, out and lse."""

    @staticmethod
    def forward(options: Options, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        data, operands = options.split(tensors)
        if are_plain(q, k, v, *tensors):
            return run(q, k, v, data, operands, options)
        return attend_operator(
            q, k, v, data, operands, *options.plain, options.training, is_by_token(q)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, q, k, v, *tensors = inputs
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        options, (q, k, v, out, lse, *tensors) = ctx.options, ctx.saved_tensors
        # Only the lse has a gradient.
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if not options.wants_lse:
            grad_lse = None
        inputs = (options, grad_out, grad_lse, q, k, v, out, lse, *tensors)
        if is_traced():  # torch.compile refuses second derivatives on its own
            *grads, vector = _gradients(*inputs)
        else:
            *grads, vector = _apply(_Gradients, *inputs)
        # Of the data and operands only the learned operands have gradients.
        extra: list[Tensor | None] = [None] * len(tensors)
        learned_grads = unflat(vector, tensors[options.data :], options.learned)
        for number, grad in zip(options.learned, learned_grads, strict=True):
            extra[options.data + number] = grad
        return None, *grads, *extra

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        options, q, k, v, *tensors = inputs
        size = info.batch_size
        # Gradients of learned operands must not be summed over the vmapped dimension.
        if operands_vary(options, in_dims[4:]) or options.learned:
            return one_by_one(_Attention, size, in_dims, inputs)
        batch = batch_size(q, in_dims[1])
        folded = [fold(x, dim, size) for x, dim in zip((q, k, v), in_dims[1:4], strict=True)]
        extra = fold_data(options, tensors, in_dims[4:], size, batch)
        out, lse = _apply(_Attention, options, *folded, *extra)
        return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


class _EagerAttention(_Attention):
    """Attention outside of torch.compile, which refuses functions that define a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attention has no forward-mode derivative here; "
            "use reverse mode (torch.func.grad, vjp), or compiled_dilated.reference"
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: Options, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiable out and lse of checked inputs.

    tensors: data, then operands.

    Returns out (B, Hq, N, Dv) and lse (B, Hq, N).
    """
    # Without a gradient: the operator itself, or past its dispatch.
    if not options.training:
        data, operands = options.split(tensors)
        if is_traced():
            out, lse = attend_operator(
                q, k, v, data, operands, *options.plain, False, is_by_token(q)
            )
            return out, lse
        if are_plain(q, k, v, *tensors):
            return run(q, k, v, data, operands, options)
    if not is_traced():
        results: tuple[Tensor, Tensor] = _apply(_EagerAttention, options, q, k, v, *tensors)
        return results
    # Dynamo accepts no tensor twice.
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)
    results = _apply(_Attention, options, q, k, v, *tensors)
    return results


def attend_bound(
    bound: Bound,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    data: Sequence[Tensor],
    scale: float,
    q_offset: Any,
    wants_lse: bool,
    ring: Ring | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of a rule with its operands.

    data: tensors that the masks read, in the order of their names.
    wants_lse: whether the lse may get a gradient.
    """
    operands = bound.operands
    learned = []
    for slot in bound.slots:
        if operands[slot].is_floating_point() and trains(operands[slot]):
            learned.append(slot)
    options = Options(
        rule=bound.rule,
        scale=scale,
        q_offset=q_offset,
        training=trains(q, k, v) or bool(learned),
        wants_lse=wants_lse,
        learned=tuple(learned),
        data=len(data),
        ring=ring,
    )
    return attend(q, k, v, options, *data, *operands)


def trains(*tensors: Tensor) -> bool:
    """Whether a backward through these tensors may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_plain_call(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether no tracer, mode or transform observes the call.

    Such a call skips the operator's dispatch, which takes longer than one query.
    """
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not is_traced()
        and _get_tracing_state() is None
        and not _len_torch_dispatch_stack()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def are_plain(*tensors: Tensor) -> bool:
    """Whether `is_plain_call` is true of all tensors, and they have data."""
    q, k, v, *extra = tensors
    if not is_plain_call(q, k, v) or q.device.type == "meta":
        return False
    return all(type(x) in _PLAIN for x in extra)


def part(q: Tensor, k: Tensor, v: Tensor, q_offset: int, rule: str, scale: float) -> Tensor:
    """out of the queries from q_offset on, without a gradient."""
    if are_plain(q, k, v):
        out, _ = run(q, k, v, None, None, Options(rule, scale, q_offset, False, False, (), 0))
        return out
    by_token = is_by_token(q)
    results: tuple[Tensor, Tensor] = attend_operator(
        q, k, v, None, None, rule, scale, q_offset, False, by_token
    )
    return results[0]
