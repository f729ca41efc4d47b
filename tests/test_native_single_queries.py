"""Single queries, which the native kernel computes along their rows, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks

KEYS = 150
# The tolerance of each dtype.
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-12, torch.float16: 2e-3}
PROGRAMS = {
    "full": masks.full(),
    "window": masks.causal() & masks.window(70),
    "dilated": masks.causal() & masks.window(140, 0, 3),
    "padding": masks.causal() & masks.padding("hidden"),
    "branches": cd.longnet((32, 128), (1, 4), causal=True),
    "nothing is seen": ~masks.full(),
}


def qkv(dtype: torch.dtype, head_dim: int, value_dim: int) -> list[Tensor]:
    """A query for four heads, and keys and values for two."""
    generator = torch.Generator().manual_seed(head_dim)
    sizes = ((4, 1, head_dim), (2, KEYS, head_dim), (2, KEYS, value_dim))
    return [torch.randn(2, *size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_single_query_is_that_of_the_reference(name: str, dtype: torch.dtype) -> None:
    program = PROGRAMS[name]
    hidden = torch.arange(KEYS)[None] % torch.tensor([[3], [7]]) == 1
    options: dict[str, Any] = {"data": {"hidden": hidden}} if name == "padding" else {}
    attend = cd.compile(program, lowering="native")
    # Widths that are, and are not, complete vectors.
    for widths in ((64, 64), (20, 33), (1, 1)):
        q, k, v = qkv(dtype, *widths)
        for q_offset in (0, 63, 149):
            out, lse = attend(q, k, v, q_offset=q_offset, return_lse=True, **options)
            wide = (x.double() for x in (q, k, v))
            expected = cd.reference(program, *wide, q_offset=q_offset, **options)
            error = (out.double() - expected).abs().max()
            assert error <= DTYPES[dtype] * max(1.0, float(expected.abs().max()))
            assert not lse.isnan().any()


def test_functions_of_scores_and_scales() -> None:
    def bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score * 0.5 - 0.1 * (q - kv) + h

    q, k, v = qkv(torch.float32, 64, 64)
    attend = cd.compile(PROGRAMS["window"], lowering="native")
    for scale in (0.3, -0.3, 0.0):
        options: dict[str, Any] = {"q_offset": 100, "scale": scale, "score_mod": bias}
        expected = cd.reference(PROGRAMS["window"], *(x.double() for x in (q, k, v)), **options)
        torch.testing.assert_close(
            attend(q, k, v, **options).double(), expected, rtol=1e-5, atol=1e-5
        )


def test_single_queries_are_merged() -> None:
    """Each of four ranks has one token, and merges the results of its neighbours' keys."""
    q, k, v = (torch.randn(2, 4, 4, 20) for _ in range(3))
    out = cd.compile(masks.causal(), ranks=4)(q, k, v)
    expected = cd.reference(masks.causal(), *(x.double() for x in (q, k, v)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
