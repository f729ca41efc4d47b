"""The cases of benchmarks.

A case is a problem, the baseline of its rate, the least share of that rate, and rivals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compiled_dilated import masks

from .problems import Problem

DENSE_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Baseline:
    """The problem whose rate is 1.

    name: as printed in the column `share of`.
    way: how it is computed, one of `WAYS`.
    """

    name: str
    problem: Problem
    way: str = "SDPA"


@dataclass(frozen=True, eq=False)
class Case:
    """One measurement and its bars.

    bars: the least share, forward and forward + backward.
    of: the baseline; None: dense SDPA over 4096 tokens in the same dtype.
    rivals: other ways to compute the same problem.
    family: cases whose time per token is compared with the first of them.
    quick: whether it is part of the short run.
    """

    name: str
    problem: Problem
    bars: tuple[float | None, float | None] = (None, None)
    of: Baseline | None = None
    rivals: tuple[str, ...] = ("flex", "fallback")
    family: str | None = None
    quick: bool = False

    @property
    def baseline(self) -> Baseline:
        """The baseline of the case's share."""
        return self.of or dense(self.problem)


def dense(problem: Problem, tokens: int = DENSE_TOKENS) -> Baseline:
    """Dense SDPA in a problem's dtype."""
    full = Problem(masks.full(), tokens, head_dim=problem.head_dim, dtype=problem.dtype)
    return Baseline(f"dense {tokens}", full)


def same_work(problem: Problem, name: str) -> Baseline:
    """SDPA of the same problem, so that shares are ratios of times."""
    return Baseline(name, problem)


def in_time_of_dense(problem: Problem) -> Baseline:
    """Dense SDPA over all pairs, so that shares are ratios of times."""
    full = Problem(
        masks.full(), problem.tokens, problem.heads, head_dim=problem.head_dim, dtype=problem.dtype
    )
    useful = replace(full, pairs_per_head=lambda: problem.pairs // problem.heads)
    return Baseline("time of dense", useful)


def ours_of(problem: Problem, name: str) -> Baseline:
    """This library on a problem of equal work."""
    return Baseline(f"ours, {name}", problem, "ours")


def label(tokens: int) -> str:
    """A number of tokens as text: 4096 as 4k, 2**20 as 1m."""
    for size, letter in ((2**20, "m"), (2**10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)
