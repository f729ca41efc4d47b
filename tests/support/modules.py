"""Inputs and comparisons of the tests of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Program

LENGTHS, RATES = (16, 40), (1, 3)
LONGNET = cd.longnet(LENGTHS, RATES)
CAUSAL = cd.longnet(LENGTHS, RATES, causal=True)


def inputs(
    n: int, dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 4, batch: int = 2
) -> list[Tensor]:
    """Leaves query, key and value, (B, N, H, 8)."""
    shapes = [(batch, n, count, 8) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def reference(
    program: Program, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    """The reference on (B, N, H, D)."""
    out = cd.reference(program, *(x.transpose(1, 2) for x in (query, key, value)), **options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def right_padding(lengths: list[int], n: int) -> Tensor:
    """(B, N), True from each length on."""
    return torch.arange(n) >= torch.tensor(lengths)[:, None]


def assert_same(
    out: Tensor,
    expected: Tensor,
    leaves: Sequence[Tensor],
    tolerance: float = 1e-10,
    retain_graph: bool = False,
) -> None:
    """Equal results, and equal gradients of the leaves.

    The incoming gradient is random.
    """
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad_out, retain_graph=retain_graph)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out)
    torch.testing.assert_close(grads, expected_grads, rtol=tolerance, atol=tolerance)
