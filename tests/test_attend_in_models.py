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
from tests.cases import Case, by_name
from tests.support.attention import in_every_lowering, same, same_gradients, tensors
from tests.support.turns import in_turn

# Export, autocast, modes


class Model(nn.Module):
    """Attention inside a user's module."""

    def __init__(self, program: Program | Mask, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.attend = cd.compile(program)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        projections = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projections)
        out: Tensor = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_export() -> None:
    model, x = Model(cd.longnet((8, 24), (1, 3), causal=True)), torch.randn(2, 40, 8)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {1: tokens}})
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.compiled_dilated.attend.default) == 1
    for n in (40, 2, 131):
        x = torch.randn(2, n, 8)
        same(exported.module()(x), model(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    attend = cd.compile(masks.causal())
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = attend(q, k, v)
        mixed = attend(q.to(dtype), k, v)  # a projection beside a float32 cache
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
    expected = cd.reference(program, q, k, v)
    assert isinstance(expected, Tensor)
    same(out, expected.detach())
    # Caches filled in that mode serve training too.
    attend(q, k, v).sum().backward()
    assert q.grad is not None


def test_a_model_goes_to_other_precisions_and_is_copied() -> None:
    model, x = Model(cd.longnet((8, 24), (1, 3))), torch.randn(2, 40, 8)
    expected = model(x)
    same(copy.deepcopy(model)(x), expected, 0)
    same(pickle.loads(pickle.dumps(model))(x), expected, 0)
    same(model.double()(x.double()).float(), expected, 1e-5)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# Layouts and shapes


def from_bnhd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def from_packed(x: Tensor) -> Tensor:
    return torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]


def from_transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_second_token(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2)[:, :, ::2]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


LAYOUTS = (from_bnhd, from_packed, from_transposed, every_second_token, expanded)


LAID_OUT = ("longnet causal", "hilbert window", "window or sinks", "full", "causal")


@pytest.mark.parametrize(("case", "lowering"), in_every_lowering(LAID_OUT))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: Case, lowering: str, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, program = case.inputs(331, torch.float64), case.program(331)
    leaves = (inputs.q, inputs.k, inputs.v)
    views = tuple(layout(x) for x in leaves)
    assert any(not x.is_contiguous() for x in views)
    out = cd.compile(program, lowering=lowering)(*views)
    expected = cd.reference(program, *views)
    same(out, expected)
    same_gradients(out, expected, leaves, layout(inputs.grad_out))


@pytest.mark.parametrize(
    ("name", "ranks", "compiled"),
    in_turn(
        ("longnet causal", "hilbert window", "full"),
        ((None, True), (2, False), (None, False), (2, True)),
        count=2,
    ),
)
def test_heads_of_a_models_tokens_are_joined_without_a_copy(
    name: str, ranks: int | None, compiled: bool
) -> None:
    """out has q's layout: token by token, or head by head."""
    case, n = by_name(name), 67
    inputs = case.inputs(n, torch.float32)
    attend: Any = cd.compile(case.program(n), ranks=ranks)
    if compiled:
        attend = torch.compile(attend, backend="aot_eager")
    q, k, v = (from_bnhd(x) for x in (inputs.q, inputs.k, inputs.v))
    joined = attend(q, k, v).transpose(1, 2)
    assert joined.flatten(2).data_ptr() == joined.data_ptr()
    out = attend(inputs.q, inputs.k, inputs.v)
    assert out.is_contiguous()
    same(joined.transpose(1, 2), out, 1e-6)
