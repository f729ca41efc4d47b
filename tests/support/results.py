"""Results and gradients of attention, against the reference and dense attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import compiled_dilated as cd
from compiled_dilated.reference import multiplicity
from tests.cases import Case, Inputs

TOLERANCE = 1e-10
# q_len, kv_len, q_offset.
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Result:
    """The results of one forward and backward.

    out, lse: with gradients enabled.
    grads: of q, k and v.
    frozen: (out, lse) under no_grad.
    """

    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]
    frozen: tuple[Tensor, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """out, lse and the gradients by name."""
        yield "out", self.out
        yield "lse", self.lse
        yield from zip(("grad_q", "grad_k", "grad_v"), self.grads, strict=True)


def run(attention: Any, inputs: Inputs, with_lse: bool = True, **options: Any) -> Result:
    """Forward and backward of an attention.

    with_lse: the lse has an incoming gradient too.
    """
    options = {"data": inputs.data, "return_lse": True, **options}
    leaves = inputs.q, inputs.k, inputs.v
    out, lse = attention(*leaves, **options)
    outputs, incoming = [out], [inputs.grad_out.to(out.dtype)]
    if with_lse:
        outputs.append(lse)
        incoming.append(inputs.grad_lse.to(lse.dtype))
    grads = torch.autograd.grad(outputs, leaves, incoming)
    with torch.no_grad():
        frozen = attention(*leaves, **options)
    return Result(out.detach(), lse.detach(), grads, frozen)


@lru_cache(maxsize=8)
def truth(
    case: Case, n: int, dtype: torch.dtype, with_lse: bool = True, shape: Shape | None = None
) -> tuple[Inputs, Result]:
    """The inputs of a case and the reference's result.

    n: tokens of the program.
    shape: of the call; n queries and n keys by default.
    """
    q_len, kv_len, q_offset = (n, n, 0) if shape is None else shape
    inputs = case.inputs(n, dtype, q_len, kv_len)
    program = case.program(n)

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return cd.reference(program, q, k, v, q_offset=q_offset, **options)

    return inputs, run(attention, inputs, with_lse)


def _assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal where infinite, else to 1e-10 of the largest finite entry."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: other entries are infinite or NaN"
    assert torch.equal(actual[~finite], expected[~finite]), name
    if finite.any():
        error = (actual[finite] - expected[finite]).abs().max().item()
        largest = expected[finite].abs().max().item()
        message = f"{name}: off by {error:.2e}, largest entry {largest:.2e}"
        assert error <= TOLERANCE * largest, message


def assert_same(actual: Result, expected: Result) -> None:
    """Results, with and without gradients enabled, and gradients are equal in float64."""
    for (name, x), (_, y) in zip(actual.named(), expected.named(), strict=True):
        _assert_equal(name, x, y)
    _assert_equal("out without grad", actual.frozen[0], expected.out)
    _assert_equal("lse without grad", actual.frozen[1], expected.lse)
    dead_rows_are_zero(actual, expected)


def dead_rows_are_zero(actual: Result, expected: Result) -> None:
    """Rows without keys are (0, -inf) with zero gradients.

    Nothing is NaN or infinite.
    """
    dead = expected.lse == -math.inf
    assert (actual.lse[dead] == -math.inf).all()
    assert (actual.out[dead] == 0).all()
    assert (actual.grads[0][dead] == 0).all()
    assert all(x.isfinite().all() for x in (actual.out, *actual.grads))


def no_worse_than_dense(name: str, actual: Tensor, dense: Tensor, exact: Tensor) -> None:
    """The error is at most 2.5 times dense attention's, plus one rounding.

    actual, dense: of attention and of dense attention in low precision.
    exact: in float64, from the same rounded inputs.
    """
    alive = exact.isfinite()
    if not alive.any():
        return
    error, error_of_dense, largest = (
        x[alive].double().abs().max().item() for x in (actual - exact, dense - exact, exact)
    )
    # The largest of a few thousand errors varies from seed to seed; test_native_accuracy.py
    # compares their means.
    allowed = 2.5 * error_of_dense + torch.finfo(actual.dtype).eps * largest
    assert error <= allowed, (
        f"{name}: error {error:.2e}; 2.5 times that of dense attention and a rounding are "
        f"{allowed:.2e}"
    )


def dense_attention(program: cd.Program, inputs: Inputs, expected: Result) -> Result:
    """torch's fused attention over the same pairs.

    Its bias is log c.

    Rows without keys see every key here: they are masked in the result, and send no gradient.
    """
    leaves = inputs.q, inputs.k, inputs.v
    counts = multiplicity(program, inputs.q, inputs.k, data=inputs.data)
    dead = expected.lse == -math.inf
    dead_rows = dead[..., None]
    bias = torch.where(dead_rows, 0.0, counts.float().log())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *leaves, attn_mask=bias, enable_gqa=True
        )
    grads = torch.autograd.grad(out, leaves, inputs.grad_out.masked_fill(dead_rows, 0.0))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    lse = kernel(*leaves, attn_mask=bias)[1].detach().masked_fill(dead, -math.inf)
    out = out.detach().masked_fill(dead_rows, 0.0)
    return Result(out, lse, grads, (out, lse))
