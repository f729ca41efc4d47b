"""Attention compared with the reference: results and gradients, infinities and NaN too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated.masks import Mask
from compiled_dilated.programs import Program

TOLERANCE = 1e-10


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that get gradients."""
    return [x.detach().clone().requires_grad_() for x in tensors]


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Tensors of normal numbers in float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def assert_close(
    results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE
) -> None:
    """Equal to the tolerance; infinite and NaN in the same places."""
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(
            result.double(), value.double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


def exact_results(program: Program | Mask, *inputs: Tensor, **options: Any) -> list[Tensor]:
    """The reference's [out], or [out, lse] with return_lse."""
    results = cd.reference(program, *inputs, **options)
    return [results] if isinstance(results, Tensor) else list(results)


def results_and_gradients(
    attention: Any, inputs: Sequence[Tensor], learned: Sequence[Tensor] = (), **options: Any
) -> list[Tensor]:
    """out, lse, and the gradients of inputs and of learned tensors.

    The loss weighs every entry differently.
    """
    q, k, v = inputs
    out, lse = attention(q, k, v, return_lse=True, **options)
    alive = torch.where(lse.isfinite(), lse, 0.0)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    loss = (out * weights).sum() + (alive * 0.3).sum()
    return [out, lse, *torch.autograd.grad(loss, [*inputs, *learned])]
