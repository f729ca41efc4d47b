"""Row-wise primitives: forward, backward by hand, and what backward reads.

By hand, because a chunk inside a custom op runs below autograd, and because it determines what is
recomputed: a linear's backward reads its operands and never its result, so the last linear of an
MLP is not run again.

A value is (..., features): no primitive mixes its leading dims, the rows. Operands are such values,
tensors of at most one dim that all rows share (a linear's weight has two), or numbers.
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
    """The values whose data a backward reads."""

    NOTHING = auto()
    OPERANDS = auto()
    RESULT = auto()


@dataclass(frozen=True)
class Primitive:
    """A row-wise operation. Its functions:

    forward(*operands, **options) -> result
    backward(grad, result, *operands, **options) -> a gradient for each operand that is a tensor, as
        wide as the result if the operand was broadcast. What it does not read may be a meta tensor,
        of which shape[-1] and dtype are right. None if no gradient flows (indices).
    over(operand, *others, **options) -> the result, the same bits, in the memory of `operand`,
        whichever it is; None if that is not possible

    reads: what backward reads
    is_view: whether a result may be a view of its operand
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
    # The kernel would sum the weight's and the bias's gradient over rows; gradients.py does.
    x_only = [True, False, False]
    x_grad, _, _ = aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, weight, bias, x_only
    )
    normed = (x - mean) * rstd
    weight_grad = None if weight is None else grad * normed
    bias_grad = None if bias is None else grad
    return x_grad, weight_grad, bias_grad


def _rms_norm(x: Tensor, weight: Tensor | None, *, eps: float | None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _rms_norm_backward(
    grad: Tensor, _: Tensor, x: Tensor, weight: Tensor | None, *, eps: float | None
) -> Gradients:
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, grad = x.to(wide), grad.to(wide)
    mean_square = x_wide.square().mean(-1, keepdim=True)
    if eps is None:
        eps = torch.finfo(wide).eps
    scale = mean_square.add_(eps).rsqrt_()
    # A converted copy may be overwritten; x itself may not.
    normed = x_wide.mul_(scale) if x_wide is not x else x * scale
    weight_grad = None if weight is None else grad * normed
    # The same name, so that the wide copy is freed.
    if weight is not None:
        grad = grad * weight
    return grad.sub(normed * (grad * normed).mean(-1, keepdim=True)).mul_(scale), weight_grad


def _linear_part(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, start: int, length: int
) -> Tensor:
    """Some of a linear's features."""
    if bias is not None:
        bias = bias.narrow(0, start, length)
    return F.linear(x, weight.narrow(0, start, length), bias)


def _narrow_backward(grad: Tensor, _: Tensor, x: Tensor, *, start: int, length: int) -> Gradients:
    x_grad = grad.new_zeros(*grad.shape[:-1], x.shape[-1])
    x_grad.narrow(-1, start, length).copy_(grad)
    return (x_grad,)


def _mul_backward(grad: Tensor, _: Tensor, x: Tensor, y: Tensor | float) -> Gradients:
    if not isinstance(y, Tensor):
        return (grad * y,)
    return grad * y, grad * x


def _div_backward(grad: Tensor, _: Tensor, x: Tensor, y: Tensor | float) -> Gradients:
    if not isinstance(y, Tensor):
        return (grad / y,)
    return grad / y, -grad * x / (y * y)


def _logsumexp_backward(grad: Tensor, _: Tensor, x: Tensor, *, keepdim: bool) -> Gradients:
    if not keepdim:
        grad = grad[..., None]
    return (grad * x.softmax(-1),)


def dtype_of(name: str) -> torch.dtype:
    """The dtype that torch has under a name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _unary(
    forward: Callable[..., Tensor],
    backward: Callable[..., Tensor],
    reads: Reads = Reads.NOTHING,
    over: Callable[..., Tensor] | None = None,
    is_view: bool = False,
) -> Primitive:
    """A primitive of one operand.

    backward(grad, result, operand, **options) -> its gradient
    """

    def gradients(*operands: Any, **options: Any) -> Gradients:
        return (backward(*operands, **options),)

    return Primitive(forward, gradients, reads, over, is_view)


def _linear_backward(*_: Any) -> Gradients:
    raise AssertionError("gradients.py adds a linear's gradients to their sums in place")


PRIMITIVES: Mapping[str, Primitive] = MappingProxyType(
    {
        "linear": Primitive(F.linear, _linear_backward, Reads.OPERANDS),
        "layer_norm": Primitive(_layer_norm, _layer_norm_backward, Reads.OPERANDS),
        "rms_norm": Primitive(_rms_norm, _rms_norm_backward, Reads.OPERANDS),
        "gelu": _unary(
            F.gelu,
            lambda g, _, x, approximate: aten.gelu_backward(g, x, approximate=approximate),
            Reads.OPERANDS,
            aten.gelu_,
        ),
        "silu": _unary(
            F.silu, lambda g, _, x: aten.silu_backward(g, x), Reads.OPERANDS, aten.silu_
        ),
        "relu": _unary(
            torch.relu, lambda g, y, _: aten.threshold_backward(g, y, 0), Reads.RESULT, torch.relu_
        ),
        "sigmoid": _unary(
            torch.sigmoid, lambda g, y, _: aten.sigmoid_backward(g, y), Reads.RESULT, torch.sigmoid_
        ),
        "tanh": _unary(
            torch.tanh, lambda g, y, _: aten.tanh_backward(g, y), Reads.RESULT, torch.tanh_
        ),
        "rsqrt": _unary(torch.rsqrt, lambda g, y, _: g * y.pow(3) * -0.5, Reads.RESULT),
        "pow": _unary(
            lambda x, exponent: x.pow(exponent),
            lambda g, _, x, exponent: g * x.pow(exponent - 1) * exponent,
            Reads.OPERANDS,
        ),
        "neg": _unary(torch.neg, lambda g, *_: -g),
        "mean": _unary(
            lambda x: x.mean(-1, keepdim=True),
            lambda g, _, x: (g / x.shape[-1]).expand(*g.shape[:-1], x.shape[-1]),
        ),
        "to": _unary(lambda x, dtype: x.to(dtype_of(dtype)), lambda g, *_, dtype: g, is_view=True),
        "add": Primitive(torch.add, lambda g, *_: (g, g), over=Tensor.add_),
        "sub": Primitive(torch.sub, lambda g, *_: (g, -g)),
        "mul": Primitive(torch.mul, _mul_backward, Reads.OPERANDS, over=Tensor.mul_),
        "div": Primitive(torch.div, _div_backward, Reads.OPERANDS),
        "narrow": Primitive(
            lambda x, start, length: x.narrow(-1, start, length), _narrow_backward, is_view=True
        ),
        "cat": Primitive(
            lambda *parts: torch.cat(parts, -1),
            lambda g, _, *parts: g.split([part.shape[-1] for part in parts], -1),
        ),
        "logsumexp": Primitive(
            lambda x, keepdim: x.logsumexp(-1, keepdim), _logsumexp_backward, Reads.OPERANDS
        ),
        "argmax": Primitive(lambda x, keepdim: x.argmax(-1, keepdim), None),
        # For attention in inference: some of a linear's features, and heads,
        # (..., heads, rows, features of one head).
        "linear_part": Primitive(_linear_part, None),
        "split_heads": Primitive(
            lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(-2, -3), None, is_view=True
        ),
    }
)
