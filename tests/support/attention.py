"""Inputs and comparisons of the tests of compiled programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TAKE_ANY_MASK = ("dense", "tiled", "auto")
TRAINS = (*TAKE_ANY_MASK, "strided")
# Options of `compile` that take any mask: lowerings and rings.
WAYS: tuple[dict[str, Any], ...] = (
    {"lowering": "dense"},
    {"lowering": "tiled"},
    {"lowering": "auto"},
    {"ranks": 2},
    {"ranks": 3, "layout": "striped"},
)
# For masks of segments, residue classes and causal() only.
STRIDED = {"lowering": "strided"}


def way_name(way: dict[str, Any]) -> str:
    """The options of a way as a test's id."""
    return " ".join(f"{name}={value}" for name, value in way.items())


def tensors(
    heads: int = 4,
    kv_heads: int = 2,
    n: int = 40,
    dim: int = 6,
    value_dim: int = 6,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, value_dim)
    q, k, v = (
        torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    return q, k, v


def same(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
