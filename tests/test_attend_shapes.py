"""Attention: grouped heads, empty inputs, padding."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.attention import TRAINS, same, same_gradients, tensors


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1), (12, 4)])
def test_grouped_heads(heads: int, kv_heads: int, lowering: str) -> None:
    """Offsets per head, and shares of heads, cut across the groups."""
    for program in (
        cd.longnet((8, 24), (2, 3)),
        cd.longnet((8, 24, 40), (1, 2, 5), heads="split"),
        masks.congruent(4, "grouped"),
    ):
        leaves = tensors(heads, kv_heads)
        out = cd.compile(program, lowering=lowering)(*leaves)
        expected = cd.reference(program, *leaves)
        same(out, expected)
        same_gradients(out, expected, leaves, torch.randn_like(out))


@pytest.mark.parametrize(
    ("batch", "heads", "n", "dim", "value_dim"),
    [(0, 2, 8, 4, 4), (2, 0, 8, 4, 4), (2, 2, 0, 4, 4)],
    ids=["batch", "heads", "tokens"],
)
def test_empty_inputs(batch: int, heads: int, n: int, dim: int, value_dim: int) -> None:
    leaves = tensors(heads, heads, n, dim, value_dim, batch)
    for program in (masks.causal(), cd.longnet((4, 8), (1, 2))):
        out, lse = cd.compile(program)(*leaves, return_lse=True)
        same((out, lse), cd.reference(program, *leaves, return_lse=True))
        for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert grad.shape == x.shape


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0)])
def test_empty_queries_or_keys(q_len: int, kv_len: int) -> None:
    q, k, v = tensors(n=5)
    out, lse = cd.compile(masks.window(3))(
        q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len], return_lse=True
    )
    assert out.shape == (2, 4, q_len, 6)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), k)
    assert (grad == 0).all()


def test_values_without_numbers_are_refused() -> None:
    q, k, v = tensors(n=5)
    for attend in (cd.compile(masks.causal()), partial(cd.reference, masks.causal())):
        with pytest.raises(ValueError, match="v must have a head_dim of 1 at least; got 0"):
            attend(q, k, v[..., :0])


def test_contents_of_padding_have_no_effect() -> None:
    """Padded keys and values affect no result and get no gradient."""
    mask, (q, k, v) = masks.padding() & masks.window(30), tensors(dtype=torch.float32)
    padding = torch.arange(40).expand(2, 40) >= 30
    attend = cd.compile(mask)
    expected = attend(q, k, v, data={"padding": padding})
    filled = []
    for x in (k, v):
        filled.append(x.detach().masked_fill(padding[:, None, :, None], 1e30).requires_grad_())
    out = attend(q, *filled, data={"padding": padding})
    assert torch.equal(out, expected)
    for grad in torch.autograd.grad(out.sum(), filled):
        assert (grad[:, :, 30:] == 0).all()
