"""Native kernels: dilation rates of any size against the reference.

Rates are alone and mixed.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from compiled_dilated.programs import Branch, Program
from tests.support.native import Problem, assert_near, normal, reference_results, work_of
from tests.support.turns import in_turn

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)

RATES = st.integers(1, 300) | st.sampled_from((16, 48, 49, 64, 96, 127, 128, 256))
HEADS = 3


@st.composite
def dilated_masks(draw: st.DrawFn) -> Mask:
    """A mask that links positions of one residue class.

    The class is of the sequence, or of a segment.
    """
    rate, reach = draw(RATES), draw(st.integers(0, 600))
    kinds = ("window", "congruent", "segments", "line", "either", "both")
    kind = draw(st.sampled_from(kinds))
    if kind == "window":
        return masks.window(reach, draw(st.integers(0, 600)), rate)
    if kind == "congruent":
        return masks.congruent(rate, draw(st.integers(0, rate - 1)))
    if kind == "segments":
        length = draw(st.integers(1, 700))
        of_segment = masks.congruent(rate, draw(st.integers(0, rate - 1)), length)
        return masks.segments(length) & of_segment
    if kind == "line":
        edges = draw(st.sampled_from(("cut", "shift")))
        return masks.neighborhood((700,), draw(st.integers(0, 9)), rate, edges=edges)
    parts = masks.window(reach, reach, rate), masks.window(reach, reach, draw(RATES))
    return parts[0] | parts[1] if kind == "either" else parts[0] & parts[1]


@settings(deadline=None, max_examples=30)
@given(
    kinds=st.lists(dilated_masks(), min_size=1, max_size=3),
    n=st.integers(1, 700),
    q_len=st.none() | st.integers(1, 700),
)
def test_programs_of_any_rates(kinds: list[Mask], n: int, q_len: int | None) -> None:
    program = Program(tuple(Branch(mask) for mask in kinds))
    length = n if q_len is None else min(q_len, n)
    q, grad_out = (normal(1, HEADS, length, 4, seed=seed) for seed in (1, 2))
    k, v = (normal(1, HEADS, n, 4, seed=seed) for seed in (3, 4))
    problem = Problem(work_of(program, HEADS), q, k, v, grad_out, None, q_offset=n - length)
    assert_near(problem.results(), reference_results(program, problem), repr(program))


@pytest.mark.parametrize(
    ("rate", "dtype"), in_turn((64, 100, 127), (torch.float32, torch.bfloat16))
)
def test_longnet_of_large_rates(rate: int, dtype: torch.dtype) -> None:
    program = cd.longnet((64, 16 * rate), (1, rate))
    q, grad_out = (normal(1, HEADS, 20 * rate, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    k, v = (normal(1, HEADS, 20 * rate, 16, dtype=dtype, seed=seed) for seed in (3, 4))
    problem = Problem(work_of(program, HEADS), q, k, v, grad_out, None)
    assert_near(problem.results(), reference_results(program, problem), f"rate {rate}")
