"""The operator with its gradients, as Python calls it: eager, traced by torch.compile, under torch.func's transforms.

attend_bound -> attend -> _Attention (autograd) -> compiled_dilated::attend, or what it runs where nobody traces the call
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .mods import unflat
from .operators import Options, attend_backward_operator, attend_operator, run, run_backward
from .partials import Saved, is_by_token
from .ring.rings import Ring
from .rules import Bound

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _apply(function: Any, *inputs: Any) -> Any:
    """function.apply of an autograd function, whose apply torch leaves untyped."""
    return function.apply(*inputs)


class _Gradients(torch.autograd.Function):
    """The backward as a function of its own, so that differentiating it once more raises instead of giving zeros."""

    @staticmethod
    def forward(
        options: Options, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *tensors: Tensor,
    ) -> Any:  # fmt: skip
        return _gradients(options, grad_out, grad_lse, q, k, v, out, lse, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "attention is not twice differentiable here: its gradient came from a fused backward kernel. "
            "Use compiled_dilated.reference, which is dense, where second derivatives are needed"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        options, *tensors = inputs
        # Of learned operands every entry has a gradient of its own.
        if _operands_vary(options, in_dims[8:]) or options.learned:
            return _one_by_one(_Gradients, info.batch_size, in_dims, inputs)
        batch = _batch_of(tensors[2], in_dims[3])
        folded = [None if x is None else _fold(x, dim, info.batch_size) for x, dim in zip(tensors[:7], in_dims[1:8], strict=True)]
        others = _fold_others(options, tensors[7:], in_dims[8:], info.batch_size, batch)
        *grads, learned = _apply(_Gradients, options, *folded, *others)
        return (*(x.unflatten(0, (info.batch_size, -1)) for x in grads), learned), (0, 0, 0, None)


def _gradients(
    options: Options, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *tensors: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    data, operands = options.split(tensors)
    if are_plain(grad_out, q, k, v, *tensors):
        return run_backward(Saved(q, k, v, out, lse, grad_out, grad_lse), data, operands, options)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = attend_backward_operator(
        grad_out, grad_lse, q, k, v, out, lse, data, operands, *options.plain, list(options.learned)
    )
    return gradients


class _Attention(torch.autograd.Function):
    """attend with its gradient: merged out and lse are saved, nothing else of size."""

    @staticmethod
    def forward(options: Options, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        data, operands = options.split(tensors)
        if are_plain(q, k, v, *tensors):
            return run(q, k, v, data, operands, options)
        return attend_operator(q, k, v, data, operands, *options.plain, options.training, is_by_token(q))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, q, k, v, *tensors = inputs
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        options, (q, k, v, out, lse, *tensors) = ctx.options, ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if not options.wants_lse:
            grad_lse = None
        inputs = (options, grad_out, grad_lse, q, k, v, out, lse, *tensors)
        # torch.compile itself refuses to differentiate a compiled backward.
        *grads, vector = _gradients(*inputs) if is_compiling() else _apply(_Gradients, *inputs)
        operands = tensors[options.data :]
        others: list[Tensor | None] = [None] * len(tensors)
        for number, grad in zip(options.learned, unflat(vector, operands, options.learned), strict=True):
            others[options.data + number] = grad
        return None, *grads, *others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        options, q, k, v, *tensors = inputs
        if _operands_vary(options, in_dims[4:]) or options.learned:
            return _one_by_one(_Attention, info.batch_size, in_dims, inputs)
        batch = _batch_of(q, in_dims[1])
        folded = [_fold(x, dim, info.batch_size) for x, dim in zip((q, k, v), in_dims[1:4], strict=True)]
        others = _fold_others(options, tensors, in_dims[4:], info.batch_size, batch)
        out, lse = _apply(_Attention, options, *folded, *others)
        return (out.unflatten(0, (info.batch_size, -1)), lse.unflatten(0, (info.batch_size, -1))), (0, 0)


class _EagerAttention(_Attention):
    """The same outside of torch.compile, which refuses functions that define a jvp, even one that only explains."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attention has no forward-mode derivative here; "
            "use reverse mode (torch.func.grad, vjp), or compiled_dilated.reference"
        )


def _operands_vary(options: Options, dims: Sequence[int | None]) -> bool:
    """Whether torch.vmap maps over operands: then each entry has a rule of its own."""
    return any(dim is not None for dim in dims[options.data :])


def _one_by_one(function: Any, size: int, dims: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """The entries of a vmap one after the other."""
    results = []
    for entry in range(size):
        chosen = [x if dim is None else x.select(dim, entry) for x, dim in zip(inputs, dims, strict=True)]
        results.append(_apply(function, *chosen))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _batch_of(x: Tensor, dim: int | None) -> int:
    """The batch of x without its vmapped dimension."""
    return x.shape[1 if dim == 0 else 0]


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped dimension becomes part of the batch."""
    moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return moved.flatten(0, 1)


def _fold_others(options: Options, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, batch: int) -> list[Tensor]:
    """Data folded like q, k and v; operands as they are."""
    folded = []
    for x, dim in zip(tensors[: options.data], dims, strict=False):
        moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        folded.append(moved.expand(size, batch, *moved.shape[2:]).flatten(0, 1))
    return [*folded, *tensors[options.data :]]


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N) of checked inputs, differentiable. tensors: data, then operands."""
    if not options.training:
        data, operands = options.split(tensors)
        if is_compiling():
            out, lse = attend_operator(q, k, v, data, operands, *options.plain, False, is_by_token(q))
            return out, lse
        if are_plain(q, k, v, *tensors):
            return run(q, k, v, data, operands, options)
    if is_compiling():  # which takes no tensor twice
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    function = _Attention if is_compiling() else _EagerAttention
    results: tuple[Tensor, Tensor] = _apply(function, options, q, k, v, *tensors)
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
    """out and lse of a rule as text and its operands."""
    operands = bound.operands
    learned = tuple(slot for slot in bound.slots if operands[slot].is_floating_point() and trains(operands[slot]))
    training = trains(q, k, v) or bool(learned)
    options = Options(bound.rule, scale, q_offset, training, wants_lse, learned, len(data), ring)
    return attend(q, k, v, options, *data, *operands)


def trains(*tensors: Tensor) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_plain_call(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nobody traces or transforms the call.

    Then the operator's own dispatch, longer than one query takes, is not needed.
    """
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not is_compiling()
        and _get_tracing_state() is None
        and not _len_torch_dispatch_stack()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def are_plain(*tensors: Tensor) -> bool:
    """The same of any tensors, which have data."""
    q, k, v, *others = tensors
    return is_plain_call(q, k, v) and q.device.type != "meta" and all(type(x) in _PLAIN for x in others)


def part(q: Tensor, k: Tensor, v: Tensor, q_offset: int, rule: str, scale: float) -> Tensor:
    """out of some queries of a sequence, the first at q_offset, without a gradient."""
    if are_plain(q, k, v):
        return run(q, k, v, None, None, Options(rule, scale, q_offset, False, False, (), 0))[0]
    out: Tensor = attend_operator(q, k, v, None, None, rule, scale, q_offset, False, is_by_token(q))[0]
    return out
