"""The table of cases in every dtype by the native operators.

It runs in processes of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from tests.cases import CASES
from tests.support.native import (
    FLOATS,
    assert_near,
    counts_of,
    executed,
    normal,
    ops,
    problem_of,
    ragged,
    reference_results,
    tolerance,
)

# The code of such a process, and what it prints.
TABLE = "from tests.support.native_table import check_table; check_table()"
NEAR = "all near\n"
HEAD_DIMS = ((1, 1), (3, 256), (31, 33), (64, 64), (96, 17), (255, 128), (256, 256))
# Queries, keys, and the position of the first query.
LENGTHS = ((1, 1, 0), (65, 130, 40), (33, 15, 300), (1, 2200, 2100))


def check_table(step: int = 1) -> None:
    """Compare every `step`-th case with the reference, then sizes, merges and functions."""
    for number, case in enumerate(CASES[::step]):
        n = case.lengths[-1]
        # 1. Results and gradients, also at odd lengths and offsets.
        shapes = [None, (n // 2, n, n // 3)] if case.crossed and n < 400 else [None]
        for dtype in FLOATS:
            for shape in shapes:
                problem, inputs = problem_of(case, n, dtype, shape)
                expected = reference_results(case.program(n), problem, inputs.data)
                assert_near(problem.results(), expected, f"{case} {n} {dtype} {shape}")
        # 2. Counts.
        counted, _ = problem_of(case, n, torch.float32)
        assert executed(counted) == counts_of(counted)
        # 3. Runs that only sanitizers judge: a short length, and NaN in keys and values.
        problem, _ = problem_of(case, min(case.lengths), FLOATS[number % 4])
        problem.results()
        for x in (problem.k, problem.v):
            x[:, :, ::7] = math.nan
        problem.results()
    check_sizes()
    check_merges()
    check_functions()
    print(NEAR, end="")


def check_sizes() -> None:
    """Check widths and lengths, of whole vectors and tiles or not."""
    for dtype in FLOATS:
        for head_dim, value_dim in HEAD_DIMS:
            for q_len, kv_len, q_offset in LENGTHS:
                mask, problem = ragged(dtype, head_dim, value_dim, q_len, kv_len, q_offset)
                about = f"{dtype} {head_dim} {value_dim} {q_len}"
                assert_near(problem.results(), reference_results(mask, problem), about)


def check_merges() -> None:
    """Keys in two parts, finite ones and NaN."""
    mask = masks.window(20, 3)
    for dtype in FLOATS:
        _, problem = ragged(dtype, 24, 20, 100, 100, 0, mask)
        q, v, scale, code = problem.q, problem.v, problem.scale, problem.work.code
        for added in (0.0, math.nan):
            k = problem.k.clone()
            k[0, 0, 90] += added
            out = v.new_zeros(2, 4, 100, 20)
            lse = torch.full(
                q.shape[:3], -math.inf, dtype=torch.promote_types(dtype, torch.float32)
            )
            for start, stop in ((0, 30), (30, 100)):
                part = k[:, :, start:stop], v[:, :, start:stop]
                ops.native_merge(out, lse, q, *part, None, None, code, scale, -start)
            assert_near([out, lse], list(cd.reference(mask, q, k, v, scale=scale, return_lse=True)))


def check_functions() -> None:
    """A mask_mod, and a score_mod whose table learns."""

    def seen(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q - kv) % (h + 2) == b

    mask = masks.from_mod(seen, within=masks.window(60)) | masks.sinks(2)
    attend = cd.compile(mask, lowering="native")

    def reference(*inputs: Tensor, **options: Any) -> Any:
        return cd.reference(mask, *inputs, **options)

    for dtype in FLOATS:
        *results, learned = _results_of_functions(attend, dtype, dtype)
        *expected, expected_learned = _results_of_functions(reference, dtype, torch.float64)
        assert_near(results, expected, dtype)
        error = (learned - expected_learned).abs().max()
        assert error <= tolerance(dtype) * expected_learned.abs().max(), dtype


def _results_of_functions(attention: Any, dtype: torch.dtype, compute: torch.dtype) -> list[Tensor]:
    """out, lse and the gradients of q, k, v and a table.

    The table's is in float64.

    dtype: of the inputs' numbers.
    compute: the dtype that they are passed in.
    """
    table = normal(4, 400, seed=9, dtype=torch.promote_types(dtype, torch.float32))
    table = table.to(torch.promote_types(compute, torch.float32)).requires_grad_()

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return torch.tanh(s) * 3 + table[h, torch.clamp(q - kv + 200, 0, 399)] - 0.01 * abs(q - kv)

    inputs = []
    for heads in (4, 2, 1):
        x = normal(2, heads, 150, 16, dtype=dtype, seed=heads).to(compute)
        inputs.append(x.requires_grad_())
    inputs[2] = inputs[2].expand(2, 2, 150, 16)
    out, lse = attention(*inputs, score_mod=score, return_lse=True)
    loss = out.double().sum() + lse[lse != -math.inf].double().sum()
    *grads, learned = torch.autograd.grad(loss, [*inputs, table])
    return [out.detach(), lse.detach(), *grads, learned.double()]
