"""Random programs, masks, offsets and lengths: every lowering agrees with the reference in float64, or refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks
from compiled_dilated.lowerings import tiled
from compiled_dilated.lowerings.tiling import costs
from compiled_dilated.masks import Mask, conjunction
from tests import caches, strategies
from tests.support.attention import TRAINS, same, tensors


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
    for mine, theirs in zip(
        torch.autograd.grad(got, (q, k, v), back),
        torch.autograd.grad(want, (q, k, v), back),
        strict=True,
    ):
        same(mine, theirs)


@pytest.mark.parametrize("lowering", TRAINS)
@settings(max_examples=25)
@given(drawn=strategies.programs())
def test_any_program(lowering: str, drawn: tuple[Program, int]) -> None:
    program, n = drawn
    agree(program, *tensors(3, 1, n, 3, 3, batch=2), lowering)


@pytest.mark.parametrize("lowering", TRAINS)
@settings(max_examples=25)
@given(
    mask=strategies.line_expressions(150),
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    q_offset=st.integers(0, 150),
)
def test_any_mask_at_any_offset(
    lowering: str, mask: Mask, q_len: int, kv_len: int, q_offset: int
) -> None:
    q, k, v = tensors(2, 1, 150, 3, 3, batch=1)
    q, k, v = (
        x[:, :, :size].detach().requires_grad_()
        for x, size in ((q, q_len), (k, kv_len), (v, kv_len))
    )
    program = Program((Branch(mask),))
    agree(program, q, k, v, lowering, q_offset=q_offset)
    with torch.no_grad():
        for got, want in zip(*(
            attention(q, k, v, q_offset=q_offset, return_lse=True)
            for attention in (cd.compile(program), lambda *x, **o: cd.reference(program, *x, **o))
        ), strict=True):  # fmt: skip
            same(got, want)


def parts(most: int) -> st.SearchStrategy[list[Mask]]:
    """What a conjunction of regular blocks is made of."""
    length = st.integers(1, most)
    return st.lists(
        st.one_of(
            st.just(masks.causal()),
            st.builds(masks.segments, length),
            st.builds(lambda length, more: masks.segments(length * more), st.integers(1, 12), st.integers(1, 5)),
            st.builds(lambda rate, offset: masks.congruent(rate, offset % rate), st.integers(1, 6), st.integers(0, 5)),
            st.builds(
                lambda rate, offset, period: masks.congruent(rate, offset % rate, period=period),
                st.integers(1, 6), st.integers(0, 5), length,
            ),
        ),
        min_size=1,
        max_size=3,
    )  # fmt: skip


@settings(max_examples=150)
@given(
    parts=parts(40),
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    q_offset=st.integers(0, 150),
    batch=st.integers(1, 2),
)
def test_any_conjunction_by_slices(
    parts: list[Mask], q_len: int, kv_len: int, q_offset: int, batch: int
) -> None:
    """The strided lowering sorts what a conjunction is made of: every combination is right, or refused."""
    q, k, v = tensors(2, 1, 150, 3, 3, batch=batch)
    q, k, v = (
        x[:, :, :size].detach().requires_grad_()
        for x, size in ((q, q_len), (k, kv_len), (v, kv_len))
    )
    agree(Program((Branch(conjunction(tuple(parts))),)), q, k, v, "strided", q_offset=q_offset)


BANDS = st.one_of(
    st.just(masks.causal()),
    st.builds(masks.window, st.integers(0, 60), st.integers(0, 60)),
    *(
        st.builds(make, st.integers(0, 60))
        for make in (masks.sinks, masks.prefix, masks.global_tokens)
    ),
    st.builds(masks.segments, st.integers(1, 60)),
    st.builds(masks.dilated_blocks, st.integers(1, 9), st.integers(1, 4)),
)


@settings(max_examples=150)
@given(
    mask=strategies.expressions(BANDS),
    q_len=st.integers(2, 150),
    kv_len=st.integers(1, 150),
    q_offset=st.integers(0, 150),
)
@example(mask=masks.causal() & ~masks.sinks(1), q_len=2, kv_len=2, q_offset=0)
@example(mask=masks.causal() & ~masks.sinks(9) & masks.window(20), q_len=50, kv_len=60, q_offset=3)
@example(mask=~masks.window(0), q_len=3, kv_len=2, q_offset=0)
def test_bands_and_leading_tokens_in_many_small_tiles(
    mask: Mask, q_len: int, kv_len: int, q_offset: int
) -> None:
    """As of sequences that are longer than many of the largest tiles."""
    caches.forget()
    q, k, v = tensors(2, 1, 150, 3, 3, batch=1)
    q, k, v = (
        x[:, :, :size].detach().requires_grad_()
        for x, size in ((q, q_len), (k, kv_len), (v, kv_len))
    )
    with pytest.MonkeyPatch.context() as patch:
        for room, name, value in (
            (tiled, "_Q_TILE", 16),
            (tiled, "_KV_TILE", 8),
            (tiled, "_MOST_GATHERED", 2),
            (costs, "_LEAST_BYTES", 1),
            (costs, "_SHARE", 0.0),
        ):
            patch.setattr(room, name, value)
        agree(Program((Branch(mask),)), q, k, v, "tiled", q_offset=q_offset)
    caches.forget()
