"""Cases: a problem, what its useful rate is a share of, the least that this share may be, and what else is measured beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compiled_dilated import masks

from .problems import Problem

DENSE_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Baseline:
    """The problem whose rate is 1, and the way to compute it, one of `WAYS`."""

    name: str
    problem: Problem
    way: str = "SDPA"


@dataclass(frozen=True, eq=False)
class Case:
    """One measurement and its bars.

    bars: the least share, forward and forward + backward. of: dense SDPA over 4096 tokens in the same dtype if None.
    rivals: other ways to compute the same. family: cases whose time per token is compared to that of the first of them.
    quick: a part of the short run.
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
    """One dense SDPA of a problem's dtype."""
    return Baseline(
        f"dense {tokens}",
        Problem(masks.full(), tokens, head_dim=problem.head_dim, dtype=problem.dtype),
    )


def same_work(problem: Problem, name: str) -> Baseline:
    """SDPA for the same problem, so that shares are ratios of times."""
    return Baseline(name, problem)


def in_time_of_dense(problem: Problem) -> Baseline:
    """Dense SDPA over all pairs, as if it did no more than the problem's: shares are ratios of times."""
    full = Problem(
        masks.full(), problem.tokens, problem.heads, head_dim=problem.head_dim, dtype=problem.dtype
    )
    return Baseline(
        "time of dense", replace(full, pairs_per_head=lambda: problem.pairs // problem.heads)
    )


def ours_of(problem: Problem, name: str) -> Baseline:
    """This library on a problem of equal work."""
    return Baseline(f"ours, {name}", problem, "ours")


def label(tokens: int) -> str:
    """4096 as 4k, 2**20 as 1m; 512 as it is."""
    for size, letter in ((2**20, "m"), (2**10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)
