"""Attention problems, and the ways to compute them.

Ours with and without its native kernel, torch's SDPA, stock compiled FlexAttention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import compiled_dilated as cd
from compiled_dilated import masks, rates
from compiled_dilated.lowerings import native
from compiled_dilated.masks import Mask
from compiled_dilated.programs import Program, as_program

# The segments and dilation rates that all benchmarks use.
LONGNET = cd.longnet((2048, 4096, 8192), (1, 2, 4))

# The largest error of a right result, as a share of the largest number of the result.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Problem:
    """A program over random normal tensors of batch 1.

    kv_heads: key heads; None: as many as heads.
    by_token: whether tensors are views of (B, N, H, D).
    data: tensors that masks read.
    bias: the score_mod as a tensor (heads, N, N) for N tokens, for SDPA.
    pairs_per_head: allowed pairs, where a plan cannot count them.
    """

    program: Program | Mask
    tokens: int
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    dtype: str = "float32"
    by_token: bool = False
    data: Mapping[str, Tensor] | None = None
    score_mod: Any = None
    bias: Callable[[int], Tensor] | None = None
    pairs_per_head: Callable[[], int] | None = None

    @cached_property
    def pairs(self) -> int:
        """Allowed pairs over all heads; a pair of two branches counts twice."""
        if self.pairs_per_head is not None:
            return self.pairs_per_head() * self.heads
        pairs = cd.plan(self.program, (1, self.heads, self.tokens, self.head_dim)).useful_pairs
        assert pairs is not None, f"{self.program!r} needs pairs_per_head"
        return pairs

    def flops(self, backward: bool) -> float:
        """Useful floating point operations."""
        return 4 * self.head_dim * self.pairs * (rates.FORWARD_AND_BACKWARD if backward else 1)

    def tensors(self, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (1, heads, tokens, head_dim), equal in every run."""
        random = torch.Generator().manual_seed(0)
        kv_heads = self.kv_heads or self.heads
        q, k, v = (self._normal(heads, random) for heads in (self.heads, kv_heads, kv_heads))
        return q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward)

    def _normal(self, heads: int, random: torch.Generator) -> Tensor:
        shape = (1, heads, self.tokens, self.head_dim)
        if self.by_token:
            shape = (1, self.tokens, heads, self.head_dim)
        x = torch.randn(shape, generator=random).to(getattr(torch, self.dtype))
        return x.transpose(1, 2) if self.by_token else x

    def call(self, attention: Attention, backward: bool) -> Call:
        """A call of one forward, or of a forward and its backward."""
        q, k, v = self.tensors(backward)
        if not backward:
            return lambda: attention(q, k, v)
        grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
        return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), grad_out)

    def lacks_memory(self, backward: bool) -> str | None:
        """Why the tensors do not fit in memory; None if they fit."""
        import psutil

        # q and out, in a backward also both gradients and the given one; k and v, and gradients.
        q_tensors, kv_tensors = (5, 4) if backward else (2, 2)
        rows = self.heads * q_tensors + (self.kv_heads or self.heads) * kv_tensors
        needed = 1.25 * rows * self.tokens * self.head_dim * getattr(torch, self.dtype).itemsize
        free = psutil.virtual_memory().available
        if needed < free:
            return None
        return f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Whether any branch allows a pair: FlexAttention's mask_mod."""
        by_branch = (mask.allows(b, h, q, kv, self.data) for mask in self._masks)
        allowed: Tensor = reduce(operator.or_, by_branch)
        return allowed

    @cached_property
    def _masks(self) -> list[Mask]:
        branches = as_program(self.program).branches
        return [branch.mask.for_heads(self.heads).on("cpu") for branch in branches]

    @property
    def differs_by_head(self) -> bool:
        """Whether heads see different pairs."""
        for branch in as_program(self.program).branches:
            first = branch.mask_at(0, self.heads)
            for head in range(1, self.heads):
                if branch.mask_at(head, self.heads) != first:
                    return True
        return False


def pairs_within(size: int, radius: int) -> int:
    """Pairs of coordinates along one axis that are at most `radius` apart."""
    pairs = size
    for distance in range(1, min(radius, size - 1) + 1):
        pairs += 2 * (size - distance)
    return pairs


def by_program(problem: Problem, lowering: str = "auto") -> Attention:
    """This library, with the problem's program compiled."""
    attend = cd.compile(problem.program, lowering=lowering)
    options: dict[str, Any] = {}
    if problem.data is not None:
        options["data"] = problem.data
    if problem.score_mod is not None:
        options["score_mod"] = problem.score_mod
    return lambda q, k, v: attend(q, k, v, **options)


def fallback(problem: Problem) -> Attention:
    """This library without its native kernel: `strided` if it applies, else `tiled`."""
    if problem.score_mod is not None:
        return by_program(problem, "tiled")
    shape = (1, problem.heads, problem.tokens, problem.head_dim)
    try:
        cd.plan(problem.program, shape, problem.kv_heads, lowering="strided")
    except ValueError:
        return by_program(problem, "tiled")
    return by_program(problem, "strided")


def sdpa(problem: Problem) -> Attention:
    """SDPA, with a dense mask unless the program is full or causal."""
    gqa = problem.kv_heads is not None
    if problem.program in (masks.full(), masks.causal()) and problem.score_mod is None:
        is_causal = problem.program == masks.causal()
        return partial(scaled_dot_product_attention, is_causal=is_causal, enable_gqa=gqa)
    if problem.score_mod is not None and problem.bias is None:
        raise ValueError("SDPA has no such score_mod")
    index, zero = torch.arange(problem.tokens), torch.zeros((), dtype=torch.int64)
    mask = problem.allowed(zero, zero, index[:, None], index)
    mask = mask.broadcast_to(problem.tokens, problem.tokens)
    if problem.bias is not None:
        bias = problem.bias(problem.tokens).masked_fill(~mask, -torch.inf)
        mask = bias[None].to(getattr(torch, problem.dtype))
    return partial(scaled_dot_product_attention, attn_mask=mask, enable_gqa=gqa)


def flex(problem: Problem) -> Attention:
    """Stock FlexAttention, compiled as its manual recommends, with a compiled block mask.

    A pair of two branches counts once: less work than the program defines.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # After too many compiled masks of one function, torch silently falls back to dense.
    torch.compiler.reset()
    heads = problem.heads if problem.differs_by_head else None

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return problem.allowed(b, h, q, kv)

    create = torch.compile(create_block_mask, dynamic=False)
    block_mask = create(mask_mod, None, heads, problem.tokens, problem.tokens, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = problem.kv_heads is not None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, score_mod=problem.score_mod, block_mask=block_mask, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return attention


# By the name of their column in tables.
WAYS: Mapping[str, Callable[[Problem], Attention]] = {
    "ours": by_program,
    "fallback": fallback,
    "flex": flex,
    "SDPA": sdpa,
}


def computed_pairs(problem: Problem) -> int | None:
    """Pairs that our kernel computes; None if that depends on operands."""
    q, k, v = problem.tensors(backward=False)
    plan = cd.compile(problem.program).plan(q, k, v)
    if plan.lowering != "native" or problem.data is None:
        return plan.cost.pairs
    work = plan.chosen[0].work[0]
    if work.slots:
        return None
    return native.counts(work, plan.problem, [problem.data[name] for name in work.names])[0]
