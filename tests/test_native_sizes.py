"""Native kernels: head sizes, lengths, empty inputs, positions per batch entry."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.native import (
    FLOATS,
    Problem,
    assert_near,
    counts_of,
    executed,
    normal,
    ragged,
    reference_results,
    work_of,
)
from tests.support.turns import in_turn

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


HEAD_DIMS = (1, 3, 7, 16, 31, 32, 64, 80, 96, 100, 128, 255, 256)


@pytest.mark.parametrize(("head_dim", "dtype"), in_turn(HEAD_DIMS, FLOATS))
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    for value_dim in (head_dim, 257 - head_dim):
        mask, problem = ragged(dtype, head_dim, value_dim, 70, 70)
        assert_near(problem.results(), reference_results(mask, problem), f"{head_dim}, {value_dim}")


LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 257)


@pytest.mark.parametrize(("kv_len", "dtype"), in_turn(LENGTHS, (torch.float64, torch.bfloat16)))
def test_ragged_lengths(kv_len: int, dtype: torch.dtype) -> None:
    kinds = (
        masks.causal(), masks.window(33, 7), masks.window(40, dilation=3), masks.segments(20),
        masks.congruent(3, 2), masks.full(),
    )  # fmt: skip
    for number, q_len in enumerate(LENGTHS):
        mask = kinds[(number + kv_len) % len(kinds)]
        for q_offset in ((0, kv_len - 1), (5, kv_len + 30), (0, 1000))[number % 3]:
            _, problem = ragged(dtype, 8, 8, q_len, kv_len, q_offset, mask)
            about = f"{q_len} queries from {q_offset}, {mask!r}"
            assert_near(problem.results(), reference_results(mask, problem), about)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty_queries_or_keys_give_zeros(q_len: int, kv_len: int, dtype: torch.dtype) -> None:
    mask, problem = ragged(dtype, 8, 6, q_len, kv_len)
    out, lse, *grads = problem.results()
    assert out.shape == (2, 4, q_len, 6)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all((grad == 0).all() for grad in grads)
    assert [grad.shape for grad in grads] == [x.shape for x in (problem.q, problem.k, problem.v)]
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    attended = cd.compile(mask)(q, k, v)
    attended.sum().backward()
    assert torch.equal(attended, out)


@pytest.mark.parametrize(
    ("dtype", "count"), in_turn((torch.float32, torch.float64, torch.bfloat16), (1, 2))
)
def test_query_offset_per_batch_entry(
    dtype: torch.dtype, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    positions = (0, 100, 37, 299, 600)
    sinks_and_window = masks.window(9, 0) | masks.sinks(2)
    dilated = masks.window(60, dilation=4)
    for mask in (sinks_and_window, masks.causal(), masks.segments(50), dilated):
        q, grad_out = (normal(5, 4, 40, 16, dtype=dtype, seed=seed) for seed in (1, 2))
        k, v = (normal(5, 2, 300, 16, dtype=dtype, seed=seed) for seed in (3, 4))
        offsets = torch.tensor(positions)
        problem = Problem(work_of(mask, 4), q, k, v, grad_out, None, offsets=offsets)
        results = problem.results()
        # Every entry equals a call of its own at its position.
        for b, position in enumerate(positions):
            entry = slice(b, b + 1)
            single = Problem(
                problem.work, q[entry], k[entry], v[entry], grad_out[entry], None, q_offset=position
            )
            expected = reference_results(mask, single)
            assert_near([x[entry] for x in results], expected, f"{mask!r} entry {b}")
        assert executed(problem) == counts_of(problem)
