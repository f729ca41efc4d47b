"""What may be done to rows one by one: each operation's forward, its backward by hand, and what that backward reads.

By hand, because a chunk inside a custom op runs below autograd, and because it says what need not be recomputed: a linear's
backward reads its operands and never its result, so the last linear of an MLP is not run again.

A value is (..., features): no operation here mixes its leading dims, the rows. Operands are such values, tensors of at most one
dim that all rows share (a linear's weight has two), or numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
Gradients = tuple[Tensor | None, ...]


class Reads(Enum):
    """Whose data a backward reads."""

    NOTHING = auto()
    OPERANDS = auto()
    RESULT = auto()


@dataclass(frozen=True)
class Primitive:
    """forward(*operands, **options) -> result.

    backward(grad, result, *operands, **options) -> a gradient for each operand that is a tensor, as wide as the result where the
    operand was broadcast. What it does not read may be a meta tensor: shape[-1] and dtype are right, data there is none. None
    where no gradient flows (indices).

    over(operand, *others, **options) -> the result, the same bits, in the memory of that operand, whichever it is; None where
    there is no such way. is_view: whether a result may be memory of its operand.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Gradients] | None
    reads: Reads = Reads.NOTHING
    over: Callable[..., Tensor] | None = None
    is_view: bool = False


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _layer_norm_backward(
    grad: Tensor, _: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Gradients:
    _, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = (x - mean) * rstd
    whole = [True, False, False]
    by_x, _, _ = aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, weight, bias, whole)
    return by_x, None if weight is None else grad * normed, None if bias is None else grad


def _rms_norm(x: Tensor, weight: Tensor | None, *, eps: float | None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _rms_norm_backward(grad: Tensor, _: Tensor, x: Tensor, weight: Tensor | None, *, eps: float | None) -> Gradients:
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, by_normed = x.to(wide), grad.to(wide)
    scale = x_wide.square().mean(-1, keepdim=True).add_(torch.finfo(wide).eps if eps is None else eps).rsqrt_()
    normed = x_wide.mul_(scale) if x_wide is not x else x * scale
    by_weight = None if weight is None else by_normed * normed
    by_normed = by_normed if weight is None else by_normed * weight
    return by_normed.sub(normed * (by_normed * normed).mean(-1, keepdim=True)).mul_(scale), by_weight


def _linear_part(x: Tensor, weight: Tensor, bias: Tensor | None, *, start: int, length: int) -> Tensor:
    return F.linear(x, weight.narrow(0, start, length), None if bias is None else bias.narrow(0, start, length))


def _narrow_backward(grad: Tensor, _: Tensor, x: Tensor, *, start: int, length: int) -> Gradients:
    whole = grad.new_zeros(*grad.shape[:-1], x.shape[-1])
    whole.narrow(-1, start, length).copy_(grad)
    return (whole,)


def _mul_backward(grad: Tensor, _: Tensor, x: Tensor, y: Tensor | float) -> Gradients:
    return (grad * y, grad * x) if isinstance(y, Tensor) else (grad * y,)


def _div_backward(grad: Tensor, _: Tensor, x: Tensor, y: Tensor | float) -> Gradients:
    return (grad / y, -grad * x / (y * y)) if isinstance(y, Tensor) else (grad / y,)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _unary(
    forward: Callable[..., Tensor],
    backward: Callable[..., Tensor],
    reads: Reads = Reads.NOTHING,
    over: Callable[..., Tensor] | None = None,
    is_view: bool = False,
) -> Primitive:
    """Of one operand. backward(grad, result, operand, **options) -> its gradient."""
    return Primitive(forward, lambda *given, **options: (backward(*given, **options),), reads, over, is_view)


def _linear_backward(*_: Any) -> Gradients:
    raise AssertionError("recipes.py adds a linear's gradients to their sums in place")


_OF_OPERANDS, _OF_RESULT = Reads.OPERANDS, Reads.RESULT

PRIMITIVES: Mapping[str, Primitive] = MappingProxyType(
    {
        "linear": Primitive(F.linear, _linear_backward, _OF_OPERANDS),
        "layer_norm": Primitive(_layer_norm, _layer_norm_backward, _OF_OPERANDS),
        "rms_norm": Primitive(_rms_norm, _rms_norm_backward, _OF_OPERANDS),
        "gelu": _unary(
            F.gelu, lambda g, _, x, approximate: aten.gelu_backward(g, x, approximate=approximate), _OF_OPERANDS, aten.gelu_
        ),
        "silu": _unary(F.silu, lambda g, _, x: aten.silu_backward(g, x), _OF_OPERANDS, aten.silu_),
        "relu": _unary(torch.relu, lambda g, y, _: aten.threshold_backward(g, y, 0), _OF_RESULT, torch.relu_),
        "sigmoid": _unary(torch.sigmoid, lambda g, y, _: aten.sigmoid_backward(g, y), _OF_RESULT, torch.sigmoid_),
        "tanh": _unary(torch.tanh, lambda g, y, _: aten.tanh_backward(g, y), _OF_RESULT, torch.tanh_),
        "rsqrt": _unary(torch.rsqrt, lambda g, y, _: g * y.pow(3) * -0.5, _OF_RESULT),
        "pow": _unary(
            lambda x, exponent: x.pow(exponent), lambda g, _, x, exponent: g * x.pow(exponent - 1) * exponent, _OF_OPERANDS
        ),
        "neg": _unary(torch.neg, lambda g, *_: -g),
        "mean": _unary(lambda x: x.mean(-1, keepdim=True), lambda g, _, x: (g / x.shape[-1]).expand(*g.shape[:-1], x.shape[-1])),
        "to": _unary(lambda x, dtype: x.to(_dtype(dtype)), lambda g, *_, dtype: g, is_view=True),
        "add": Primitive(torch.add, lambda g, *_: (g, g), over=Tensor.add_),
        "sub": Primitive(torch.sub, lambda g, *_: (g, -g)),
        "mul": Primitive(torch.mul, _mul_backward, _OF_OPERANDS, over=Tensor.mul_),
        "div": Primitive(torch.div, _div_backward, _OF_OPERANDS),
        "narrow": Primitive(lambda x, start, length: x.narrow(-1, start, length), _narrow_backward, is_view=True),
        "cat": Primitive(
            lambda *parts: torch.cat(parts, -1), lambda g, _, *parts: g.split([each.shape[-1] for each in parts], -1)
        ),
        "logsumexp": Primitive(
            lambda x, keepdim: x.logsumexp(-1, keepdim),
            lambda g, y, x, keepdim: ((g if keepdim else g[..., None]) * x.softmax(-1),),
            _OF_OPERANDS,
        ),
        "argmax": Primitive(lambda x, keepdim: x.argmax(-1, keepdim), None),
        # Of attention, in inference: rows of some of a linear's features, and heads, (..., heads, rows, features of one).
        "linear_part": Primitive(_linear_part, None),
        "split_heads": Primitive(lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(-2, -3), None, is_view=True),
    }
)
