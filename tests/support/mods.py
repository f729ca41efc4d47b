"""Inputs and comparisons of the tests of score_mods and mask_mods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import compiled_dilated as cd
from compiled_dilated import Program
from compiled_dilated.masks import Mask

N, HEADS = 40, 4


def tensors(
    n: int = N, dtype: torch.dtype = torch.float64, heads: int = HEADS, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Random leaves q, k and v.

    Shapes (2, heads, n, 6) and (2, heads // 2, n, 6).
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, heads, n, 6), (2, heads // 2, n, 6), (2, heads // 2, n, 6)
    q, k, v = (
        torch.randn(x, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for x in shapes
    )
    return q, k, v


def same(actual: Any, expected: Any, tolerance: float = 1e-10, about: str = "") -> None:
    """Assert that tensors are near; `about` comes before the message."""
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, msg=lambda message: f"{about} {message}"
    )


def gradients(results: tuple[Tensor, Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a loss of out and lse.

    They are zeros for leaves that the loss does not depend on.
    """
    out, lse = results
    lse = torch.where(lse == -torch.inf, 0.0, lse)  # of rows that see nothing
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    loss = (out * weights).sum() + lse.sin().sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def same_as_reference(
    attention: Callable[..., Any],
    program: Program | Mask,
    inputs: Sequence[Tensor],
    learned: Sequence[Tensor],
    **options: Any,
) -> None:
    """Compare out, lse and gradients with the reference, in float64.

    The gradients are of q, k, v and captured tensors.
    """
    leaves = (*inputs, *learned)
    out_and_lse = attention(*inputs, **options)
    expected: Any = cd.reference(program, *inputs, return_lse=True, **options)
    names = ["out", "lse", *(f"gradient {number}" for number in range(len(leaves)))]
    results = (*out_and_lse, *gradients(out_and_lse, leaves))
    expected_results = (*expected, *gradients(expected, leaves))
    for name, x, y in zip(names, results, expected_results, strict=True):
        same(x, y, about=name)


def flex(inputs: Sequence[Tensor], mod: Any, block_mask: BlockMask | None) -> Tensor:
    """torch's own attention, eager."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attend: Any = flex_attention
        out: Tensor = attend(*inputs, score_mod=mod, block_mask=block_mask, enable_gqa=True)
    return out


def attend_in(way: str, program: Program | Mask) -> cd.Attend:
    """The program by a lowering, or over two ranks."""
    return cd.compile(program, ranks=2) if way == "ring" else cd.compile(program, lowering=way)


def in_one_graph(function: Any, backend: str = "aot_eager") -> Any:
    """A function compiled to one graph."""
    return torch.compile(function, backend=backend, fullgraph=True)


def reductions(rows: Tensor) -> dict[str, Callable[..., Any]]:
    return {
        "sum": lambda s, b, h, i, j: s + (rows[i] * rows[j]).sum(),
        "torch.dot": lambda s, b, h, i, j: s + torch.dot(rows[i], rows[j]),
        "matmul": lambda s, b, h, i, j: s + rows[i] @ rows[j],
        "mean": lambda s, b, h, i, j: s + (rows[i] - rows[j]).abs().mean(dim=-1),
        "norm": lambda s, b, h, i, j: s - (rows[i] - rows[j] + 0.1).norm(),
        "logsumexp": lambda s, b, h, i, j: torch.logsumexp(
            torch.stack([s, rows[i, 0], rows[j, 0]]), 0
        ),
    }
