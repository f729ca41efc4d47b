"""Estimated peak and time of a traced step."""

from __future__ import annotations

from dataclasses import dataclass

from ..analysis import costs
from ..analysis.costs import MACHINE, Machine
from .candidates import Passes
from .tracing import Traced


@dataclass(frozen=True)
class Estimate:
    """A step under some passes.

    peak_bytes: the most live at one time, inputs and parameters included
    seconds: by the cost model
    changed: whether any pass changed anything
    """

    passes: Passes
    peak_bytes: int
    input_bytes: int
    seconds: float
    changed: bool

    @property
    def added_bytes(self) -> int:
        """The peak beyond the inputs."""
        return self.peak_bytes - self.input_bytes


def estimate(traced: Traced, machine: Machine = MACHINE) -> Estimate:
    """Estimate a traced step."""
    footprint = traced.footprint()
    return Estimate(
        passes=traced.passes,
        peak_bytes=footprint.peak_bytes,
        input_bytes=footprint.input_bytes,
        seconds=seconds(traced, machine),
        changed=any(change.lines for change in traced.changes),
    )


def seconds(traced: Traced, machine: Machine) -> float:
    """The time of a traced step by the cost model."""
    total = machine.seconds(costs.of_graph(traced.forward.graph))
    if traced.backward is not None:
        total += machine.seconds(costs.of_graph(traced.backward.graph))
    return total
