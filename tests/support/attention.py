"""Inputs and comparisons of the tests of compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import by_name

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
    """Random leaves q, k and v, which get gradients."""
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, value_dim)
    q, k, v = (
        torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    return q, k, v


def same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Tensors, or sequences of them, are equal to the tolerance."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_gradients(
    actual: Any, expected: Any, leaves: Sequence[Tensor], incoming: Any = None
) -> None:
    """The leaves have equal gradients.

    actual, expected: a tensor or several.
    incoming: gradients of these; None for scalars.
    """
    grads = torch.autograd.grad(actual, leaves, incoming)
    same(grads, torch.autograd.grad(expected, leaves, incoming))


def in_every_lowering(names: Sequence[str]) -> list[Any]:
    """(case, lowering), for cases of some names.

    The lowerings are those that compute the case.
    """
    parameters = []
    for name in names:
        case = by_name(name)
        for lowering in TRAINS:
            if lowering != "strided" or not case.refused:
                parameters.append(pytest.param(case, lowering, id=f"{name}-{lowering}"))
    return parameters
