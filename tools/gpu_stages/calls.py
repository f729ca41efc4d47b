"""Calls that stages measure and compare: tensors, passes, and the largest difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import compiled_dilated as cd

from .timing import first_call, measured

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# A backward computes five products where a forward computes two.
BACKWARD = 2.5


def inputs(
    device: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    kv_heads: int | None = None,
) -> list[Tensor]:
    """Random q, k and v that require gradients, equal in every run."""
    torch.manual_seed(0)
    tensors = []
    for count in (heads, kv_heads or heads, kv_heads or heads):
        x = torch.randn(batch, count, tokens, head_dim, dtype=dtype, device=device)
        tensors.append(x.requires_grad_())
    return tensors


def passes(attention: Attention, tensors: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """The forward without gradients, and the forward with its backward."""
    grad_out = torch.randn_like(tensors[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(*tensors)

    def forward_and_backward() -> Any:
        return torch.autograd.grad(attention(*tensors), tensors, grad_out)

    return {"forward": forward, "both": forward_and_backward}


def rates(attention: Attention, tensors: Sequence[Tensor], pairs: float) -> dict[str, Any]:
    """Time, memory and flops per second of a call.

    They are measured of a forward, and of a forward with its backward.

    pairs: over batch and heads. first_seconds of a result: of its first call, which compiles.
    """
    result: dict[str, Any] = {"pairs": pairs}
    for name, call in passes(attention, tensors).items():
        seconds = first_call(call)
        numbers = measured(call)
        work = 4 * tensors[0].shape[3] * pairs * (1 + BACKWARD if name == "both" else 1)
        flops = work / (numbers["gpu_us"] * 1e-6)
        result[name] = numbers | {"flops": flops, "first_seconds": round(seconds, 2)}
    return result


def worst_error(program: Any, attention: Any, tensors: Sequence[Tensor]) -> float:
    """The largest error of out and gradients against the reference, in roundings.

    A rounding is that of the dtype at the size of the largest number.
    """
    out = attention(*tensors)
    true = cd.reference(program, *tensors)
    assert isinstance(true, Tensor)
    grad_out = torch.randn_like(out)
    results = (out, *torch.autograd.grad(out, tensors, grad_out))
    expected = (true, *torch.autograd.grad(true, tensors, grad_out.double()))
    eps = torch.finfo(out.dtype).eps
    errors = []
    for result, right in zip(results, expected, strict=True):
        size = max(1.0, float(right.abs().max()))
        errors.append(float((result.double() - right).abs().max()) / (eps * size))
    # A maximum of Python drops NaN in some places of the list.
    return float(torch.tensor(errors).max())
