"""A plan: the chosen proposals, all that were weighed, and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .. import rates
from ..footprints import ROUNDING, Fit, Footprint
from . import printing
from .problems import Problem
from .proposals import Cost, Proposal, Refusal


@dataclass(frozen=True, eq=False)
class Plan:
    """The chosen proposals, in branch order, and all candidates.

    weighed: all proposals and refusals.
    reason: of the choice, in words.
    untried: lowerings that neither proposed nor refused.
    useful_pairs: allowed pairs over batch and heads; None if they are not counted.
    tiles: counts of tiles, one dict per branch.
    fit: the largest shapes within a memory limit; None without a limit.
    """

    problem: Problem
    chosen: tuple[Proposal, ...]
    weighed: tuple[Proposal | Refusal, ...]
    reason: str
    untried: tuple[str, ...] = ()
    useful_pairs: int | None = None
    tiles: tuple[dict[str, Any], ...] = ()
    fit: Fit | None = None

    @cached_property
    def memory(self) -> Footprint:
        """Peak bytes of a call; with `training`, of forward and backward."""
        tensors = self.problem.footprint
        # Branches run one after the other.
        workspaces = [proposal.workspaces for proposal in self.chosen]
        forward = max((pair[0] for pair in workspaces), default=0)
        if not self.problem.training:
            return replace(tensors, workspace=forward + ROUNDING)
        backward = max((pair[1] for pair in workspaces), default=0) + tensors.workspace
        # A forward has no gradients beside its workspace.
        workspace = max(backward, forward - tensors.gradients) + ROUNDING
        return replace(tensors, workspace=workspace)

    @cached_property
    def lowering(self) -> str:
        """The lowering, or lowerings joined by +, that will run."""
        return "+".join(dict.fromkeys(proposal.lowering for proposal in self.chosen))

    @property
    def cost(self) -> Cost:
        """The cost of the chosen proposals; their peaks do not add up."""
        costs = [proposal.cost for proposal in self.chosen]
        return Cost(
            pairs=sum(cost.pairs for cost in costs),
            kernel_flops=sum(cost.kernel_flops for cost in costs),
            copied_bytes=sum(cost.copied_bytes for cost in costs),
            calls=sum(cost.calls for cost in costs),
            peak_bytes=max((cost.peak_bytes for cost in costs), default=0),
            dense_flops=sum(cost.dense_flops for cost in costs),
            backward_bytes=max((cost.backward_bytes for cost in costs), default=0),
        )

    def seconds_of(self, proposals: Sequence[Proposal]) -> float | None:
        """Estimated time of proposals, one after the other.

        None if a rate was not measured.
        """
        dtype, device, training = self.problem.dtype, self.problem.device, self.problem.training
        total = 0.0
        for proposal in proposals:
            flops = proposal.cost.dense_flops
            seconds = rates.seconds(proposal.lowering, dtype, device, flops, training)
            if seconds is None:
                return None
            total += seconds
        return total

    def to_json(self) -> dict[str, Any]:
        """Everything that `explain` prints, as plain values."""
        problem, cost = self.problem, self.cost
        return {
            "program": repr(problem.program),
            "q_shape": [problem.batch, problem.heads, problem.q_len, problem.head_dim],
            "kv_shape": [problem.batch, problem.kv_heads, problem.kv_len, problem.value_dim],
            "dtype": problem.dtype,
            "device": problem.device,
            "q_offset": problem.q_offset,
            "lowering": self.lowering,
            "reason": self.reason,
            "useful_pairs": self.useful_pairs,
            "computed_pairs": cost.pairs,
            "kernel_gflop": cost.kernel_flops / 1e9,
            "copied_bytes": cost.copied_bytes,
            "kernel_calls": cost.calls,
            "peak_bytes": cost.peak_bytes,
            "tensor_bytes": problem.tensor_bytes,
            "training": problem.training,
            "memory": self.memory.to_json(),
            "fit": None if self.fit is None else self.fit.to_json(),
            "tiles": list(self.tiles),
            "estimated_seconds": self.seconds_of(self.chosen),
            "rates": f"{rates.MACHINE}: {rates.FILES}",
            "candidates": self._rows(),
            "untried": list(self.untried),
        }

    def explain(self) -> str:
        """The choice, its reason and the candidates, as text."""
        problem = self.problem
        q_shape = f"({problem.batch}, {problem.heads}, {problem.q_len}, {problem.head_dim})"
        lines = [
            f"program   {problem.program}",
            f"problem   q {q_shape}, {problem.kv_heads} key heads of {problem.kv_len} tokens, "
            f"{problem.dtype} on {problem.device}",
            f"chosen    {self.lowering}: {self.reason}",
        ]
        if self.untried:
            names = ", ".join(self.untried)
            lines.append(f"not tried {names} (lowering={self.untried[0]!r} would)")
        lines.append(self._pairs_line())
        for row in self.tiles:
            branch = f"branch {row['branch']}, heads {row['heads']}"
            lines.append(f"tiles     {branch}: {printing.tile_counts(row)}")
        lines += [self._work_line(), self._time_line(), self._memory_line()]
        if self.fit is not None:
            lines += self.fit.lines(problem.batch, problem.q_len)
        return "\n".join(lines) + "\n\n" + printing.table(self._rows())

    def _pairs_line(self) -> str:
        """Allowed and computed pairs, as far as a plan can count them."""
        computed = f"{self.cost.pairs:,} computed"
        if self.useful_pairs is not None and self._reads_data:
            return f"pairs     {self.useful_pairs:,} allowed, at most {computed}"
        if self.useful_pairs is not None:
            share = 1.0
            if self.cost.pairs:
                share = self.useful_pairs / self.cost.pairs
            return f"pairs     {self.useful_pairs:,} allowed, {computed} ({share:.0%} useful)"
        if self._reads_data:
            return (
                f"pairs     at most {computed}; "
                "how many are allowed depends on data that only a call has"
            )
        return (
            f"pairs     {computed}; "
            "the allowed ones are too many different ones to count in seconds"
        )

    def _work_line(self) -> str:
        """FLOPs, kernel calls and copied bytes."""
        cost = self.cost
        most = "at most " if self._reads_data else ""
        return (
            f"work      {most}{cost.kernel_flops / 1e9:,.1f} GFLOP in "
            f"{cost.calls} kernel call{'s' * (cost.calls != 1)}, "
            f"{cost.copied_bytes / 2**20:,.1f} MiB moved beside them"
        )

    def _time_line(self) -> str:
        """The estimated time, and the origin of its rates."""
        seconds, problem = self.seconds_of(self.chosen), self.problem
        if seconds is None:
            device = f"{problem.dtype} on {problem.device}"
            return f"time      no estimate: no rate was measured for {device}"
        # For masks that read data a plan counts the pairs that they may allow.
        about = "at most" if self._reads_data else "about"
        return (
            f"time      {about} {printing.milliseconds(seconds)} ms {self._passes}, "
            f"an estimate by rates of {rates.MACHINE}\n"
            f"          ({rates.FILES})"
        )

    def _memory_line(self) -> str:
        return f"memory    {self._passes} at most {self.memory}"

    @property
    def _passes(self) -> str:
        """The passes of a call in words."""
        if self.problem.training:
            return "forward and backward"
        return "forward"

    @property
    def _reads_data(self) -> bool:
        """Whether masks read data that only a call has."""
        return any(branch.mask.per_call for branch in self.problem.program.branches)

    def _rows(self) -> list[dict[str, Any]]:
        """The weighed proposals and refusals as plain values."""
        return [self._row(candidate) for candidate in self.weighed]

    def _row(self, candidate: Proposal | Refusal) -> dict[str, Any]:
        """A proposal with its costs, or a refusal with its reason."""
        row: dict[str, Any] = {
            "lowering": candidate.lowering,
            "branch": candidate.branch,
            "chosen": any(candidate is proposal for proposal in self.chosen),
        }
        if isinstance(candidate, Refusal):
            return row | {"refused": candidate.reason, "way_out": candidate.way_out}
        cost = candidate.cost
        return row | {
            "kernel_gflop": cost.kernel_flops / 1e9,
            "dense_gflop": cost.dense_flops / 1e9,
            "estimated_seconds": self.seconds_of((candidate,)),
            "calls": cost.calls,
            "peak_bytes": cost.peak_bytes,
        }

    def __str__(self) -> str:
        return self.explain()
