"""Native kernels: one query per head over ranges of keys, as in decoding."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from compiled_dilated.programs import Program
from tests.cases import CASES, Case
from tests.support.native import (
    FLOATS,
    Problem,
    assert_near,
    assert_same_bits,
    counts_of,
    executed,
    normal,
    ops,
    problem_of,
    work_of,
)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)

# Three ranges of keys (src/decoding.h), the last one incomplete.
KEYS = 2500


@pytest.mark.parametrize("case", [case for case in CASES if case.crossed], ids=str)
def test_every_mask_over_several_ranges(case: Case) -> None:
    """Results are the reference's, and counts those of the plan."""
    # A case that is this long itself has no other length.
    keys = max(case.lengths) if max(case.lengths) > 1024 else KEYS
    for position in (0, 1023, 1024, keys - 1):
        problem, inputs = problem_of(case, keys, torch.float64, (1, keys, position))
        expected = cd.reference(
            case.program(keys), problem.q, problem.k, problem.v, scale=problem.scale,
            q_offset=position, data=inputs.data, return_lse=True,
        )  # fmt: skip
        assert_near(list(problem.forward()), list(expected), f"{case} at {position}")
        assert executed(problem) == counts_of(problem)


def grouped(
    mask: Program | Mask,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    batch: int = 2,
    offset: int = 2300,
    offsets: Tensor | None = None,
    width: int = 128,
) -> Problem:
    """One query per head against a cache of KEYS tokens."""
    q = normal(batch, heads, 1, width, dtype=dtype, seed=1)
    k, v = (normal(batch, kv_heads, KEYS, width, dtype=dtype, seed=seed) for seed in (2, 3))
    work = work_of(mask, heads)
    return Problem(work, q, k, v, q, None, scale=width**-0.5, q_offset=offset, offsets=offsets)


def exact(mask: Program | Mask, problem: Problem, **options: Any) -> list[Tensor]:
    """The reference's results; the offset is the problem's unless it is among the options."""
    inputs = [x.double() for x in (problem.q, problem.k, problem.v)]
    options = {"q_offset": problem.q_offset, "scale": problem.scale} | options
    return list(cd.reference(mask, *inputs, return_lse=True, **options))


HEADS = [(8, 1), (8, 2), (6, 3), (4, 4)]
OF_HEADS = masks.causal() & masks.congruent(3, (0, 1, 2, 0, 1, 2, 0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_heads_share_their_keys(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    mask = masks.causal() & (masks.window(1500) | masks.sinks(3))
    problem = grouped(mask, dtype, heads, kv_heads)
    assert_near(list(problem.forward()), exact(mask, problem))


@pytest.mark.parametrize("width", [1, 33, 80, 256])
def test_chunks_of_any_width(width: int) -> None:
    """Chunks hold as many keys as fit the cache, and end with their range."""
    mask = masks.causal() & (masks.window(1500, dilation=3) | masks.sinks(3))
    problem = grouped(mask, torch.float64, 8, 2, width=width)
    assert_near(list(problem.forward()), exact(mask, problem))
    assert executed(problem) == counts_of(problem)


def test_heads_of_one_key_head_see_different_keys(threads: Callable[[int], None]) -> None:
    problem = grouped(OF_HEADS, torch.float32, 8, 2)
    expected = exact(OF_HEADS, problem)
    for count in (1, 2):
        threads(count)
        assert_near(list(problem.forward()), expected)
        assert executed(problem) == counts_of(problem)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_threads_do_not_change_a_bit(
    heads: int, kv_heads: int, threads: Callable[[int], None]
) -> None:
    """With many threads the heads of a key head are divided among them."""
    problem = grouped(masks.causal(), torch.float32, heads, kv_heads, batch=1)
    threads(1)
    expected = list(problem.forward())
    for count in (2, 7, 64):
        threads(count)
        assert_same_bits(list(problem.forward()), expected, f"{count} threads")


def test_a_sequence_has_its_bits_in_any_batch() -> None:
    whole = grouped(masks.causal(), torch.float32, 8, 2, batch=3)
    out, lse = whole.forward()
    for b in range(3):
        alone = replace(whole, q=whole.q[b : b + 1], k=whole.k[b : b + 1], v=whole.v[b : b + 1])
        assert_same_bits(list(alone.forward()), [out[b : b + 1], lse[b : b + 1]])


def test_sequences_have_their_own_offsets() -> None:
    mask = masks.causal() & masks.window(1200)
    offsets = torch.tensor([5, 2400])
    problem = grouped(mask, torch.float64, 8, 2, offset=0, offsets=offsets)
    out, lse = problem.forward()
    for b in range(2):
        alone = replace(
            problem, q=problem.q[b : b + 1], k=problem.k[b : b + 1], v=problem.v[b : b + 1]
        )
        expected = exact(mask, alone, q_offset=int(offsets[b]))
        assert_near([out[b : b + 1], lse[b : b + 1]], expected)


def test_ranges_that_no_query_sees() -> None:
    """A row without keys has 0 and -inf; others skip what they do not see."""
    mask = masks.causal() & ~masks.window(2400)
    problem = grouped(mask, torch.float32, 8, 2)
    out, lse = problem.forward()
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    near = grouped(masks.window(10), torch.float32, 8, 2)
    assert counts_of(near)[0] < 8 * 2 * 64
    assert executed(near) == counts_of(near)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merging_over_ranges(dtype: torch.dtype) -> None:
    """Results over the first keys, then merged with those over the others."""
    problem = grouped(masks.full(), dtype, 8, 2)
    first, code = 900, problem.work.code
    part = replace(problem, k=problem.k[:, :, :first], v=problem.v[:, :, :first])
    out, lse = part.forward()
    rest = (problem.k[:, :, first:], problem.v[:, :, first:])
    offset = problem.q_offset - first
    ops.native_merge(out, lse, problem.q, *rest, None, None, code, problem.scale, offset)
    assert_near([out, lse], exact(masks.full(), problem))


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_number_that_is_not_finite_reaches_those_who_see_it(name: str) -> None:
    mask, problem = masks.causal(), grouped(masks.causal(), torch.float32, 8, 2)

    def with_nan(position: int) -> Problem:
        x = problem.k.clone() if name == "k" else problem.v.clone()
        x[1, 1, position, 7] = torch.nan
        return replace(problem, k=x) if name == "k" else replace(problem, v=x)

    assert_near(list(with_nan(problem.q_offset + 1).forward()), exact(mask, problem))
    out, _ = with_nan(1500).forward()
    assert out[1, 4:].isnan().any()
    assert out[0].isfinite().all()
    assert out[1, :4].isfinite().all()
