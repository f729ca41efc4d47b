"""Linear and cross entropy as one operator in chunks of tokens.

The logits of all tokens never exist. Forward saves its operands only; backward computes a chunk's
logits again. The gradient of a token of class t by its logits is, with weights w of classes and a
share s of smoothing,

    (1 - s) w_t (softmax - onehot_t) + s / classes (softmax sum_c w_c - w)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import chunks
from .gradients import add_product, aligned, zero_sum


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
    """F.cross_entropy(F.linear(x, weight, bias), target, ...), in float32 at least.

    x: (tokens, features)
    weight, bias: (classes, features), (classes,)
    target: (tokens,) class indices
    class_weight: (classes,)
    converted: the result is in float32 at least too; else in the dtype of x
    chunk_rows: tokens of a chunk
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    class_weight = _converted(class_weight, wide)
    # 1. The loss of each token.
    losses = torch.empty(len(x), dtype=wide, device=x.device)
    for chunk in chunks(len(x), chunk_rows, x.device):
        losses[chunk] = F.cross_entropy(
            F.linear(x[chunk], weight, bias).to(wide),
            target[chunk],
            class_weight,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )
    # 2. The reduction: a mean is weighted by the classes' weights.
    if reduction == "mean":
        losses = losses.sum() / _token_weights(target, class_weight, ignore_index, wide).sum()
    elif reduction == "sum":
        losses = losses.sum()
    if converted:
        return losses
    return losses.to(x.dtype)


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
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """The gradients of those of (x, weight, bias) that need one.

    Gradients of weight and bias are summed over chunks in float32 at least.

    grad: of the loss, (tokens,) or ()
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    class_weight = _converted(class_weight, wide)
    # 1. The factors of a token's two terms.
    options = (reduction, ignore_index, label_smoothing)
    hard, soft = _factors(grad.to(wide), target, class_weight, *options, len(weight))
    if class_weight is None:
        class_weight = torch.ones(len(weight), dtype=wide, device=x.device)
    # 2. The gradients: of x chunk by chunk, of weight and bias as sums.
    x_grad = x.new_empty(x.shape) if needs_grad[0] else None
    weight_grad = zero_sum(weight) if needs_grad[1] else None
    bias_grad = zero_sum(weight[:, 0]) if needs_grad[2] else None
    for chunk in chunks(len(x), chunk_rows, x.device):
        # The wide logits have no name of their own: rounded below, their memory must be freed.
        terms = (target[chunk], ignore_index, hard[chunk], soft[chunk])
        logits_grad = _logits_grad_(F.linear(x[chunk], weight, bias).to(wide), *terms, class_weight)
        if bias_grad is not None:
            bias_grad.add_(logits_grad.sum(0))
        logits_grad = logits_grad.to(x.dtype)
        if weight_grad is not None:
            add_product(weight_grad, logits_grad.t(), x[chunk])
        if x_grad is not None:
            x_grad[chunk] = logits_grad @ weight
        # Else it would be live beside the next chunk's.
        del logits_grad
    grads = (x_grad, weight_grad, bias_grad)
    return [gradient.to(x.dtype) for gradient in grads if gradient is not None]


OPERATOR = torch.ops.passes.linear_cross_entropy.default


@linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, target: Tensor, *options: Any) -> Tensor:
    _, _, reduction, *_, converted, _ = options
    shape = target.shape if reduction == "none" else ()
    dtype = torch.promote_types(x.dtype, torch.float32) if converted else x.dtype
    return x.new_empty(shape, dtype=dtype)


@linear_cross_entropy_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    needs_grad = options[-1]
    return [
        operand.new_empty(operand.shape)
        for operand, is_needed in zip((x, weight, bias), needs_grad, strict=True)
        if operand is not None and is_needed
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    *ctx.options, _, ctx.chunk_rows = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bias = ctx.saved_tensors[3]
    needs_bias = bias is not None and ctx.needs_input_grad[3]
    needs_grad = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], needs_bias]
    grads = linear_cross_entropy_backward(
        grad, *ctx.saved_tensors, *ctx.options, ctx.chunk_rows, needs_grad
    )
    x_grad, weight_grad, bias_grad = aligned(grads, needs_grad)
    return x_grad, weight_grad, None, bias_grad, *(None,) * 6


linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def _converted(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.to(dtype)


def _factors(
    grad: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """The factors of a token's hard and soft term, (tokens,) each.

    The terms are those of the formula at the top of the file.
    """
    token_weights = _token_weights(target, class_weight, ignore_index, grad.dtype)
    if reduction == "mean":
        grad = grad / token_weights.sum()
    hard = token_weights * (1 - label_smoothing) * grad
    soft = (target != ignore_index) * (label_smoothing / classes) * grad
    return hard, soft


def _logits_grad_(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    hard: Tensor,
    soft: Tensor,
    class_weight: Tensor,
) -> Tensor:
    """The gradient by a chunk's logits (tokens, classes), in their memory."""
    exponentials = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    softmax_factor = (hard + soft * class_weight.sum()) / exponentials.sum(-1)
    grad = exponentials.mul_(softmax_factor[:, None])
    grad.scatter_add_(1, _indices(target, ignore_index)[:, None], -hard[:, None])
    return grad.addr_(soft, class_weight, alpha=-1)


def _token_weights(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """The weight of each token's class, 0 for ignored tokens, (tokens,)."""
    weights = (target != ignore_index).to(dtype)
    if class_weight is None:
        return weights
    return weights * class_weight[_indices(target, ignore_index)]


def _indices(target: Tensor, ignore_index: int) -> Tensor:
    """Class indices, 0 in place of ignore_index.

    ignore_index need not be a class.
    """
    return target.masked_fill(target == ignore_index, 0)
