"""Every lowering on a GPU against the reference.

Narrow block masks, the lse and dead rows are among the subjects.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.reference import multiplicity

pytestmark = pytest.mark.gpu

# tools/gpu_emulated runs some of these tests with tensors of the CPU.
DEVICE = "cuda"
TOKENS = 1020
PROGRAMS = {
    "causal": cd.Program((cd.Branch(masks.causal()),)),
    "window": cd.local_window(100),
    "sinks": cd.Program((cd.Branch(masks.causal() & (masks.window(100) | masks.sinks(4))),)),
    "longnet": cd.longnet((256, 512), (1, 3), causal=True),
    "split": cd.longnet((256, 512), (1, 2), heads="split"),
    "hilbert": cd.hilbert_window((30, 34), 4),
    "global": cd.block_sparse(0.3, "global_local", tokens=TOKENS),
}
# The others have no regular blocks or no runs of keys; see test_lowerings and test_lanes.
STRIDED = ("causal", "longnet", "split")
LANES = ("causal", "window", "sinks", "longnet", "split", "global")
WAYS = [
    *itertools.product(PROGRAMS, ("auto", "tiled", "flex")),
    *itertools.product(STRIDED, ("strided",)),
    *itertools.product(LANES, ("lanes",)),
]


def inputs(dtype: torch.dtype, tokens: int = TOKENS) -> list[Tensor]:
    """q, k and v that require gradients.

    There are two key heads and four query heads.
    """
    shapes = ((2, 4, tokens, 64), (2, 2, tokens, 64), (2, 2, tokens, 64))
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """out, and the gradients of the leaves."""
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize(("name", "lowering"), WAYS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(name: str, lowering: str, dtype: torch.dtype) -> None:
    """At most twice dense SDPA's error, plus one rounding.

    SDPA computes the same pairs.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    program, leaves = PROGRAMS[name], inputs(dtype)
    grad = torch.randn_like(leaves[0])
    exact = cd.reference(program, *leaves)
    assert isinstance(exact, Tensor)
    expected = with_gradients(exact, leaves, grad)
    q, k, v = leaves
    counts = multiplicity(program, q, k)
    wide_k, wide_v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, wide_k, wide_v, attn_mask=counts.float().log().to(dtype)
    )
    # SDPA gives NaN in rows that see nothing.
    dense = torch.where(counts.sum(-1, keepdim=True) > 0, dense, 0)
    allowed = with_gradients(dense, leaves, grad)
    results = with_gradients(cd.compile(program, lowering=lowering)(q, k, v), leaves, grad)
    for result, of_sdpa, right in zip(results, allowed, expected, strict=True):
        error, dense_error = (result - right).abs().max(), (of_sdpa - right).abs().max()
        assert not result.isnan().any()
        assert error <= 2 * dense_error + torch.finfo(dtype).eps * right.abs().max()


@pytest.mark.parametrize("lowering", ["auto", "flex", "lanes"])
def test_lse_and_its_gradient(lowering: str) -> None:
    leaves = inputs(torch.float32)
    program = PROGRAMS["sinks"]
    out, lse = cd.compile(program, lowering=lowering)(*leaves, return_lse=True)
    right, right_lse = cd.reference(program, *leaves, return_lse=True)
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(out.sum() + lse.sin().sum(), leaves)
    expected = torch.autograd.grad(right.sum() + right_lse.sin().sum(), leaves)
    for grad, right_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right_grad, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("lowering", ["tiled", "flex", "lanes"])
def test_rows_that_see_nothing_are_zero(lowering: str) -> None:
    leaves = inputs(torch.float16, 300)
    out = cd.compile(masks.documents(lengths=(100,)), lowering=lowering)(*leaves)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert (out[:, :, 100:] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_narrow_block_masks_in_parts() -> None:
    # Lists of up to 2**16 entries are not narrowed.
    tokens = 2**17
    parts = cd.block_masks(masks.window(256) | masks.sinks(4), tokens, tokens, device=DEVICE)
    assert len(parts) > 1
    assert all(part.block_mask.kv_indices.shape[-1] <= 8 for part in parts)
