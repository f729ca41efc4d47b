"""Native kernels: numbers that are not finite, scales, rows without keys."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from tests.cases import CASES, Case
from tests.support.native import (
    FLOATS,
    Problem,
    assert_near,
    assert_same_bits,
    normal,
    ops,
    problem_of,
    ragged,
    reference_results,
    tolerance,
    work_of,
)
from tests.support.turns import in_turn

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


def assert_right(results: Any, expected: Any) -> None:
    """Infinite and NaN in the same places, and near elsewhere."""
    for x, right in zip(results, expected, strict=True):
        limit = tolerance(x.dtype)
        assert torch.equal(x.isnan(), right.isnan()), "NaN in other places"
        torch.testing.assert_close(x.double(), right, rtol=limit, atol=limit, equal_nan=True)


BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("case", "dtype"),
    in_turn([case for case in CASES if 129 in case.lengths][::4], (torch.float32, torch.bfloat16)),
)
def test_nonfinite_keys_and_values_reach_only_rows_that_see_them(
    case: Case, dtype: torch.dtype
) -> None:
    n, program = 129, case.program(129)
    problem, inputs = problem_of(case, n, dtype)
    generator = torch.Generator().manual_seed(len(case.name))
    k, v = problem.k.clone(), problem.v.clone()
    for x in (k, v):
        for _ in range(4):
            place = tuple(int(torch.randint(0, size, (), generator=generator)) for size in x.shape)
            x[place] = BAD[int(torch.randint(0, 3, (), generator=generator))]
    k[1, :, n // 2], v[0, :, : n // 4] = math.nan, math.inf
    results = replace(problem, k=k, v=v).forward()
    expected = cd.reference(program, problem.q, k, v, data=inputs.data, return_lse=True)
    assert_right(results, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nonfinite_hidden_keys_at_every_position_have_no_effect(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """One key of a causal window is bad at a time.

    It is in one entry and one head.
    """
    threads(3)
    n, mask = 50, masks.window(5, 0)
    work = work_of(mask, 2)
    q, k, v = (normal(2, 2, n, 8, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    clean = Problem(work, q, k, v, q, None).forward()
    for token in range(n):
        of_key, bad = token % 2 == 0, BAD[token % 3]
        spoiled = [k.clone(), v.clone()]
        spoiled[not of_key][token // 2 % 2, 1, token, 3] = math.nan if of_key else bad
        out, lse = Problem(work, q, spoiled[0], spoiled[1], q, None).forward()
        seen = torch.zeros(2, 2, n, dtype=torch.bool)
        seen[token // 2 % 2, 1, token : token + 6] = True
        assert torch.equal(lse.isnan(), seen & of_key)
        nan = seen[..., None].expand(2, 2, n, 8).clone()
        if not of_key:
            nan[..., :3] = nan[..., 4:] = False
        assert torch.equal(out.isnan(), nan)
        # In bfloat16 rows that are computed again may be rounded otherwise.
        allowed = 0.02 if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(out[~nan], clean[0][~nan], rtol=allowed, atol=allowed)
        seen_lse, clean_lse = lse[~lse.isnan()], clean[1][~lse.isnan()]
        allowed = tolerance(lse.dtype) if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(seen_lse, clean_lse, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinite_key_reaches_only_rows_that_see_it(dtype: torch.dtype) -> None:
    """Only hidden rows are checked.

    A key with scores of -inf may leave NaN or have weight 0.
    """
    q, k, v = (normal(1, 1, 40, 8, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    q[..., 3] = q[..., 3].abs() + 0.5
    mask = masks.window(5, 0)
    clean = Problem(work_of(mask, 1), q, k, v, v, None).forward()
    k[0, 0, 20, 3] = -math.inf
    out, lse = Problem(work_of(mask, 1), q, k, v, v, None).forward()
    hidden = torch.ones(40, dtype=torch.bool)
    hidden[20:26] = False
    expected = [clean[0][:, :, hidden], clean[1][:, :, hidden]]
    assert_same_bits([out[:, :, hidden], lse[:, :, hidden]], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_of_bad_keys(dtype: torch.dtype) -> None:
    """Parts of keys in a ring have bad numbers.

    The last part has nothing else.
    """
    n, program = 120, masks.window(9, 4)
    q = normal(2, 4, n, 8, dtype=dtype)
    k, v = normal(2, 2, n, 8, dtype=dtype, seed=1), normal(2, 2, n, 6, dtype=dtype, seed=2)
    k[0, 0, 20, 1], k[1, 1, 70, 0], v[1, :, 10, 2] = math.nan, math.inf, -math.inf
    k[0, :, 100:], v[0, 0, 95:] = math.nan, math.inf
    lse_dtype = torch.promote_types(dtype, torch.float32)
    out, lse = q.new_zeros(2, 4, n, 6), torch.full((2, 4, n), -math.inf, dtype=lse_dtype)
    code = work_of(program, 4).code
    for start, stop in ((0, 40), (40, 80), (80, 100), (100, 120)):
        keys, values = k[:, :, start:stop], v[:, :, start:stop]
        ops.native_merge(out, lse, q, keys, values, None, None, code, 0.3, -start)
    assert_right((out, lse), cd.reference(program, q, k, v, scale=0.3, return_lse=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_queries_affect_only_their_rows(bad: float, dtype: torch.dtype) -> None:
    mask = masks.window(9) & ~masks.prefix(0) & ~masks.sinks(15)
    q = normal(2, 4, 100, 8, dtype=dtype)
    k, v = (normal(2, 2, 100, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    clean = cd.reference(mask, q, k, v, return_lse=True)
    q[0, 1, 30], q[1, 3, 99, 2], q[1, 0, 2, 2] = bad, bad, bad
    out, lse = cd.compile(mask, lowering="native")(q, k, v, return_lse=True)
    touched = torch.zeros(2, 4, 100, dtype=torch.bool)
    touched[0, 1, 30] = touched[1, 3, 99] = True
    assert not out[touched].isfinite().all(-1).any()
    assert_right((out[~touched], lse[~touched]), (clean[0][~touched], clean[1][~touched]))
    assert lse[1, 0, 2] == -math.inf  # which sees nothing


@pytest.mark.parametrize("payload", [1, 0x155, 0x3FFFFF])
def test_nan_payloads_propagate_as_nan(payload: int) -> None:
    """For any values of the lower bits."""
    single = torch.float32, torch.int32, 0x7F800000
    double = torch.float64, torch.int64, 0x7FF << 52
    for dtype, kind, bits in (single, double):
        nan = torch.tensor(bits | payload, dtype=kind).view(dtype)
        assert nan.isnan()
        for negative in (False, True):
            q, k, v = (normal(1, 1, 40, 8, dtype=dtype, seed=seed) for seed in (1, 2, 3))
            k[0, 0, 20, 3] = -nan if negative else nan
            mask = masks.window(5, 0)
            out, lse = Problem(work_of(mask, 1), q, k, v, v, None).forward()
            assert out.isnan().all(-1)[0, 0].nonzero().flatten().tolist() == list(range(20, 26))
            assert lse.isnan()[0, 0].nonzero().flatten().tolist() == list(range(20, 26))


@pytest.mark.parametrize(("scale", "dtype"), in_turn((0.0, -0.3, 50.0), FLOATS, count=2))
def test_scales(scale: float, dtype: torch.dtype) -> None:
    for mask in (masks.window(20, 3), masks.full(), masks.causal() & masks.congruent(3, 1)):
        _, problem = ragged(dtype, 8, 8, 90, 90, 0, mask)
        problem = replace(problem, grad_lse=None, scale=scale)
        expected = reference_results(mask, problem)
        if abs(scale) > 1 and dtype != torch.float64:  # rounded scores differ by more than one
            assert_right([problem.forward()[1] / scale], [expected[1] / scale])
        else:
            assert_near(problem.results(), expected)


@pytest.mark.parametrize("scale", [1e6, 1e20, 1e29, 1e31, -1e33, 1e36])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_huge_finite_scores_are_not_masked(scale: float, dtype: torch.dtype) -> None:
    """A row of scores far below 0 is not dead.

    One key has all the weight.
    """
    mask = masks.window(2, 0)
    _, problem = ragged(dtype, 8, 8, 60, 60, 0, mask)
    problem = replace(problem, grad_lse=None, scale=scale)
    out, lse = problem.forward()
    expected, expected_lse = reference_results(mask, problem)[:2]
    torch.testing.assert_close((lse / scale).double(), expected_lse / scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


def test_rows_without_keys_send_no_gradient() -> None:
    """Large gradients of such rows change no other gradient."""
    for dtype in FLOATS:
        mask, problem = ragged(dtype, 8, 8, 60, 60, 0, masks.window(9) & ~masks.sinks(30))
        assert problem.grad_lse is not None
        dead = problem.forward()[1] == -math.inf
        assert dead.any()
        assert not dead.all()
        clean = problem.results()
        grad_out, grad_lse = problem.grad_out.clone(), problem.grad_lse.clone()
        grad_out[dead], grad_lse[dead] = 1000.0, math.inf
        loud = replace(problem, grad_out=grad_out, grad_lse=grad_lse).results()
        assert (loud[0][dead] == 0).all()
        assert (loud[2][dead] == 0).all()
        assert_same_bits(loud, clean, dtype)
        assert_near(clean, reference_results(mask, problem), dtype)
