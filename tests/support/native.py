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
LOW = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v")


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, the same in every run; other ones for each seed."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def work_of(program: Program | Mask, heads: int, like: Tensor | None = None) -> Work:
    """What the kernel reads of a program; `like`: queries, for programs with functions, which are traced first."""
    program = as_program(program)
    if any(
        isinstance(part, masks.functions.FromMod)
        for branch in program.branches
        for part in _parts(branch.mask)
    ):
        assert like is not None
        x = like.detach().double().requires_grad_()
        chosen: Work = cd.compile(program, lowering="native").plan(x, x, x).chosen[0].work[0]
        return chosen
    return Work(encode(program, heads), program.names, ())


def _parts(mask: Mask) -> list[Mask]:
    return [mask, *(inner for part in mask.parts for inner in _parts(part))]


@dataclass(frozen=True)
class Problem:
    """Tensors of one call of the operators, and what flows back."""

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
            self.q,
            self.k,
            self.v,
            self.data,
            None,
            self.work.code,
            self.scale,
            self.q_offset,
            self.offsets,
            by_token,
        )
        return out, lse

    def results(self) -> list[Tensor]:
        """out, lse and the gradients of q, k and v."""
        out, lse = self.forward()
        grads = ops.native_backward(
            self.grad_out, self.grad_lse, self.q, self.k, self.v, out, lse, self.data, None, self.work.code, self.scale,
            self.q_offset, self.offsets, [],
        )  # fmt: skip
        return [out, lse, *grads[:3]]


def problem_of(
    case: Case, n: int, dtype: torch.dtype, shape: tuple[int, int, int] | None = None
) -> tuple[Problem, Inputs]:
    """A case of the table as a call of the operators; shape: (q_len, kv_len, q_offset)."""
    q_len, kv_len, q_offset = shape or (n, n, 0)
    inputs = case.inputs(n, dtype, q_len, kv_len)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    work = work_of(case.program(n), case.heads, case.inputs(n, dtype).q)
    data = [inputs.data[name] for name in work.names] or None
    return Problem(
        work, q, k, v, inputs.grad_out, inputs.grad_lse, data, q.shape[3] ** -0.5, q_offset
    ), inputs


def reference_results(
    program: Program | Mask, problem: Problem, data: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """The reference's results of the same, in float64; a gradient of an lse of -inf is none."""
    q, k, v = (x.detach().double().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = cd.reference(
        program, q, k, v, scale=problem.scale, q_offset=problem.q_offset, data=data, return_lse=True
    )
    results, into = [out], [problem.grad_out.double()]
    if problem.grad_lse is not None:
        alive = lse != -math.inf
        results, into = [out, lse[alive]], [*into, problem.grad_lse.double()[alive]]
    return [out.detach(), lse.detach(), *torch.autograd.grad(results, (q, k, v), into)]


def tolerance(dtype: torch.dtype) -> float:
    """Of a result's largest entry: far above rounding and far below a wrong key."""
    return 1e-10 if dtype == torch.float64 else LOW[dtype]


def assert_near(got: list[Tensor], expected: list[Tensor], what: object = "") -> None:
    """Infinite and NaN in the same places; elsewhere near."""
    for name, mine, theirs in zip(NAMES, got, expected, strict=False):
        allowed = tolerance(mine.dtype if name != "lse" else got[0].dtype)
        assert mine.shape == theirs.shape, f"{what} {name}"
        finite = theirs.isfinite()
        assert torch.equal(mine.isfinite(), finite), (
            f"{what} {name}: other entries are infinite or NaN"
        )
        torch.testing.assert_close(mine[~finite].double(), theirs[~finite], equal_nan=True)
        if finite.any():
            error = (mine[finite] - theirs[finite]).abs().max().item()
            largest = theirs[finite].abs().max().item()
            assert error <= allowed * max(largest, 1e-3), (
                f"{what} {name}: off by {error:.2e}, largest entry {largest:.2e}"
            )


def assert_same_bits(got: list[Tensor], expected: list[Tensor], what: object = "") -> None:
    for name, mine, theirs in zip(NAMES, got, expected, strict=False):
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=0, equal_nan=True, msg=f"{what} {name}: other bits"
        )


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


# With one key head all threads wait for each other's turns: by one branch in order, by several, with a step, by boxes of a grid.
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
    """What native_counts says: pairs computed, pairs asked about, blocks, tiles."""
    q, v = problem.q, problem.v
    sizes = [
        q.shape[0],
        q.shape[1],
        problem.k.shape[1],
        q.shape[2],
        v.shape[2],
        q.shape[3],
        v.shape[3],
        _TYPES[str(q.dtype)[6:]],
    ]
    numbers = ops.native_counts(
        problem.data, None, problem.work.code, sizes, problem.q_offset, problem.offsets
    )
    return list(map(int, numbers))


def executed(problem: Problem) -> list[int]:
    out, lse, numbers = ops.native_counted(
        problem.q, problem.k, problem.v, problem.data, None, problem.work.code, problem.scale, problem.q_offset, problem.offsets,
        False,
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
    """Two entries, four heads that share two; the mask needs pairs hidden one by one."""
    mask = masks.window(33, 7) | masks.sinks(2) if mask is None else mask
    q, grad_out = (
        normal(2, 4, q_len, head_dim, dtype=dtype, seed=1),
        normal(2, 4, q_len, value_dim, dtype=dtype, seed=2),
    )
    k, v = (
        normal(2, 2, kv_len, head_dim, dtype=dtype, seed=3),
        normal(2, 2, kv_len, value_dim, dtype=dtype, seed=4),
    )
    grad_lse = normal(2, 4, q_len, dtype=torch.promote_types(dtype, torch.float32), seed=5)
    return mask, Problem(
        work_of(mask, 4), q, k, v, grad_out, grad_lse, scale=head_dim**-0.5, q_offset=q_offset
    )


def by_token(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def keep(x: Tensor) -> Tensor:
    return x.contiguous()
