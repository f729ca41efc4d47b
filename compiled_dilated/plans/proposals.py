"""Answers of lowerings to problems: proposals with costs, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The cost of a proposal for the complete problem, in the forward.

    pairs: query-key pairs computed, over batch and heads.
    kernel_flops: 2 D + 2 Dv per pair.
    copied_bytes: gathered tiles and merged results.
    calls: kernel calls.
    peak_bytes: the most allocated at once beyond q, k, v and out.
    dense_flops: flops of a dense kernel in the same time; proposals are compared by it.
    backward_bytes: the most that a backward allocates at once beyond these and the gradients.
    """

    pairs: int
    kernel_flops: int
    copied_bytes: int
    calls: int
    peak_bytes: int
    dense_flops: float
    backward_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Proposal:
    """A lowering's way to compute a branch.

    branch: its number; None for the complete program.
    counting: the cost, or a function that counts it.
    work: opaque to all but the lowering.
    workspace: peak_bytes and backward_bytes of the cost, where they need no counting.
    """

    lowering: str
    branch: int | None
    counting: Cost | Callable[[], Cost] = field(repr=False)
    work: Any = field(repr=False)
    workspace: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def workspaces(self) -> tuple[int, int]:
        """Bytes beyond the tensors of a forward, and of a backward."""
        if self.workspace is not None:
            return self.workspace
        return self.cost.peak_bytes, self.cost.backward_bytes

    @cached_property
    def cost(self) -> Cost:
        """The cost, counted on the first access."""
        if isinstance(self.counting, Cost):
            return self.counting
        return self.counting()


@dataclass(frozen=True)
class Refusal:
    """Why a lowering does not compute something, and what to do instead."""

    lowering: str
    branch: int | None
    reason: str
    way_out: str

    def __str__(self) -> str:
        where = ""
        if self.branch is not None:
            where = f" for branch {self.branch}"
        return f"lowering {self.lowering!r} refuses{where}: {self.reason}. {self.way_out}"
