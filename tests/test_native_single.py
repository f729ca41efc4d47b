"""Native kernels: tiles of one query, as in decoding, whose lanes are the numbers of a row."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from tests.comparing import assert_close, exact_results, leaves, results_and_gradients

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)

VISIBLE = masks.causal() & masks.padding("padding")
KEYS = 150
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}


def inputs_of(
    dtype: torch.dtype, head_dim: int, value_dim: int, queries: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    q = torch.randn(2, 4, queries, head_dim, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, KEYS, head_dim, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 2, KEYS, value_dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def padding() -> Tensor:
    """The first keys of the second sequence are hidden."""
    return torch.stack([torch.zeros(KEYS), torch.arange(KEYS) < 37]).bool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(1, 1), (5, 24), (64, 64), (80, 7), (256, 256)], ids=str)
def test_one_query_is_that_of_the_reference(widths: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = inputs_of(dtype, *widths)
    options: dict[str, Any] = {"data": {"padding": padding()}, "q_offset": 120}
    out, lse = cd.compile(VISIBLE, lowering="native")(q, k, v, return_lse=True, **options)
    exact, exact_lse = cd.reference(
        VISIBLE, q.double(), k.double(), v.double(), return_lse=True, **options
    )
    assert_close([out], [exact], TOLERANCES[dtype])
    assert_close([lse], [exact_lse], min(TOLERANCES[dtype], 1e-5))


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_scores_are_changed_and_scaled(scale: float) -> None:
    q, k, v = inputs_of(torch.float32, 64, 64)

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score * 0.5 - 0.01 * (i - j)

    options: dict[str, Any] = {"q_offset": KEYS - 1, "score_mod": change, "scale": scale}
    out = cd.compile(masks.window(100), lowering="native")(q, k, v, **options)
    exact = exact_results(masks.window(100), q.double(), k.double(), v.double(), **options)
    assert_close([out], exact, TOLERANCES[torch.float32])


def test_a_query_that_sees_nothing_and_hidden_numbers_that_are_not_finite() -> None:
    q, k, v = inputs_of(torch.float32, 64, 64)
    hidden = padding()
    hidden[1] = True
    k[0, 0, 140], v[0, 1, 145] = torch.nan, torch.inf
    options: dict[str, Any] = {"data": {"padding": hidden}, "q_offset": 130}
    attend = cd.compile(VISIBLE, lowering="native")
    out, lse = attend(q, k, v, return_lse=True, **options)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    clean = attend(q, k[:, :, :131].clone(), v[:, :, :131].clone(), q_offset=130,
                   data={"padding": hidden[:, :131]})  # fmt: skip
    assert torch.equal(out, clean)
    # A number that is seen is in the results of those who see it alone.
    v[0, 1, 3, 5] = torch.nan
    out = attend(q, k, v, **options)
    assert out[0, 2:, 0, 5].isnan().all()
    assert out[0].isnan().sum() == 2


def test_the_last_query_of_a_sequence_and_gradients() -> None:
    q, k, v = inputs_of(torch.float64, 24, 24, queries=65)
    mask = masks.causal() & masks.window(40)
    attend = cd.compile(mask, lowering="native")
    results = results_and_gradients(attend, leaves(q, k, v), q_offset=KEYS - 65)

    def reference(*inputs: Tensor, **options: Any) -> Any:
        return cd.reference(mask, *inputs, **options)

    expected = results_and_gradients(reference, leaves(q, k, v), q_offset=KEYS - 65)
    assert_close(results, expected, TOLERANCES[torch.float64])


def test_ranks_of_one_token_merge_the_results_of_their_neighbours_keys() -> None:
    q, k, v = inputs_of(torch.float64, 20, 20, queries=4)
    k, v = k[:, :, :4], v[:, :, :4]
    out = cd.compile(masks.causal(), ranks=4)(q, k, v)
    assert_close([out], exact_results(masks.causal(), q, k, v), TOLERANCES[torch.float64])
