"""A ring as an execution: how many ranks, under which layout, carried by which transport."""

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
    """Carries out a schedule. What its tensors hold, the whole sequence or a rank's shard, is the transport's own."""

    ledger: Ledger
    sharded: bool

    def tokens(self, q: Tensor, k: Tensor, v: Tensor, about: Mapping[str, str]) -> int:
        """The length of the whole sequence, of which these are the tensors at hand.

        about: what all ranks must agree in, by name. Raises ValueError on every rank where they do not.
        """
        ...

    def refuse(self, error: Exception) -> None:
        """Say to other ranks, which wait for this one, that its call is wrong."""
        ...

    @property
    def group_name(self) -> str | None:
        """The process group; None where this process is all ranks."""
        ...

    def forward(self, schedule: Schedule, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse."""
        ...

    def backward(self, schedule: Schedule, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...


class Ring:
    """`ranks` ranks that compute a program together. `ledger` says what the last call really did."""

    def __init__(self, ranks: int, layout: str = "auto", transport: Transport | None = None) -> None:
        self.ranks = arguments.integer("ranks", ranks, 1)
        self.layout = arguments.choice("layout", layout, plans.LAYOUTS)
        self.transport = Simulated() if transport is None else transport

    @property
    def ledger(self) -> Ledger:
        """Steps, messages and bytes of the last forward or backward, as they were executed."""
        return self.transport.ledger

    @property
    def sharded(self) -> bool:
        """Whether a call brings one rank's shards, not the whole sequence."""
        return self.transport.sharded

    @property
    def written(self) -> list[Any]:
        """What makes such a ring in another process: ranks, layout and the name of the process group."""
        return [self.ranks, self.layout, self.transport.group_name]

    def plan(self, problem: Problem) -> plans.RingPlan:
        """The layout and the schedule for a whole problem."""
        return plans.plan_for(problem, self.ranks, self.layout)

    def forward(self, problem: Problem, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of tensors as the transport takes them; `problem` is the whole one."""
        return self.transport.forward(self.plan(problem).schedule, call, q, k, v)

    def backward(self, problem: Problem, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        return self.transport.backward(self.plan(problem).schedule, call, saved)

    def __repr__(self) -> str:
        return f"Ring({self.ranks}, layout={self.layout!r}, transport={self.transport!r})"
