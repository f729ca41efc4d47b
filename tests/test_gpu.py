"""On a GPU: every lowering forward and backward against the reference, narrow block masks in several parts, the lse."""

from __future__ import annotations

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.reference import multiplicity

pytestmark = pytest.mark.gpu

PROGRAMS = {
    "causal": cd.Program((cd.Branch(masks.causal()),)),
    "window": cd.local_window(100),
    "sinks": cd.Program((cd.Branch(masks.causal() & (masks.window(100) | masks.sinks(4))),)),
    "longnet": cd.longnet((256, 512), (1, 3), causal=True),
    "split": cd.longnet((256, 512), (1, 2), heads="split"),
    "hilbert": cd.hilbert_window((30, 34), 4),
    "global": cd.block_sparse(0.3, "global_local", tokens=1020),
}


def _inputs(dtype: torch.dtype, tokens: int = 1020) -> list[torch.Tensor]:
    shapes = ((2, 4, tokens, 64), (2, 2, tokens, 64), (2, 2, tokens, 64))
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def _errors(
    out: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


# What is not made of regular blocks the strided lowering refuses, see test_lowerings.
REGULAR = ("causal", "longnet", "split")
WAYS = [
    (name, way)
    for name in PROGRAMS
    for way in ("auto", "strided", "tiled", "flex")
    if way != "strided" or name in REGULAR
]


@pytest.mark.parametrize(("name", "lowering"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(name: str, lowering: str, dtype: torch.dtype) -> None:
    """Error against the fp64 reference at most twice dense SDPA's own on the same pairs, plus one rounding."""
    torch.backends.cuda.matmul.allow_tf32 = False
    program, inputs = PROGRAMS[name], _inputs(dtype)
    grad = torch.randn_like(inputs[0])
    truth = _errors(cd.reference(program, *inputs), inputs, grad)
    q, k, v = inputs
    counts = multiplicity(program, q, k)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q,
        *(x.repeat_interleave(2, dim=1) for x in (k, v)),
        attn_mask=counts.float().log().to(dtype),
    )
    dense = _errors(torch.where(counts.sum(-1, keepdim=True) > 0, dense, 0), inputs, grad)
    ours = _errors(cd.compile(program, lowering=lowering)(q, k, v), inputs, grad)
    for mine, theirs, right in zip(ours, dense, truth, strict=True):
        error, allowed = (mine - right).abs().max(), (theirs - right).abs().max()
        assert not mine.isnan().any()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * right.abs().max()


@pytest.mark.parametrize("lowering", ["auto", "flex"])
def test_lse_and_its_gradient(lowering: str) -> None:
    inputs = _inputs(torch.float32)
    program = PROGRAMS["sinks"]
    out, lse = cd.compile(program, lowering=lowering)(*inputs, return_lse=True)
    right, right_lse = cd.reference(program, *inputs, return_lse=True)
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-4, atol=1e-4)
    mine = torch.autograd.grad((out.sum() + lse.sin().sum()), inputs)
    theirs = torch.autograd.grad((right.sum() + right_lse.sin().sum()), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_rows_that_see_nothing() -> None:
    inputs = _inputs(torch.float16, 300)
    for lowering in ("tiled", "flex"):
        out = cd.compile(masks.documents(lengths=(100,)), lowering=lowering)(*inputs)
        grads = torch.autograd.grad(out.float().sum(), inputs)
        assert (out[:, :, 100:] == 0).all()
        assert all(grad.isfinite().all() for grad in grads)


def test_narrow_block_masks_in_parts() -> None:
    parts = cd.block_masks(masks.window(256) | masks.sinks(4), 16384, 16384, device="cuda")
    assert len(parts) > 1
    assert all(part.block_mask.kv_indices.shape[-1] <= 8 for part in parts)
