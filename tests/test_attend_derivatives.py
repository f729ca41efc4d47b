"""Attention: gradients, the lse's gradient, refused derivatives, torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.masks import Mask
from tests.support.attention import TAKE_ANY_MASK, TRAINS, same, same_gradients, tensors

GRADCHECKED: dict[str, Callable[[], Program | Mask]] = {
    "longnet": lambda: cd.longnet((3, 8), (1, 2), causal=True),
    "window dilated": lambda: masks.window(4, 2, dilation=2),
    "neighborhood": lambda: masks.neighborhood((2, 4), 1, edges="shift"),
    "dead rows": lambda: masks.documents(lengths=(4, 3)) & masks.causal(),
    "documents": lambda: masks.documents(ids="ids") & masks.causal(),
}


GRADCHECKS = [*itertools.product(GRADCHECKED, TAKE_ANY_MASK), ("longnet", "strided")]


@pytest.mark.parametrize(("name", "lowering"), GRADCHECKS)
def test_gradcheck(name: str, lowering: str) -> None:
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
    _, expected = cd.reference(program, q, k, v, return_lse=True)
    same_gradients(lse.sin().sum(), expected.sin().sum(), (q, k))
    _, lse = cd.compile(program, lowering=lowering)(q, k, v, return_lse=True)
    (grad_v,) = torch.autograd.grad(lse.sum(), (v,))
    assert (grad_v == 0).all()


def test_gradients_of_a_subset_of_inputs() -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    attend = cd.compile(program)
    out = cd.reference(program, q, k, v)
    assert isinstance(out, Tensor)
    expected = torch.autograd.grad(out.square().sum(), (q, k, v))
    for subset in ((0,), (1,), (2,), (0, 2)):
        inputs = [x.detach().requires_grad_(i in subset) for i, x in enumerate((q, k, v))]
        attend(*inputs).square().sum().backward()
        for i, x in enumerate(inputs):
            assert (x.grad is not None) == (i in subset)
            if x.grad is not None:
                same(x.grad, expected[i])


def test_second_derivatives_are_refused() -> None:
    q, k, v = tensors(n=8)
    loss = cd.compile(masks.causal())(q, k, v).square().sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    message = r"not twice differentiable here.*Use compiled_dilated.reference"
    with pytest.raises(NotImplementedError, match=message):
        grad.sum().backward()


def test_forward_mode_is_refused() -> None:
    q, k, v = (x.detach() for x in tensors(n=8))
    attend = cd.compile(masks.causal())
    message = "no forward-mode derivative here; use reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda q: attend(q, k, v), (q,), (torch.ones_like(q),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match=message):
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

    def reference(*x: Tensor, **options: Any) -> Any:
        return cd.reference(program, *x, **options)

    grads = torch.func.grad(through(attend), argnums=(0, 1, 2))(*inputs)
    same(grads, torch.func.grad(through(reference), argnums=(0, 1, 2))(*inputs))


@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (1, 3, 0), (0, None, None), (None, 2, None), (4, 4, 4)]
)
def test_vmap(dims: tuple[int | None, ...]) -> None:
    program, inputs = cd.longnet((8, 24), (1, 3)), tuple(x.detach() for x in tensors())
    stacked = []
    for x, dim in zip(inputs, dims, strict=True):
        stacked.append(x if dim is None else torch.stack([x, x + 0.1, x * 2], dim))
    out = torch.vmap(cd.compile(program), in_dims=dims)(*stacked)
    for i in range(3):
        entry = []
        for x, dim in zip(stacked, dims, strict=True):
            entry.append(x if dim is None else x.select(dim, i))
        same(out[i], cd.reference(program, *entry))


def test_vmap_of_grad() -> None:
    """Gradients per example."""
    program, inputs = cd.longnet((8, 24), (1, 3)), tuple(x.detach() for x in tensors(batch=3))
    attend = cd.compile(program)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q[None], k[None], v[None])
        return out.square().sum()

    def reference_loss(*x: Tensor) -> Tensor:
        out = cd.reference(program, *x)
        assert isinstance(out, Tensor)
        return out.square().sum()

    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*inputs)
    same(grads, torch.func.grad(reference_loss, argnums=(0, 1, 2))(*inputs))


def test_vmap_over_data() -> None:
    mask = masks.documents(ids="ids") & masks.padding()
    q, k, v = (x.detach() for x in tensors())
    attend = cd.compile(mask)
    ids, padding = torch.randint(0, 3, (3, 2, 40)), torch.rand(1, 40) > 0.7
    out = torch.vmap(lambda ids: attend(q, k, v, data={"ids": ids, "padding": padding}))(ids)
    for i in range(3):
        data = {"ids": ids[i], "padding": padding.expand(2, 40)}
        same(out[i], cd.reference(mask, q, k, v, data=data))
