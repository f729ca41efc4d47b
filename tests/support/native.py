"""The native operators on the table of cases: calls, expected results, tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.lowerings.native import _TYPES, Work
from compiled_dilated.masks import Mask
from compiled_dilated.native.encode import encode
from compiled_dilated.programs import Branch, Program, as_program
from tests.cases import Case, Inputs

ops: Any = torch.ops.compiled_dilated
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.004}
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v")


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, the same in every run, by seed and shape."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def work_of(program: Program | Mask, heads: int, like: Tensor | None = None) -> Work:
    """The work item of a program.

    like: queries (B, heads, N, D), needed for programs with functions, which a plan traces.
    """
    program = as_program(program)
    if not any(_has_function(branch.mask) for branch in program.branches):
        return Work(encode(program, heads), program.names, ())
    assert like is not None
    x = like.detach().double().requires_grad_()
    plan = cd.compile(program, lowering="native").plan(x, x, x)
    work: Work = plan.chosen[0].work[0]
    return work


def _has_function(mask: Mask) -> bool:
    is_function = isinstance(mask, masks.functions.FromMod)
    return is_function or any(_has_function(part) for part in mask.parts)


@dataclass(frozen=True)
class Problem:
    """Arguments of one call of the operators, and its results' gradients."""

    work: Work
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    data: list[Tensor] | None = None
    scale: float = 0.3
    q_offset: int = 0
    offsets: Tensor | None = None

    def forward(self, by_token: bool = False) -> tuple[Tensor, Tensor]:
        out, lse = ops.native(
            self.q, self.k, self.v, self.data, None, self.work.code, self.scale,
            self.q_offset, self.offsets, by_token,
        )  # fmt: skip
        return out, lse

    def results(self) -> list[Tensor]:
        """out, lse and the gradients of q, k and v."""
        out, lse = self.forward()
        grads = ops.native_backward(
            self.grad_out, self.grad_lse, self.q, self.k, self.v, out, lse, self.data, None,
            self.work.code, self.scale, self.q_offset, self.offsets, [],
        )  # fmt: skip
        return [out, lse, *grads[:3]]


def problem_of(
    case: Case, n: int, dtype: torch.dtype, shape: tuple[int, int, int] | None = None
) -> tuple[Problem, Inputs]:
    """A case as a call of the operators, and its inputs.

    n: tokens that the case's program is for.
    shape: (q_len, kv_len, q_offset), by default (n, n, 0).
    """
    q_len, kv_len, q_offset = shape or (n, n, 0)
    inputs = case.inputs(n, dtype, q_len, kv_len)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    work = work_of(case.program(n), case.heads, case.inputs(n, dtype).q)
    data = [inputs.data[name] for name in work.names] or None
    grads, scale = (inputs.grad_out, inputs.grad_lse), q.shape[3] ** -0.5
    return Problem(work, q, k, v, *grads, data, scale, q_offset), inputs


def reference_results(
    program: Program | Mask, problem: Problem, data: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """The reference's results in float64.

    Gradients of an lse of -inf are ignored.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = cd.reference(
        program, q, k, v, scale=problem.scale, q_offset=problem.q_offset, data=data, return_lse=True
    )
    results, cotangents = [out], [problem.grad_out.double()]
    if problem.grad_lse is not None:
        alive = lse != -math.inf
        results.append(lse[alive])
        cotangents.append(problem.grad_lse.double()[alive])
    return [out.detach(), lse.detach(), *torch.autograd.grad(results, (q, k, v), cotangents)]


def tolerance(dtype: torch.dtype) -> float:
    """Limit of errors, as a share of a result's largest entry.

    dtype: of the result; an lse is float32 for inputs of 16 bits, and as exact as for float32.

    It is a few times the rounding of all results. In 16 bits a wrong key of little weight changes a
    result by less: the lse, and the counts of pairs, show it.
    """
    return 1e-10 if dtype == torch.float64 else LOW[dtype]


def assert_near(results: list[Tensor], expected: list[Tensor], subject: object = "") -> None:
    """Infinite and NaN in the same places; elsewhere near."""
    for name, x, right in zip(NAMES, results, expected, strict=False):
        about = f"{subject} {name}"
        allowed = tolerance(x.dtype)
        assert x.shape == right.shape, about
        finite = right.isfinite()
        assert torch.equal(x.isfinite(), finite), f"{about}: other entries are infinite or NaN"
        torch.testing.assert_close(x[~finite].double(), right[~finite], equal_nan=True)
        if finite.any():
            error = (x[finite] - right[finite]).abs().max().item()
            largest = right[finite].abs().max().item()
            message = f"{about}: off by {error:.2e}, largest entry {largest:.2e}"
            assert error <= allowed * max(largest, 1e-3), message


def assert_same_bits(results: list[Tensor], expected: list[Tensor], subject: object = "") -> None:
    """Assert that results are equal; NaN equals NaN."""
    for name, x, right in zip(NAMES, results, expected, strict=False):
        message = f"{subject} {name}: other bits"
        torch.testing.assert_close(x, right, rtol=0, atol=0, equal_nan=True, msg=message)


def check_threads(
    problem: Problem,
    threads: Callable[[int], None],
    counts: tuple[int, ...] = (2, 7),
    runs: int = 2,
) -> None:
    """The same bits for all numbers of threads."""
    threads(1)
    expected = problem.results()
    for count in counts:
        threads(count)
        for run in range(runs):
            assert_same_bits(problem.results(), expected, f"{count} threads, run {run}")


def two_branches(n: int) -> Program:
    return Program((Branch(masks.window(70, 3)), Branch(masks.causal() & masks.congruent(3, 1))))


# Programs on few key heads, whose threads wait for each other's turns: of one branch or several, of
# residue classes, of boxes of a grid.
FEW_HEADS: dict[str, Callable[[int], Program | Mask]] = {
    "full": lambda n: masks.full(),
    "causal": lambda n: masks.causal(),
    "window": lambda n: masks.window(100),
    "window dilated": lambda n: masks.window(200, 90, dilation=5),
    "sinks and window": lambda n: masks.causal() & (masks.window(64) | masks.sinks(5)),
    "congruent": lambda n: masks.congruent(4, 1),
    "grid": lambda n: masks.neighborhood((n // 40, 40), 4),
    "grid shifted, with tokens beside it": lambda n: (
        masks.neighborhood((n // 42, 40), (2, 5), edges="shift", offset=3) | masks.global_tokens(3)
    ),
    "volume": lambda n: masks.neighborhood((n // 40, 5, 8), (1, 2, 3)),
    "branches": two_branches,
    "longnet": lambda n: cd.longnet((64, 256, 1024), (1, 4, 16), causal=True),
    "dead rows": lambda n: masks.window(30) & ~masks.prefix(90),
}


def counts_of(problem: Problem) -> list[int]:
    """Counts of native_counts: pairs computed, pairs whose mask is evaluated, blocks, tiles."""
    batch, heads, q_len, head_dim = problem.q.shape
    _, kv_heads, kv_len, value_dim = problem.v.shape
    sizes = [batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim]
    sizes.append(_TYPES[str(problem.q.dtype).removeprefix("torch.")])
    numbers = ops.native_counts(
        problem.data, None, problem.work.code, sizes, problem.q_offset, problem.offsets
    )
    return list(map(int, numbers))


def executed(problem: Problem) -> list[int]:
    """The same counts, of the pairs that a call executed.

    Its results are those of an uncounted call.
    """
    out, lse, numbers = ops.native_counted(
        problem.q, problem.k, problem.v, problem.data, None, problem.work.code, problem.scale,
        problem.q_offset, problem.offsets, False,
    )  # fmt: skip
    assert_same_bits([out, lse], list(problem.forward()))
    return list(map(int, numbers))


def ragged(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    q_len: int,
    kv_len: int,
    q_offset: int = 0,
    mask: Mask | None = None,
) -> tuple[Mask, Problem]:
    """A mask and a problem with ragged lengths.

    Batch 2, 4 query heads and 2 key heads.

    mask: by default one whose edges cross tiles.
    """
    mask = masks.window(33, 7) | masks.sinks(2) if mask is None else mask
    q = normal(2, 4, q_len, head_dim, dtype=dtype, seed=1)
    grad_out = normal(2, 4, q_len, value_dim, dtype=dtype, seed=2)
    k = normal(2, 2, kv_len, head_dim, dtype=dtype, seed=3)
    v = normal(2, 2, kv_len, value_dim, dtype=dtype, seed=4)
    grad_lse = normal(2, 4, q_len, dtype=torch.promote_types(dtype, torch.float32), seed=5)
    work, scale = work_of(mask, 4), head_dim**-0.5
    return mask, Problem(work, q, k, v, grad_out, grad_lse, scale=scale, q_offset=q_offset)


def by_token(x: Tensor) -> Tensor:
    """(B, H, N, D) stored as (B, N, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def keep(x: Tensor) -> Tensor:
    """The contiguous tensor."""
    return x.contiguous()
