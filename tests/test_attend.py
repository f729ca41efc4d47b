"""What a compiled program is as a function: its derivatives, torch.func, export, autocast, layouts, options.

And what it refuses.
"""

from __future__ import annotations

import copy
import math
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

TAKE_ANY_MASK = ("dense", "tiled", "auto")
TRAINS = (*TAKE_ANY_MASK, "strided")


def tensors(
    heads: int = 4,
    kv_heads: int = 2,
    n: int = 40,
    dim: int = 6,
    value_dim: int = 6,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, value_dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def same(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


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
def test_lse_alone_is_differentiable(lowering: str) -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    _, lse = cd.compile(program, lowering=lowering)(q, k, v, return_lse=True)
    _, want = cd.reference(program, q, k, v, return_lse=True)
    for mine, theirs in zip(
        torch.autograd.grad(lse.sin().sum(), (q, k)), torch.autograd.grad(want.sin().sum(), (q, k)), strict=True
    ):
        same(mine, theirs)
    (grad_v,) = torch.autograd.grad(cd.compile(program, lowering=lowering)(q, k, v, return_lse=True)[1].sum(), (v,))
    assert (grad_v == 0).all()


def test_gradients_of_some_inputs_alone() -> None:
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
    (grad,) = torch.autograd.grad(cd.compile(masks.causal())(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"not twice differentiable here.*Use compiled_dilated.reference"):
        grad.sum().backward()


def test_forward_mode_is_refused() -> None:
    q, k, v = (x.detach() for x in tensors(n=8))
    attend = cd.compile(masks.causal())
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative here; use reverse mode"):
        torch.func.jvp(lambda q: attend(q, k, v), (q,), (torch.ones_like(q),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative here"):
            attend(dual, k, v)


def test_second_use_of_a_graph() -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    out = cd.compile(program)(q, k, v)
    first = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), q)[0])


# torch.func ---------------------------------------------------------------------------------------------------------------------


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
    want = torch.func.grad(through(lambda *x, **o: cd.reference(program, *x, **o)), argnums=(0, 1, 2))(*inputs)
    for mine, theirs in zip(got, want, strict=True):
        same(mine, theirs)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 3, 0), (0, None, None), (None, 2, None), (4, 4, 4)])
def test_vmap(dims: tuple[int | None, ...]) -> None:
    program, inputs = cd.longnet((8, 24), (1, 3)), tuple(x.detach() for x in tensors())
    stacked = [x if dim is None else torch.stack([x, x + 0.1, x * 2], dim) for x, dim in zip(inputs, dims, strict=True)]
    got = torch.vmap(cd.compile(program), in_dims=dims)(*stacked)
    for i in range(3):
        picked = [x if dim is None else x.select(dim, i) for x, dim in zip(stacked, dims, strict=True)]
        same(got[i], cd.reference(program, *picked))


def test_vmap_of_grad() -> None:
    """Gradients per example."""
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tuple(x.detach() for x in tensors(batch=3))
    attend = cd.compile(program)
    each = torch.vmap(torch.func.grad(lambda q, k, v: attend(q[None], k[None], v[None]).square().sum(), argnums=(0, 1, 2)))(
        q, k, v
    )
    want = torch.func.grad(lambda q, k, v: cd.reference(program, q, k, v).square().sum(), argnums=(0, 1, 2))(q, k, v)
    for mine, theirs in zip(each, want, strict=True):
        same(mine, theirs)


def test_vmap_over_data() -> None:
    mask, (q, k, v) = masks.documents(ids="ids") & masks.padding(), tuple(x.detach() for x in tensors())
    attend = cd.compile(mask)
    ids, padding = torch.randint(0, 3, (3, 2, 40)), torch.rand(1, 40) > 0.7
    got = torch.vmap(lambda ids: attend(q, k, v, data={"ids": ids, "padding": padding}))(ids)
    for i in range(3):
        same(got[i], cd.reference(mask, q, k, v, data={"ids": ids[i], "padding": padding.expand(2, 40)}))


# Export, autocast, modes


class Model(nn.Module):
    """Attention inside a user's module."""

    def __init__(self, program: Program | Mask, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.attend = cd.compile(program)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=-1))
        out: Tensor = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_export() -> None:
    model, x = Model(cd.longnet((8, 24), (1, 3), causal=True)), torch.randn(2, 40, 8)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {1: torch.export.Dim("tokens", min=2, max=4096)}})
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
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


# Options


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize("scale", [0.0, -1.5, 2, 1e-3])
def test_scale(scale: float, lowering: str) -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    same(cd.compile(program, lowering=lowering)(q, k, v, scale=scale), cd.reference(program, q, k, v, scale=scale))


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize("name", ["longnet causal", "window or sinks", "nothing", "congruent", "padding of everything"])
def test_sink_logits(name: str, lowering: str) -> None:
    case = by_name(name)
    if lowering == "strided" and case.refused:
        return
    inputs, program = case.inputs(129, torch.float64), case.program(129)
    logits = torch.tensor([0.5, -4.0, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    leaves = (inputs.q, inputs.k, inputs.v, logits)
    got = cd.compile(program, lowering=lowering)(*leaves[:3], data=inputs.data, sink_logits=logits, return_lse=True)
    want = cd.reference(program, *leaves[:3], data=inputs.data, sink_logits=logits, return_lse=True)
    back = (inputs.grad_out, inputs.grad_lse)
    for mine, theirs in zip(
        (*got, *torch.autograd.grad(got, leaves, back)), (*want, *torch.autograd.grad(want, leaves, back)), strict=True
    ):
        same(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sink_logits_in_lower_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in tensors(dtype=dtype))
    logits = torch.tensor([0.5, -4.0, 3.0, -math.inf])
    out, lse = cd.compile(masks.congruent(4, 1))(q, k, v, sink_logits=logits, return_lse=True)
    want, want_lse = cd.reference(masks.congruent(4, 1), q, k, v, sink_logits=logits, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # Two roundings: of attention, and of its share of the softmax.
    assert (out - want).abs().max() <= 2 * torch.finfo(dtype).eps * v.abs().max()
    same(lse.double(), want_lse, 1e-3)


MODIFIED = (
    "longnet causal",
    "hilbert window",
    "window or sinks",
    "rows dead in one branch",
    "one key head",
    "values wider than keys",
)


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize("name", MODIFIED)
def test_score_mod(name: str, lowering: str) -> None:
    case = by_name(name)
    if lowering == "strided" and case.refused:
        return
    inputs, program = case.inputs(331, torch.float64), case.program(331)
    slopes = torch.linspace(0.01, 0.1, case.heads, dtype=torch.float64)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return 20 * torch.tanh(score / 20) - slopes[h] * abs(q - kv) + b / 8

    leaves, back = (inputs.q, inputs.k, inputs.v), (inputs.grad_out, inputs.grad_lse)
    got = cd.compile(program, lowering=lowering)(*leaves, score_mod=score_mod, return_lse=True)
    want = cd.reference(program, *leaves, score_mod=score_mod, return_lse=True)
    for mine, theirs in zip(
        (*got, *torch.autograd.grad(got, leaves, back)), (*want, *torch.autograd.grad(want, leaves, back)), strict=True
    ):
        same(mine, theirs)


def test_score_mods_do_not_stand_in_for_each_other() -> None:
    """Functions that come and go may come to lie at the same address."""
    q, k, v = (x.detach() for x in tensors())
    attend = cd.compile(masks.causal())
    for shift in range(20):
        mod = eval(f"lambda score, b, h, q, kv: score * {shift}")
        same(attend(q, k, v, score_mod=mod), cd.reference(masks.causal(), q, k, v, score_mod=mod))
        del mod


def test_programs_of_equal_print_do_not_stand_in_for_each_other() -> None:
    """Two functions may print alike inside from_mod."""
    q, k, v = (x.detach() for x in tensors())
    for reach in (1, 5):
        mask = masks.from_mod(lambda b, h, q, kv, reach=reach: abs(q - kv) <= reach)
        same(cd.compile(mask)(q, k, v), cd.reference(masks.window(reach), q, k, v))


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize(
    "name",
    [
        "longnet causal",
        "window causal",
        "congruent cyclic",
        "segments",
        "window dilated",
        "documents by ids, causal",
        "padding causal",
    ],
)
def test_decoding_is_a_slice_of_the_full_result(name: str, lowering: str) -> None:
    """A query at position p sees keys as position p, one at a time or a few, with gradients or without."""
    case, n = by_name(name), 200
    if lowering == "strided" and case.refused:
        return
    inputs, attend = case.inputs(n, torch.float64), cd.compile(case.program(n), lowering=lowering)
    whole, lse = cd.reference(case.program(n), inputs.q, inputs.k, inputs.v, data=inputs.data, return_lse=True)
    for start, stop in ((0, 1), (63, 64), (199, 200), (64, 67), (190, 200), (1, 200)):
        for keys in (n, stop):
            if keys < n and not name.endswith("causal"):
                continue
            k, v = inputs.k[:, :, :keys], inputs.v[:, :, :keys]
            for q in (inputs.q[:, :, start:stop], inputs.q[:, :, start:stop].detach()):
                got = attend(q, k.detach(), v.detach(), data=inputs.data, q_offset=start, return_lse=True)
                same(got[0].detach(), whole[:, :, start:stop].detach())
                same(got[1].detach(), lse[:, :, start:stop].detach())


def test_decoding_token_by_token_plans_once() -> None:
    attend, (q, k, v) = cd.compile(cd.longnet((8, 24), (1, 3), causal=True)), (x.detach() for x in tensors(n=64))
    whole = cd.reference(attend.program, q, k, v)
    plans = {id(attend.plan(q[:, :, p : p + 1], k, v, q_offset=p)) for p in range(64)}
    for p in range(64):
        same(attend(q[:, :, p : p + 1], k, v, q_offset=p), whole[:, :, p : p + 1])
    assert len(plans) == 1


# Data


@pytest.mark.parametrize("lowering", TAKE_ANY_MASK)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_data_of_any_integer_type_shared_by_the_batch(dtype: torch.dtype, lowering: str) -> None:
    mask, (q, k, v) = masks.documents(ids="ids") & masks.causal(), tensors()
    ids = torch.randint(0, 2, (1, 40)).to(dtype)
    got = cd.compile(mask, lowering=lowering)(q, k, v, data={"ids": ids})
    same(got, cd.reference(mask, q, k, v, data={"ids": ids.expand(2, 40)}))


@pytest.mark.parametrize("lowering", TAKE_ANY_MASK)
def test_new_data_is_not_mistaken_for_the_old(lowering: str) -> None:
    mask, (q, k, v) = masks.documents(ids="ids") & masks.padding() & masks.window(20), tensors()
    attend = cd.compile(mask, lowering=lowering)
    ids, padding = torch.zeros(2, 40, dtype=torch.int64), torch.zeros(2, 40, dtype=torch.bool)
    data = {"padding": padding, "ids": ids}
    for step in range(4):
        ids[:, step * 5 :] += 1  # changed in place, too
        padding[:, step] = True
        same(attend(q, k, v, data=data), cd.reference(mask, q, k, v, data=data))
    assert len({id(attend.plan(q, k, v)) for _ in range(2)}) == 1


@pytest.mark.parametrize("lowering", TAKE_ANY_MASK)
def test_padding_is_as_long_as_the_keys(lowering: str) -> None:
    """More queries than keys: what is padding is said of keys alone."""
    mask, (q, k, v) = masks.padding() & masks.causal(), tensors()
    k, v, padding = k[:, :, :7], v[:, :, :7], torch.rand(2, 7) > 0.5
    same(
        cd.compile(mask, lowering=lowering)(q, k, v, data={"padding": padding}),
        cd.reference(mask, q, k, v, data={"padding": padding}),
    )


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
@pytest.mark.parametrize("name", ["longnet causal", "hilbert window", "window or sinks", "full", "causal"])
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
    for mine, theirs in zip(torch.autograd.grad(out, leaves, back), torch.autograd.grad(want, leaves, back), strict=True):
        same(mine, theirs)


@pytest.mark.parametrize("call", [lambda attend: attend, lambda attend: torch.compile(attend, backend="aot_eager")])
@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("name", ["longnet causal", "hilbert window", "full"])
def test_heads_of_a_models_tokens_are_joined_without_a_copy(
    name: str, ranks: int | None, call: Callable[[cd.Attend], Callable[..., Tensor]]
) -> None:
    """out lies token by token where q does, head by head where q does."""
    case = by_name(name)
    inputs, attend = case.inputs(331, torch.float32), call(cd.compile(case.program(331), ranks=ranks))
    q, k, v = (from_bnhd(x) for x in (inputs.q, inputs.k, inputs.v))
    joined = attend(q, k, v).transpose(1, 2)
    assert joined.flatten(2).data_ptr() == joined.data_ptr()
    out = attend(inputs.q, inputs.k, inputs.v)
    assert out.is_contiguous()
    same(joined.transpose(1, 2), out, 1e-6)


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1), (12, 4)])
def test_grouped_heads(heads: int, kv_heads: int, lowering: str) -> None:
    """Per-head offsets and shares of heads cut across the groups."""
    for program in (
        cd.longnet((8, 24), (2, 3)),
        cd.longnet((8, 24, 40), (1, 2, 5), heads="split"),
        masks.congruent(4, "grouped"),
    ):
        leaves = tensors(heads, kv_heads)
        out, want = cd.compile(program, lowering=lowering)(*leaves), cd.reference(program, *leaves)
        same(out, want)
        back = torch.randn_like(out)
        for mine, theirs in zip(torch.autograd.grad(out, leaves, back), torch.autograd.grad(want, leaves, back), strict=True):
            same(mine, theirs)


@pytest.mark.parametrize(
    ("batch", "heads", "n", "dim", "value_dim"),
    [(0, 2, 8, 4, 4), (2, 0, 8, 4, 4), (2, 2, 0, 4, 4)],
    ids=["batch", "heads", "tokens"],
)
def test_empty_inputs(batch: int, heads: int, n: int, dim: int, value_dim: int) -> None:
    leaves = tensors(heads, heads, n, dim, value_dim, batch)
    for program in (masks.causal(), cd.longnet((4, 8), (1, 2))):
        out, lse = cd.compile(program)(*leaves, return_lse=True)
        want, want_lse = cd.reference(program, *leaves, return_lse=True)
        same(out, want)
        same(lse, want_lse)
        for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert grad.shape == x.shape


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0)])
def test_empty_queries_or_keys(q_len: int, kv_len: int) -> None:
    q, k, v = tensors(n=5)
    out, lse = cd.compile(masks.window(3))(q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len], return_lse=True)
    assert out.shape == (2, 4, q_len, 6)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), k)
    assert (grad == 0).all()


def test_padding_may_hold_anything_finite() -> None:
    """What padding holds, and what documents hide, reaches no result and gets no gradient."""
    mask, (q, k, v) = masks.padding() & masks.window(30), tensors(dtype=torch.float32)
    padding = torch.arange(40).expand(2, 40) >= 30
    attend = cd.compile(mask)
    want = attend(q, k, v, data={"padding": padding})
    filled = [x.detach().masked_fill(padding[:, None, :, None], 1e30).requires_grad_() for x in (k, v)]
    got = attend(q, *filled, data={"padding": padding})
    assert torch.equal(got, want)
    for grad in torch.autograd.grad(got.sum(), filled):
        assert (grad[:, :, 30:] == 0).all()
