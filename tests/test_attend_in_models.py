"""Attention in models: export, autocast, modes, precision, layouts of heads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.masks import Mask
from tests.cases import by_name
from tests.support.attention import TRAINS, same, tensors


# Export, autocast, modes
class Model(nn.Module):
    """Attention inside a user's module."""

    def __init__(self, program: Program | Mask, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.attend = cd.compile(program)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(x).chunk(3, dim=-1)
        )
        out: Tensor = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_export() -> None:
    model, x = Model(cd.longnet((8, 24), (1, 3), causal=True)), torch.randn(2, 40, 8)
    exported = torch.export.export(
        model, (x,), dynamic_shapes={"x": {1: torch.export.Dim("tokens", min=2, max=4096)}}
    )
    assert [node.target for node in exported.graph.nodes if "attend" in str(node.target)] == [
        torch.ops.compiled_dilated.attend.default
    ]
    for n in (40, 2, 131):
        x = torch.randn(2, n, 8)
        same(exported.module()(x), model(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    attend = cd.compile(masks.causal())
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = attend(q, k, v)
        mixed = attend(q.to(dtype), k, v)  # what a projection gives beside a float32 cache
    assert out.dtype == mixed.dtype == dtype
    assert torch.equal(out, mixed)
    assert torch.equal(out, attend(*(x.to(dtype) for x in (q, k, v))))
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert attend(*(x.double() for x in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_without_gradients(mode: Callable[[], Any]) -> None:
    program, (q, k, v) = cd.hilbert_window((5, 8), 1), tensors()
    attend = cd.compile(program)
    with mode():
        out = attend(q, k, v)
    assert not out.requires_grad
    same(out, cd.reference(program, q, k, v).detach())
    # Nothing that was cached there stands in the way of training.
    attend(q, k, v).sum().backward()
    assert q.grad is not None


def test_a_model_goes_to_other_precisions_and_is_copied() -> None:
    model, x = Model(cd.longnet((8, 24), (1, 3))), torch.randn(2, 40, 8)
    want = model(x)
    same(copy.deepcopy(model)(x), want, 0)
    same(pickle.loads(pickle.dumps(model))(x), want, 0)
    same(model.double()(x.double()).float(), want, 1e-5)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# Layouts and shapes
def from_bnhd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def from_packed(x: Tensor) -> Tensor:
    return torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]


def from_transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_token(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2)[:, :, ::2]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


LAYOUTS = (from_bnhd, from_packed, from_transposed, every_other_token, expanded)


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["longnet causal", "hilbert window", "window or sinks", "full", "causal"]
)
def test_layouts(name: str, layout: Callable[[Tensor], Tensor], lowering: str) -> None:
    case = by_name(name)
    if lowering == "strided" and case.refused:
        return
    inputs, program = case.inputs(331, torch.float64), case.program(331)
    leaves = (inputs.q, inputs.k, inputs.v)
    laid = tuple(layout(x) for x in leaves)
    assert any(not x.is_contiguous() for x in laid)
    out = cd.compile(program, lowering=lowering)(*laid)
    want = cd.reference(program, *laid)
    same(out, want)
    back = layout(inputs.grad_out)
    for mine, theirs in zip(
        torch.autograd.grad(out, leaves, back), torch.autograd.grad(want, leaves, back), strict=True
    ):
        same(mine, theirs)


@pytest.mark.parametrize(
    "call", [lambda attend: attend, lambda attend: torch.compile(attend, backend="aot_eager")]
)
@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("name", ["longnet causal", "hilbert window", "full"])
def test_heads_of_a_models_tokens_are_joined_without_a_copy(
    name: str, ranks: int | None, call: Callable[[cd.Attend], Callable[..., Tensor]]
) -> None:
    """out lies token by token where q does, head by head where q does."""
    case = by_name(name)
    inputs, attend = (
        case.inputs(331, torch.float32),
        call(cd.compile(case.program(331), ranks=ranks)),
    )
    q, k, v = (from_bnhd(x) for x in (inputs.q, inputs.k, inputs.v))
    joined = attend(q, k, v).transpose(1, 2)
    assert joined.flatten(2).data_ptr() == joined.data_ptr()
    out = attend(inputs.q, inputs.k, inputs.v)
    assert out.is_contiguous()
    same(joined.transpose(1, 2), out, 1e-6)
