"""Inputs and comparisons of the tests of compiled programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TAKE_ANY_MASK = ("dense", "tiled", "auto")
TRAINS = (*TAKE_ANY_MASK, "strided")


def tensors(
    heads: int = 4,
    kv_heads: int = 2,
    n: int = 40,
    dim: int = 6,
    value_dim: int = 6,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, heads, n, dim), k and v (batch, kv_heads, n, dim or value_dim), leaves."""
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, value_dim)
    q, k, v = (
        torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    return q, k, v


def same(results: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)
