"""Random programs, masks, offsets and lengths: every lowering agrees with the reference in float64, or refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Branch, Program, orders
from compiled_dilated.masks import Mask, conjunction
from tests import strategies
from tests.test_attend import TRAINS, same, tensors


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, int]:
    """One to three branches with masks, heads and orders of their own, of 3 heads; and a length."""
    mask, order, n = draw(strategies.masks_and_orders(150))
    heads = st.sampled_from([None, (0, 2), (1, 3), (2, 3), (1, 1), "0/2", "1/2"])
    branches = [Branch(mask, draw(heads), order)]
    for _ in range(draw(st.integers(0, 2))):
        own = draw(st.builds(orders.residue, st.integers(1, 6), st.none() | st.integers(1, 60)) | st.just(orders.identity()))
        branches.append(Branch(draw(strategies.expressions(strategies.line_masks(150) | strategies.mods())), draw(heads), own))
    return Program(tuple(branches)), n


def agree(program: Program, q: Tensor, k: Tensor, v: Tensor, lowering: str, **options: Any) -> None:
    try:
        got = cd.compile(program, lowering=lowering)(q, k, v, return_lse=True, **options)
    except ValueError as error:
        if "lowering 'strided' refuses" in str(error):
            return
        raise
    want = cd.reference(program, q, k, v, return_lse=True, **options)
    same(got, want)
    back = torch.ones_like(got[0]), torch.ones_like(got[1])
    for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), back), torch.autograd.grad(want, (q, k, v), back), strict=True):
        same(mine, theirs)


@pytest.mark.parametrize("lowering", TRAINS)
@settings(max_examples=25)
@given(drawn=programs())
def test_any_program(lowering: str, drawn: tuple[Program, int]) -> None:
    program, n = drawn
    agree(program, *tensors(3, 1, n, 3, 3, batch=2), lowering)


@pytest.mark.parametrize("lowering", TRAINS)
@settings(max_examples=25)
@given(
    mask=strategies.expressions(strategies.line_masks(150) | strategies.mods()),
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    q_offset=st.integers(0, 150),
)
def test_any_mask_at_any_offset(lowering: str, mask: Mask, q_len: int, kv_len: int, q_offset: int) -> None:
    q, k, v = tensors(2, 1, 150, 3, 3, batch=1)
    q, k, v = (x[:, :, :size].detach().requires_grad_() for x, size in ((q, q_len), (k, kv_len), (v, kv_len)))
    program = Program((Branch(mask),))
    agree(program, q, k, v, lowering, q_offset=q_offset)
    with torch.no_grad():
        for got, want in zip(*(
            attention(q, k, v, q_offset=q_offset, return_lse=True)
            for attention in (cd.compile(program), lambda *x, **o: cd.reference(program, *x, **o))
        ), strict=True):  # fmt: skip
            same(got, want)


@settings(max_examples=60)
@given(parts=st.lists(strategies.line_masks(150), min_size=1, max_size=4), n=st.integers(1, 400))
def test_any_conjunction_by_slices(parts: list[Mask], n: int) -> None:
    """The strided lowering sorts what a conjunction is made of: every combination is right, or refused."""
    agree(Program((Branch(conjunction(tuple(parts))),)), *tensors(1, 1, n, 2, 2, batch=1), "strided")
