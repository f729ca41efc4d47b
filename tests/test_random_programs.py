"""Random programs, masks, offsets and lengths.

Every lowering is the reference in float64.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
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
from tests.support.attention import TRAINS, same, same_gradients, tensors


def agree(program: Program, inputs: Sequence[Tensor], lowering: str, **options: Any) -> None:
    """Results and gradients are the reference's, unless strided refuses the program."""
    options["return_lse"] = True
    try:
        actual = cd.compile(program, lowering=lowering)(*inputs, **options)
    except ValueError as error:
        if "lowering 'strided' refuses" in str(error):
            return
        raise
    expected = cd.reference(program, *inputs, **options)
    same(actual, expected)
    incoming = torch.ones_like(actual[0]), torch.ones_like(actual[1])
    same_gradients(actual, expected, inputs, incoming)


def cross_attention(q_len: int, kv_len: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves q, k and v of these lengths, at most 150."""
    q, k, v = (x.detach() for x in tensors(2, 1, 150, 3, 3, batch=batch))
    q, k, v = q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len]
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("lowering", TRAINS)
@settings(max_examples=25)
@given(drawn=strategies.programs())
def test_any_program(lowering: str, drawn: tuple[Program, int]) -> None:
    program, n = drawn
    agree(program, tensors(3, 1, n, 3, 3, batch=2), lowering)


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
    inputs, program = cross_attention(q_len, kv_len), Program((Branch(mask),))
    agree(program, inputs, lowering, q_offset=q_offset)
    options: dict[str, Any] = {"q_offset": q_offset, "return_lse": True}
    with torch.no_grad():
        same(cd.compile(program)(*inputs, **options), cd.reference(program, *inputs, **options))


def regular_parts(most: int) -> st.SearchStrategy[list[Mask]]:
    """Masks of which the conjunction may be regular blocks."""
    length, rate, offset = st.integers(1, most), st.integers(1, 6), st.integers(0, 5)
    multiples = st.builds(operator.mul, st.integers(1, 12), st.integers(1, 5))

    def congruent(rate: int, offset: int, period: int | None) -> Mask:
        return masks.congruent(rate, offset % rate, period)

    part = st.one_of(
        st.just(masks.causal()),
        st.builds(masks.segments, length | multiples),
        st.builds(congruent, rate, offset, st.none() | length),
    )
    return st.lists(part, min_size=1, max_size=3)


@settings(max_examples=80)
@given(
    parts=regular_parts(40),
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    q_offset=st.integers(0, 150),
    batch=st.integers(1, 2),
)
def test_any_conjunction_by_slices(
    parts: list[Mask], q_len: int, kv_len: int, q_offset: int, batch: int
) -> None:
    """The strided lowering computes every combination of parts right, or refuses it."""
    program = Program((Branch(conjunction(tuple(parts))),))
    agree(program, cross_attention(q_len, kv_len, batch), "strided", q_offset=q_offset)


COUNT = st.integers(0, 60)
BANDS = st.one_of(
    st.just(masks.causal()),
    st.builds(masks.window, COUNT, COUNT),
    *(st.builds(leading, COUNT) for leading in (masks.sinks, masks.prefix, masks.global_tokens)),
    st.builds(masks.segments, st.integers(1, 60)),
    st.builds(masks.dilated_blocks, st.integers(1, 9), st.integers(1, 4)),
)


@settings(max_examples=80)
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
    """Short sequences with small tiles, as long sequences with the largest tiles."""
    caches.forget()
    inputs = cross_attention(q_len, kv_len)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (tiled, "_Q_TILE", 16),
            (tiled, "_KV_TILE", 8),
            (tiled, "_MOST_GATHERED", 2),
            (costs, "_LEAST_BYTES", 1),
            (costs, "_SHARE", 0.0),
        ):
            patch.setattr(module, name, value)
        agree(Program((Branch(mask),)), inputs, "tiled", q_offset=q_offset)
    caches.forget()
