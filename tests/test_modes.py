"""Modes of the caller change nothing: default dtype and device, deterministic, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from tests import caches
from tests.comparing import assert_close, exact_results, leaves, normal
from tests.support.turns import in_turn


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype for a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms for a block."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Any] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
}
EDGE_PROGRAMS: dict[str, Any] = {
    "window": masks.window(9) | masks.sinks(2),
    "longnet": cd.longnet((16, 32), (1, 2), causal=True),
    "documents": masks.documents(lengths=(9, 20, 11)),
    "from_mod": masks.from_mod(lambda b, h, i, j: (i * 7 + j * 3) % 4 != 1),
}


@pytest.mark.parametrize(
    ("mode", "program", "ranks"),
    in_turn(list(MODES), list(itertools.product(EDGE_PROGRAMS, (None, 2))), count=4),
)
def test_modes_of_the_caller_change_nothing(mode: str, program: str, ranks: int | None) -> None:
    q, k, v = (x.float() for x in normal((1, 4, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8)))
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(5), requires_grad=True)

    def learned(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + table[q_idx, kv_idx] - 0.03 * (q_idx - kv_idx).abs().float()

    def compute() -> list[Tensor]:
        """Results and gradients, with a score_mod and without."""
        inputs, attend = leaves(q, k, v), cd.compile(EDGE_PROGRAMS[program], ranks=ranks)
        out, lse = attend(*inputs, score_mod=learned, return_lse=True)
        plain = attend(*inputs)
        incoming = [out.detach(), plain.detach()]
        grads = torch.autograd.grad([out, plain], [*inputs, table], incoming)
        return [out, lse, plain, *grads]

    expected = compute()
    caches.forget()
    with MODES[mode]():
        results = compute()
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype
        torch.testing.assert_close(result, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lowering", ["auto", "dense", "strided", "tiled"])
def test_autocast_casts_the_inputs_and_nothing_inside(lowering: str) -> None:
    """Autocast equals a cast of q, k and v by hand.

    A float32 table and the lse stay float32.
    """
    inputs = leaves(*(x.float() * 3 for x in normal((1, 2, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8))))
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(5))

    def biased(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + table[q_idx, kv_idx]

    attend = cd.compile(masks.segments(9) & masks.causal(), lowering=lowering)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attend(*inputs, score_mod=biased, return_lse=True)
        grads = torch.autograd.grad(out.float().sum(), inputs)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    cast = [x.to(torch.bfloat16) for x in inputs]
    out_by_hand, lse_by_hand = attend(*cast, score_mod=biased, return_lse=True)
    grads_by_hand = torch.autograd.grad(out_by_hand.float().sum(), inputs)
    results, expected = (out, lse, *grads), (out_by_hand, lse_by_hand, *grads_by_hand)
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def test_large_inputs_under_autocast_have_the_gradient_of_their_scores() -> None:
    inputs = leaves(*(x.float() * 100 for x in normal((1, 1, 1, 4), (1, 1, 1, 4), (1, 1, 1, 4))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = cd.compile(masks.full())(
            *inputs, score_mod=lambda s, b, h, i, j: s * 1.0, return_lse=True
        )
    assert lse.dtype == torch.float32
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert torch.equal(grads[2], torch.ones_like(grads[2]))


def test_plans_cached_in_inference_mode_serve_training() -> None:
    inputs = leaves(*normal((1, 2, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8)))
    caches.forget()
    mask = masks.window(9) | masks.sinks(2)
    attend = cd.compile(mask)
    with torch.inference_mode():
        attend(*inputs)
    out = attend(*inputs)
    assert_close([out], exact_results(mask, *inputs))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))
