"""Attention: gradients, the lse's gradient, refused derivatives, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.attention import TRAINS, same, tensors

# Derivatives
GRADCHECKED = {
    "longnet": lambda: cd.longnet((3, 8), (1, 2), causal=True),
    "window dilated": lambda: masks.window(4, 2, dilation=2),
    "neighborhood": lambda: masks.neighborhood((2, 4), 1, edges="shift"),
    "dead rows": lambda: masks.documents(lengths=(4, 3)) & masks.causal(),
    "documents": lambda: masks.documents(ids="ids") & masks.causal(),
}


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name: str, lowering: str) -> None:
    if lowering == "strided" and name != "longnet":
        return
    program = GRADCHECKED[name]()
    attend = cd.compile(program, lowering=lowering)
    data = {"ids": torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2]])} if name == "documents" else None
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        out, lse = attend(q, k, v, data=data, scale=0.7, sink_logits=sinks, return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(loss, (*tensors(2, 1, 8, 2, 3, batch=1), sinks))


@pytest.mark.parametrize("lowering", TRAINS)
def test_gradient_of_lse_only(lowering: str) -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    _, lse = cd.compile(program, lowering=lowering)(q, k, v, return_lse=True)
    _, want = cd.reference(program, q, k, v, return_lse=True)
    for mine, theirs in zip(
        torch.autograd.grad(lse.sin().sum(), (q, k)),
        torch.autograd.grad(want.sin().sum(), (q, k)),
        strict=True,
    ):
        same(mine, theirs)
    (grad_v,) = torch.autograd.grad(
        cd.compile(program, lowering=lowering)(q, k, v, return_lse=True)[1].sum(), (v,)
    )
    assert (grad_v == 0).all()


def test_gradients_of_a_subset_of_inputs() -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    attend = cd.compile(program)
    want = torch.autograd.grad(cd.reference(program, q, k, v).square().sum(), (q, k, v))
    for wanted in ((0,), (1,), (2,), (0, 2)):
        inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
        attend(*inputs).square().sum().backward()
        for i, x in enumerate(inputs):
            assert (x.grad is not None) == (i in wanted)
            if x.grad is not None:
                same(x.grad, want[i])


def test_second_derivatives_are_refused() -> None:
    q, k, v = tensors(n=8)
    (grad,) = torch.autograd.grad(
        cd.compile(masks.causal())(q, k, v).square().sum(), q, create_graph=True
    )
    with pytest.raises(
        NotImplementedError, match=r"not twice differentiable here.*Use compiled_dilated.reference"
    ):
        grad.sum().backward()


def test_forward_mode_is_refused() -> None:
    q, k, v = (x.detach() for x in tensors(n=8))
    attend = cd.compile(masks.causal())
    with pytest.raises(
        NotImplementedError, match=r"no forward-mode derivative here; use reverse mode"
    ):
        torch.func.jvp(lambda q: attend(q, k, v), (q,), (torch.ones_like(q),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative here"):
            attend(dual, k, v)


def test_backward_twice_with_retained_graph() -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    out = cd.compile(program)(q, k, v)
    first = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), q)[0])


@pytest.mark.parametrize("lowering", TRAINS)
def test_func_grad(lowering: str) -> None:
    program, inputs = cd.longnet((8, 24), (1, 3)), tuple(x.detach() for x in tensors())
    attend = cd.compile(program, lowering=lowering)

    def through(attention: Callable[..., Any]) -> Callable[..., Tensor]:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = attention(q, k, v, return_lse=True)
            return out.square().sum() + lse.sin().sum()

        return loss

    got = torch.func.grad(through(attend), argnums=(0, 1, 2))(*inputs)
    want = torch.func.grad(
        through(lambda *x, **o: cd.reference(program, *x, **o)), argnums=(0, 1, 2)
    )(*inputs)
    for mine, theirs in zip(got, want, strict=True):
        same(mine, theirs)


@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (1, 3, 0), (0, None, None), (None, 2, None), (4, 4, 4)]
)
def test_vmap(dims: tuple[int | None, ...]) -> None:
    program, inputs = cd.longnet((8, 24), (1, 3)), tuple(x.detach() for x in tensors())
    stacked = [
        x if dim is None else torch.stack([x, x + 0.1, x * 2], dim)
        for x, dim in zip(inputs, dims, strict=True)
    ]
    got = torch.vmap(cd.compile(program), in_dims=dims)(*stacked)
    for i in range(3):
        picked = [
            x if dim is None else x.select(dim, i) for x, dim in zip(stacked, dims, strict=True)
        ]
        same(got[i], cd.reference(program, *picked))


def test_vmap_of_grad() -> None:
    """Gradients per example."""
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tuple(x.detach() for x in tensors(batch=3))
    attend = cd.compile(program)
    each = torch.vmap(
        torch.func.grad(
            lambda q, k, v: attend(q[None], k[None], v[None]).square().sum(), argnums=(0, 1, 2)
        )
    )(q, k, v)
    want = torch.func.grad(
        lambda q, k, v: cd.reference(program, q, k, v).square().sum(), argnums=(0, 1, 2)
    )(q, k, v)
    for mine, theirs in zip(each, want, strict=True):
        same(mine, theirs)


def test_vmap_over_data() -> None:
    mask, (q, k, v) = (
        masks.documents(ids="ids") & masks.padding(),
        tuple(x.detach() for x in tensors()),
    )
    attend = cd.compile(mask)
    ids, padding = torch.randint(0, 3, (3, 2, 40)), torch.rand(1, 40) > 0.7
    got = torch.vmap(lambda ids: attend(q, k, v, data={"ids": ids, "padding": padding}))(ids)
    for i in range(3):
        same(
            got[i],
            cd.reference(mask, q, k, v, data={"ids": ids[i], "padding": padding.expand(2, 40)}),
        )
