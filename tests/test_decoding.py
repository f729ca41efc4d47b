"""One query against a cache: ranges of keys, results, plans.

One plan serves all tokens.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import autograd, decoding, masks, orders, planner
from compiled_dilated.masks.ranges import intersection
from compiled_dilated.native import build
from tests.support.attention import same
from tests.support.decoding import CAUSAL, MASKS, WINDOW


def needs_kernel() -> None:
    """Skip a test where the native kernel cannot be built."""
    reason = build.available()
    if reason is not None:
        pytest.skip(f"no native kernel here: {reason}")


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_ranges_are_the_allowed_keys(mask: masks.Mask) -> None:
    first = np.zeros(1, dtype=np.int64)
    for kv_len in (1, 13, 45):
        keys = np.arange(kv_len)
        for q in range(45):
            spans = mask.keys_of(q, kv_len)
            assert spans is not None
            allowed = np.broadcast_to(mask.allows(first, first, np.array([q]), keys), kv_len)
            assert sorted(itertools.chain(*spans)) == keys[allowed].tolist()


def test_masks_without_few_ranges_give_none() -> None:
    assert (WINDOW(9, 9, 3) | masks.sinks(2)).keys_of(20, 45) is None
    assert masks.documents(ids="ids").keys_of(20, 45) is None
    assert masks.dilated_blocks(1, 2).keys_of(0, 10_000) is None


def test_windows_of_a_causal_mask_are_narrowed() -> None:
    assert masks.narrowed((CAUSAL(), WINDOW(3, 7))) == (WINDOW(3, 0),)
    assert masks.narrowed((WINDOW(9, 9, 3), masks.segments(7), CAUSAL())) == (
        WINDOW(9, 0, 3),
        masks.segments(7),
    )
    assert masks.narrowed((CAUSAL(), masks.segments(7))) == (CAUSAL(), masks.segments(7))


def test_intersection_of_progressions() -> None:
    for a in (range(50), range(3, 40, 4), range(2, 60, 6)):
        for b in (range(10, 30), range(1, 55, 3), range(5, 50, 10)):
            assert list(intersection(a, b)) == sorted(set(a) & set(b))


def _cache(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of this many tokens."""
    return (
        torch.randn(2, 4, tokens, 16, dtype=torch.float64),
        torch.randn(2, 2, tokens, 16, dtype=torch.float64),
        torch.randn(2, 2, tokens, 12, dtype=torch.float64),
    )


PADDING = torch.zeros(2, 300, dtype=torch.bool)
PADDING[0, 30:90] = True


@pytest.mark.parametrize(
    ("program", "data"),
    [
        (CAUSAL(), {}),
        (CAUSAL() & (WINDOW(20) | masks.sinks(4)), {}),
        (cd.longnet((64, 100), (1, 3), causal=True), {}),
        (cd.longnet((64, 100), (1, 3), heads="split", offsets="grouped"), {}),
        (CAUSAL() & masks.padding(), {"padding": PADDING}),
        (masks.from_mod(lambda b, h, q, kv: (q - kv) % (h + 2) == 0) & CAUSAL(), {}),
    ],
    ids=["causal", "sinks", "longnet", "split", "padding", "from_mod"],
)
def test_one_query_gets_its_row_of_the_full_result(
    program: cd.Program | masks.Mask, data: dict[str, torch.Tensor]
) -> None:
    q, k, v = _cache(300)
    attend = cd.compile(program)
    out, lse = attend(q, k, v, data=data, return_lse=True)
    for position in (0, 1, 63, 64, 150, 299):
        query = slice(position, position + 1)
        row = attend(q[:, :, query], k, v, q_offset=position, data=data, return_lse=True)
        same(row, (out[:, :, query], lse[:, :, query]))


def test_a_score_mod_is_honoured() -> None:
    q, k, v = _cache(200)

    def score_mod(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + 0.1 * (q_idx - kv_idx) * (h + 1)

    program = CAUSAL() & WINDOW(30)
    row = cd.compile(program)(q[:, :, 70:71], k, v, q_offset=70, score_mod=score_mod)
    same(row, cd.reference(program, q[:, :, 70:71], k, v, q_offset=70, score_mod=score_mod))


def test_tokens_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernel's plan serves every position and length of cache."""
    needs_kernel()
    q, k, v = _cache(120)
    attend = cd.compile(CAUSAL() & WINDOW(17))
    attend(q[:, :, :1], k[:, :, :100], v[:, :, :100], q_offset=99)

    def planning(*arguments: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planner, "choose", planning)
    for position in range(100, 120):
        attend(q[:, :, :1], k[:, :, : position + 1], v[:, :, : position + 1], q_offset=position)


def test_a_query_that_sees_nothing_gets_zero() -> None:
    q, k, v = _cache(20)
    attend = cd.compile(masks.documents(lengths=(4, 5)))
    out, lse = attend(q[:, :, :1], k, v, q_offset=15, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize(
    "mask",
    [CAUSAL(), CAUSAL() & WINDOW(20), CAUSAL() & masks.segments(64), WINDOW(30, 30, 3)],
    ids=repr,
)
def test_tokens_after_the_first_call_are_not_planned(
    mask: masks.Mask, has_kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are those of the operator, which is not called again.

    has_kernel: whether the native kernel computes them; SDPA does where there is none.
    """
    if has_kernel:
        needs_kernel()
    else:
        monkeypatch.setattr(decoding, "_by_kernel", lambda *arguments: None)
    q, k, _ = (x.to(dtype) for x in _cache(300))
    v = torch.randn_like(k)
    attend, expected = cd.compile(mask), {}
    for position in (0, 1, 63, 64, 150, 299):
        row, seen = q[:, :, position : position + 1], slice(0, max(position + 1, 100))
        # With the lse every call is checked and planned.
        expected[position], _ = attend(
            row, k[:, :, seen], v[:, :, seen], q_offset=position, return_lse=True
        )
    attend(q[:, :, :1], k, v)

    def operator(*arguments: object) -> None:
        raise AssertionError("checked and planned again")

    monkeypatch.setattr(autograd, "attend", operator)
    monkeypatch.setattr(autograd, "attend_bound", operator)
    for position, value in expected.items():
        row, seen = q[:, :, position : position + 1], slice(0, max(position + 1, 100))
        out = attend(row, k[:, :, seen], v[:, :, seen], q_offset=position)
        assert (out - value).abs().max() <= 16 * torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize(
    "program",
    [
        CAUSAL() & (WINDOW(20) | masks.sinks(4)),
        cd.longnet((64, 100), (1, 3), heads="split", offsets="grouped"),
        CAUSAL() & masks.congruent(3, (0, 1, 2, 0)),
    ],
    ids=repr,
)
def test_the_kernel_decodes_any_program_without_data(
    program: cd.Program | masks.Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ranges of keys, branches, and masks by head."""
    needs_kernel()
    q, k, _ = _cache(300)
    v = torch.randn_like(k)
    attend = cd.compile(program)
    attend(q[:, :, :1], k, v)
    monkeypatch.setattr(autograd, "attend_bound", None)
    for position in (1, 64, 299):
        row = q[:, :, position : position + 1]
        out = attend(row, k, v, q_offset=position)
        same(out, cd.reference(program, row, k, v, q_offset=position))


def test_calls_of_another_kind_are_checked_after_the_first_token() -> None:
    q, k, v = _cache(40)
    v, row = torch.randn_like(k), q[:, :, :1]
    attend = cd.compile(masks.neighborhood((40,), 5))
    for _ in range(2):  # the second time as the next token
        attend(row, k, v, q_offset=20)
    with pytest.raises(TypeError, match="one dtype"):
        attend(row, k.float(), v.float(), q_offset=20)
    with pytest.raises(TypeError, match="one dtype"):
        attend(row, k, v.float(), q_offset=20)
    with pytest.raises(ValueError, match="agree in batch, heads and tokens"):
        attend(row, k, v[:, :, :30], q_offset=20)
    with pytest.raises(ValueError, match="multiple"):
        attend(row[:, :3], k, v, q_offset=20)
    for offset in (-1, True, 2.0):
        with pytest.raises((TypeError, ValueError), match="q_offset"):
            attend(row, k, v, q_offset=offset)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale"):
        attend(row, k, v, q_offset=20, scale=float("nan"))
    with pytest.raises(ValueError, match="grid"):
        attend(row, k, v, q_offset=40)
    with pytest.raises(TypeError, match="dense"):
        attend(row, k.to_sparse(), v.to_sparse(), q_offset=20)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(row.float(), k.float(), v.float(), q_offset=20).dtype == torch.bfloat16
    trained = row.clone().requires_grad_()
    attend(trained, k, v, q_offset=20).sum().backward()
    assert trained.grad is not None
    assert torch.isfinite(trained.grad).all()


def test_an_order_is_checked_after_the_first_token() -> None:
    """A program that a fresh `Attend` refuses is refused by one that has computed."""
    q, k, v = _cache(10)
    v, program = torch.randn_like(k), cd.Program((cd.Branch(CAUSAL(), order=orders.residue(4)),))
    used = cd.compile(program)
    for _ in range(2):
        used(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    for attend in (used, cd.compile(program)):
        with pytest.raises(ValueError, match="order"):
            attend(q[:, :, :1], k[:, :, :6], v[:, :, :6], q_offset=5)


def test_the_plan_of_a_token_has_its_own_counts() -> None:
    q, k, v = _cache(300)
    attend = cd.compile(CAUSAL())
    for position in (9, 299):
        keys = slice(0, position + 1)
        row = q[:, :, :1], k[:, :, keys], v[:, :, keys]
        attend(*row, q_offset=position)
        plan = attend.plan(*row, q_offset=position)
        assert plan.to_json()["q_offset"] == position
        assert plan.cost.pairs == 2 * 4 * (position + 1)


def test_masks_that_differ_between_heads_are_computed_per_head() -> None:
    """Their keys are not one range, in all calls."""
    q, k, _ = _cache(60)
    v = torch.randn_like(k)
    mask = CAUSAL() & masks.congruent(3, (0, 1, 2, 0))
    attend = cd.compile(mask)
    expected = cd.reference(mask, q[:, :, 50:51], k, v, q_offset=50)
    for _ in range(3):
        same(attend(q[:, :, 50:51], k, v, q_offset=50), expected)
