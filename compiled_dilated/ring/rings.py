"""A ring: a number of ranks, a layout and a transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from .. import arguments
from ..calls import Call
from ..partials import Saved
from ..plans import Problem
from . import plans
from .ledgers import Ledger
from .schedules import Schedule
from .simulated import Simulated


class Transport(Protocol):
    """Runs schedules.

    ledger: counters of the last forward or backward.
    sharded: whether tensors are one rank's shards; else complete sequences.
    """

    ledger: Ledger
    sharded: bool

    def tokens(self, q: Tensor, k: Tensor, v: Tensor, about: Mapping[str, str]) -> int:
        """Length of the complete sequence of these tensors.

        about: properties that must be equal on all ranks, by name.

        Raises ValueError on every rank if one of them differs.
        """
        ...

    def refuse(self, error: Exception) -> None:
        """Report an invalid call of this rank to all waiting ranks."""
        ...

    @property
    def group_name(self) -> str | None:
        """Name of the process group; None if this process runs all ranks."""
        ...

    def forward(
        self, schedule: Schedule, call: Call, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        ...

    def backward(
        self, schedule: Schedule, call: Call, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...


class Ring:
    """A number of ranks that compute a program together.

    ranks: number of ranks.
    layout: name of a layout, one of `plans.LAYOUTS`.
    transport: None for all ranks in this process.
    """

    def __init__(
        self, ranks: int, layout: str = "auto", transport: Transport | None = None
    ) -> None:
        self.ranks = arguments.integer("ranks", ranks, 1)
        self.layout = arguments.choice("layout", layout, plans.LAYOUTS)
        self.transport = Simulated() if transport is None else transport

    @property
    def ledger(self) -> Ledger:
        """Steps, messages and bytes executed by the last forward or backward."""
        return self.transport.ledger

    @property
    def sharded(self) -> bool:
        """Whether a call passes one rank's shards, not the complete sequence."""
        return self.transport.sharded

    @property
    def written(self) -> list[Any]:
        """Ranks, layout and process group name: enough to rebuild the ring elsewhere."""
        return [self.ranks, self.layout, self.transport.group_name]

    def plan(self, problem: Problem) -> plans.RingPlan:
        """Layout and schedule for the complete problem."""
        return plans.plan_for(problem, self.ranks, self.layout)

    def forward(
        self, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """out and lse, for tensors as the transport takes them.

        problem: that of the complete sequence.
        """
        return self.transport.forward(self.plan(problem).schedule, call, q, k, v)

    def backward(self, problem: Problem, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        return self.transport.backward(self.plan(problem).schedule, call, saved)

    def __repr__(self) -> str:
        return f"Ring({self.ranks}, layout={self.layout!r}, transport={self.transport!r})"
