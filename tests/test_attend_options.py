"""Attention: scale, sink logits, score_mods, decoding, data."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks, planner
from tests.cases import Case
from tests.support.attention import (
    TAKE_ANY_MASK,
    TRAINS,
    in_every_lowering,
    same,
    same_gradients,
    tensors,
)

# Options


@pytest.mark.parametrize("lowering", TRAINS)
@pytest.mark.parametrize("scale", [0.0, -1.5, 2, 1e-3])
def test_scale(scale: float, lowering: str) -> None:
    program, (q, k, v) = cd.longnet((8, 24), (1, 3)), tensors()
    same(
        cd.compile(program, lowering=lowering)(q, k, v, scale=scale),
        cd.reference(program, q, k, v, scale=scale),
    )


WITH_SINKS = ("longnet causal", "window or sinks", "nothing", "congruent", "padding of everything")


@pytest.mark.parametrize(("case", "lowering"), in_every_lowering(WITH_SINKS))
def test_sink_logits(case: Case, lowering: str) -> None:
    inputs, program = case.inputs(129, torch.float64), case.program(129)
    logits = torch.tensor([0.5, -4.0, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    q, k, v = inputs.q, inputs.k, inputs.v
    options: dict[str, Any] = {"data": inputs.data, "sink_logits": logits, "return_lse": True}
    actual = cd.compile(program, lowering=lowering)(q, k, v, **options)
    expected = cd.reference(program, q, k, v, **options)
    same(actual, expected)
    same_gradients(actual, expected, (q, k, v, logits), (inputs.grad_out, inputs.grad_lse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sink_logits_in_lower_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in tensors(dtype=dtype))
    logits = torch.tensor([0.5, -4.0, 3.0, -math.inf])
    out, lse = cd.compile(masks.congruent(4, 1))(q, k, v, sink_logits=logits, return_lse=True)
    expected, expected_lse = cd.reference(
        masks.congruent(4, 1), q, k, v, sink_logits=logits, return_lse=True
    )
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # Two roundings: of attention, and of its share of the softmax.
    assert (out - expected).abs().max() <= 2 * torch.finfo(dtype).eps * v.abs().max()
    same(lse.double(), expected_lse, 1e-3)


MODIFIED = (
    "longnet causal",
    "hilbert window",
    "window or sinks",
    "rows dead in one branch",
    "one key head",
    "values wider than keys",
)


@pytest.mark.parametrize(("case", "lowering"), in_every_lowering(MODIFIED))
def test_score_mod(case: Case, lowering: str) -> None:
    inputs, program = case.inputs(331, torch.float64), case.program(331)
    slopes = torch.linspace(0.01, 0.1, case.heads, dtype=torch.float64)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return 20 * torch.tanh(score / 20) - slopes[h] * abs(q - kv) + b / 8

    leaves = (inputs.q, inputs.k, inputs.v)
    actual = cd.compile(program, lowering=lowering)(*leaves, score_mod=score_mod, return_lse=True)
    expected = cd.reference(program, *leaves, score_mod=score_mod, return_lse=True)
    same(actual, expected)
    same_gradients(actual, expected, leaves, (inputs.grad_out, inputs.grad_lse))


def test_score_mods_at_the_same_address_share_no_result() -> None:
    """A new function may get the address of a deleted one."""
    q, k, v = (x.detach() for x in tensors())
    attend = cd.compile(masks.causal())
    for shift in range(20):
        mod = eval(f"lambda score, b, h, q, kv: score * {shift}")
        same(attend(q, k, v, score_mod=mod), cd.reference(masks.causal(), q, k, v, score_mod=mod))
        del mod


def test_programs_of_equal_repr_share_no_result() -> None:
    """Different functions have the same repr inside from_mod."""
    q, k, v = (x.detach() for x in tensors())
    for reach in (1, 5):

        def near(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, reach: int = reach) -> Tensor:
            return abs(q - kv) <= reach

        mask = masks.from_mod(near)
        same(cd.compile(mask)(q, k, v), cd.reference(masks.window(reach), q, k, v))


DECODED = (
    "longnet causal",
    "window causal",
    "congruent cyclic",
    "segments",
    "window dilated",
    "documents by ids, causal",
    "padding causal",
)


@pytest.mark.parametrize(("case", "lowering"), in_every_lowering(DECODED))
def test_decoding_is_a_slice_of_the_full_result(case: Case, lowering: str) -> None:
    """One query or a few, at any position, with and without gradients."""
    n = 200
    inputs, program = case.inputs(n, torch.float64), case.program(n)
    attend, data = cd.compile(program, lowering=lowering), inputs.data
    out, lse = cd.reference(program, inputs.q, inputs.k, inputs.v, data=data, return_lse=True)
    for start, stop in ((0, 1), (63, 64), (199, 200), (64, 67), (190, 200), (1, 200)):
        expected = out[:, :, start:stop].detach(), lse[:, :, start:stop].detach()
        # A causal mask needs no keys after the last query.
        for keys in (n, stop) if case.name.endswith("causal") else (n,):
            k, v = inputs.k[:, :, :keys].detach(), inputs.v[:, :, :keys].detach()
            for q in (inputs.q[:, :, start:stop], inputs.q[:, :, start:stop].detach()):
                row, row_lse = attend(q, k, v, data=data, q_offset=start, return_lse=True)
                same((row.detach(), row_lse.detach()), expected)


def test_decoding_token_by_token_plans_once(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = mock.Mock(wraps=planner.choose)
    monkeypatch.setattr(planner, "choose", choose)
    program = cd.longnet((8, 24), (1, 3), causal=True)
    attend = cd.compile(program)
    q, k, v = (x.detach() for x in tensors(n=64))
    expected = cd.reference(program, q, k, v)
    assert isinstance(expected, Tensor)
    for p in range(64):
        row, _ = attend(q[:, :, p : p + 1], k, v, q_offset=p, return_lse=True)
        same(row, expected[:, :, p : p + 1])
    assert choose.call_count <= 1


# Data
@pytest.mark.parametrize("lowering", TAKE_ANY_MASK)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_data_of_any_integer_type_shared_by_the_batch(dtype: torch.dtype, lowering: str) -> None:
    mask, (q, k, v) = masks.documents(ids="ids") & masks.causal(), tensors()
    ids = torch.randint(0, 2, (1, 40)).to(dtype)
    out = cd.compile(mask, lowering=lowering)(q, k, v, data={"ids": ids})
    same(out, cd.reference(mask, q, k, v, data={"ids": ids.expand(2, 40)}))


@pytest.mark.parametrize("lowering", TAKE_ANY_MASK)
def test_new_data_gives_a_new_result(lowering: str) -> None:
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
    """There may be more queries than keys: padding concerns keys only."""
    mask, (q, k, v) = masks.padding() & masks.causal(), tensors()
    k, v, padding = k[:, :, :7], v[:, :, :7], torch.rand(2, 7) > 0.5
    same(
        cd.compile(mask, lowering=lowering)(q, k, v, data={"padding": padding}),
        cd.reference(mask, q, k, v, data={"padding": padding}),
    )
