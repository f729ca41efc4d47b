"""Linear and cross entropy as one operator, some tokens at a time: their logits are never whole, in backward neither.

Forward keeps its operands alone; backward computes a chunk's logits again. The gradient of a token of class t by its logits is,
with weights w of classes and a share s of smoothing,

    (1 - s) w_t (softmax - onehot_t) + s / classes (softmax sum_c w_c - w)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import parts
from .recipes import add_product, zero_sum


@torch.library.custom_op("passes::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    converted: bool,
    chunk_rows: int,
) -> Tensor:
    """F.cross_entropy(F.linear(x, weight, bias), target, ...) for x (tokens, features) and class indices (tokens,).

    The losses of tokens are computed and added in float32 at least. converted: the result is that wide too, not of x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = torch.empty(len(x), dtype=wide, device=x.device)
    given = None if class_weight is None else class_weight.to(wide)
    for part in parts(len(x), chunk_rows, x.device):
        logits = F.linear(x[part], weight, bias).to(wide)
        losses[part] = F.cross_entropy(
            logits, target[part], given, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
    if reduction == "mean":
        losses = losses.sum() / _weights_of_tokens(target, given, ignore_index, wide).sum()
    elif reduction == "sum":
        losses = losses.sum()
    return losses if converted else losses.to(x.dtype)


@torch.library.custom_op("passes::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    chunk_rows: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of those of x, weight and bias that are wanted. Sums of 16-bit weights' gradients are held in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    given = None if class_weight is None else class_weight.to(wide)
    of_tokens = _weights_of_tokens(target, given, ignore_index, wide)
    grad = grad.to(wide) / of_tokens.sum() if reduction == "mean" else grad.to(wide)
    hard = of_tokens * (1 - label_smoothing) * grad
    soft = (target != ignore_index) * (label_smoothing / len(weight)) * grad
    classes = torch.ones(len(weight), dtype=wide, device=x.device) if given is None else given
    of_x = x.new_empty(x.shape) if wanted[0] else None
    of_weight = zero_sum(weight) if wanted[1] else None
    of_bias = zero_sum(weight[:, 0]) if wanted[2] else None
    for part in parts(len(x), chunk_rows, x.device):
        by_logits = _by_logits(
            F.linear(x[part], weight, bias).to(wide), target[part], ignore_index, hard[part], soft[part], classes
        )
        if of_bias is not None:
            of_bias.add_(by_logits.sum(0))
        by_logits = by_logits.to(x.dtype)
        if of_weight is not None:
            add_product(of_weight, by_logits.t(), x[part])
        if of_x is not None:
            of_x[part] = by_logits @ weight
        del by_logits  # or the next chunk's would stand beside it
    return [each.to(x.dtype) for each in (of_x, of_weight, of_bias) if each is not None]


OPERATOR = torch.ops.passes.linear_cross_entropy.default


@linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, target: Tensor, *options: Any) -> Tensor:
    _, _, reduction, *_, converted, _ = options
    shape = target.shape if reduction == "none" else ()
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32) if converted else x.dtype)


@linear_cross_entropy_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> list[Tensor]:
    given = zip((x, weight, bias), options[-1], strict=True)
    return [each.new_empty(each.shape) for each, is_wanted in given if each is not None and is_wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    *ctx.options, _, ctx.chunk_rows = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bias = ctx.saved_tensors[3]
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    found = iter(linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, ctx.chunk_rows, wanted))
    of_x, of_weight, of_bias = (next(found) if is_wanted else None for is_wanted in wanted)
    return of_x, of_weight, None, of_bias, *(None,) * 6


linear_cross_entropy.register_autograd(_differentiate, setup_context=_keep)


def _by_logits(logits: Tensor, target: Tensor, ignore_index: int, hard: Tensor, soft: Tensor, classes: Tensor) -> Tensor:
    """The gradient by a chunk's logits, in their place."""
    by_logits = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    by_logits.mul_(((hard + soft * classes.sum()) / by_logits.sum(-1))[:, None])
    by_logits.scatter_add_(1, _indices(target, ignore_index)[:, None], -hard[:, None])
    return by_logits.addr_(soft, classes, alpha=-1)


def _weights_of_tokens(target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The weight of each token's class, 0 of those that are ignored."""
    counted = (target != ignore_index).to(dtype)
    return counted if class_weight is None else counted * class_weight[_indices(target, ignore_index)]


def _indices(target: Tensor, ignore_index: int) -> Tensor:
    """With some class in place of the one to ignore, which need not be any."""
    return target.masked_fill(target == ignore_index, 0)
