"""Choice of a layout: bytes, work and memory per rank, computed from schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from .. import arguments, planner
from ..masks import Mask
from ..masks.congruent import Congruent
from ..masks.functions import reads_operands
from ..masks.grids import Neighborhood
from ..masks.segments import Segments
from ..orders import Identity, Order, hilbert
from ..plans import Problem
from ..programs import Program
from . import blocks
from .layouts import ByResidue, Contiguous, Layout, Striped, Zigzag
from .moved import positions
from .schedules import Schedule, Step

LAYOUTS = ("auto", "contiguous", "zigzag", "striped", "residue", "hilbert")
# Dense flops in the time of one byte on the wire.
_FLOPS_PER_BYTE = 20.0
# Loads are computed for at most this many ranks, evenly spaced.
_SAMPLED = 16
# Layouts within this factor of the fastest count as equally fast; the one that moves least is
# chosen.
_AS_SOON = 1.03


@dataclass(frozen=True)
class Load:
    """Bytes received, work and peak memory of one rank.

    dense_flops: flops of dense attention that take the same time.
    """

    rank: int
    steps: int
    messages: int
    received_bytes: int
    pairs: int
    dense_flops: float
    peak_bytes: int

    @property
    def time(self) -> float:
        """Time in dense flops; messages arrive while the step before is computed."""
        return max(self.dense_flops, self.received_bytes * _FLOPS_PER_BYTE)


def load(schedule: Schedule, problem: Problem, rank: int) -> Load:
    """Forward load of one rank: exact, except for the peak, which the kernels predict."""
    layout, steps = schedule.layout, list(schedule.steps(rank))
    width = problem.head_dim + problem.value_dim
    received = [_bytes_of(step, problem) for step in steps]
    pairs, flops, working = 0, 0.0, 0
    for step in steps:
        for block in step.blocks:
            cost = blocks.plan_of(
                block,
                problem.batch,
                problem.head_dim,
                problem.value_dim,
                problem.dtype,
                problem.device,
                problem.scores,
            ).cost
            pairs, flops, working = (
                pairs + cost.pairs,
                flops + cost.dense_flops,
                max(working, cost.peak_bytes),
            )
    tokens = layout.count(rank)
    shards = problem.batch * tokens * (problem.heads + problem.kv_heads) * width * problem.itemsize
    # Two steps' messages: one is computed while the next arrives.
    in_flight = max((a + b for a, b in itertools.pairwise([*received, 0])), default=0)
    messages = sum(len(step.messages) for step in steps)
    return Load(
        rank,
        len(steps),
        messages,
        sum(received),
        pairs,
        flops,
        shards + in_flight + working,
    )


def _bytes_of(step: Step, problem: Problem) -> int:
    rows = sum(message.kv_heads.count * len(message.rows) for message in step.messages)
    return problem.batch * rows * (problem.head_dim + problem.value_dim) * problem.itemsize


@dataclass(frozen=True)
class RingPlan:
    """The chosen schedule, and the loads of all candidate layouts.

    weighed: loads per layout, for all ranks or a sample.
    operands: tensors that functions of the program capture, kept alive for the schedule.
    """

    problem: Problem
    schedule: Schedule
    weighed: tuple[tuple[Layout, tuple[Load, ...]], ...]
    reason: str
    operands: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    @property
    def loads(self) -> tuple[Load, ...]:
        """Loads of the chosen layout."""
        return next(loads for layout, loads in self.weighed if layout == self.schedule.layout)

    def positions(self, rank: int) -> torch.Tensor:
        """Positions of a rank's tokens in memory order: `q[:, :, plan.positions(rank)]`."""
        layout = self.schedule.layout
        if not 0 <= arguments.integer("rank", rank) < layout.ranks:
            raise ValueError(f"rank must be at least 0 and less than {layout.ranks}; got {rank}")
        runs = [np.arange(run.start, run.stop, run.step) for run in layout.runs(rank)]
        places = np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(positions(places, layout.order, layout.tokens))

    def to_json(self) -> dict[str, Any]:
        """The content of `explain` as plain values."""
        problem, layout = self.problem, self.schedule.layout
        return {
            "program": repr(problem.program),
            "q_shape": [problem.batch, problem.heads, problem.q_len, problem.head_dim],
            "kv_heads": problem.kv_heads,
            "dtype": problem.dtype,
            "ranks": layout.ranks,
            "layout": layout.name,
            "reason": self.reason,
            "layouts": [
                _row(layout, loads) | {"chosen": layout == self.schedule.layout}
                for layout, loads in self.weighed
            ],
        }

    def explain(self) -> str:
        """Costs per layout, the choice and its reason, as text."""
        problem, layout = self.problem, self.schedule.layout
        sampled = len(self.loads) < layout.ranks
        lines = [
            f"program   {problem.program}",
            f"problem   q ({problem.batch}, {problem.heads}, {problem.q_len}, {problem.head_dim}), {problem.kv_heads} key heads, "
            f"{problem.dtype} on {problem.device}, over {layout.ranks} ranks",
            f"chosen    {layout.name}: {self.reason}",
            f"ranks     {'a sample of ' if sampled else 'all '}{len(self.loads)}; a plain ring takes {layout.ranks} steps",
        ]
        cells = []
        for candidate, loads in self.weighed:
            row = _row(candidate, loads)
            cells.append(
                [
                    "*" if candidate == layout else "",
                    row["layout"],
                    f"{row['steps_mean']:.1f}",
                    row["steps_max"],
                    f"{row['received_mib_mean']:,.2f}",
                    f"{row['received_mib_max']:,.2f}",
                    f"{row['dense_gflop_max']:,.2f}",
                    f"{row['work_max_over_mean']:.2f}",
                    f"{row['peak_mib']:,.1f}",
                ]
            )
        headers = [
            "",
            "layout",
            "steps",
            "most",
            "MiB in",
            "most",
            "as dense GFLOP, most",
            "most / mean",
            "peak MiB",
        ]
        table: str = tabulate(
            cells,
            headers=headers,
            disable_numparse=True,
            colalign=("left", "left", *["right"] * 7),
        )
        return "\n".join(lines) + "\n\n" + table

    def __str__(self) -> str:
        return self.explain()


def _row(layout: Layout, loads: tuple[Load, ...]) -> dict[str, Any]:
    mean_flops = sum(load.dense_flops for load in loads) / len(loads)
    return {
        "layout": layout.name,
        "steps_mean": sum(load.steps for load in loads) / len(loads),
        "steps_max": max(load.steps for load in loads),
        "received_mib_mean": sum(load.received_bytes for load in loads) / len(loads) / 2**20,
        "received_mib_max": max(load.received_bytes for load in loads) / 2**20,
        "dense_gflop_max": max(load.dense_flops for load in loads) / 1e9,
        "work_max_over_mean": max(load.dense_flops for load in loads) / mean_flops
        if mean_flops
        else 1.0,
        "peak_mib": max(load.peak_bytes for load in loads) / 2**20,
    }


def _leaves(mask: Mask) -> Iterator[Mask]:
    for part in mask.parts:
        yield from _leaves(part)
    if not mask.parts:
        yield mask


def layouts_of(program: Program, tokens: int, ranks: int, name: str = "auto") -> list[Layout]:
    """Candidate layouts of a program, or the named one.

    Raises ValueError if the named layout does not apply to the program.
    """
    arguments.choice("layout", name, LAYOUTS)
    leaves = [leaf for branch in program.branches for leaf in _leaves(branch.mask)]
    rates = [leaf.modulus for leaf in leaves if isinstance(leaf, Congruent) and leaf.modulus > 1]
    out: list[Layout] = []
    if name in ("auto", "contiguous"):
        out.append(Contiguous(tokens, ranks))
    if name in ("auto", "zigzag"):
        segments = {leaf.length for leaf in leaves if isinstance(leaf, Segments)}
        out.append(Zigzag(tokens, ranks, _group(max(segments, default=tokens), tokens, ranks)))
    if name in ("auto", "striped"):
        out.append(Striped(tokens, ranks))
    if name == "residue" or (name == "auto" and rates):
        if not rates:
            raise ValueError(
                f"layout 'residue' needs a dilated program; {program} names no residue. Use layout='auto'",
            )
        out.append(ByResidue(tokens, ranks, max(rates)))
    order = _grid_order(program, leaves, tokens)
    if name == "hilbert" or (name == "auto" and order is not None):
        if order is None:
            raise ValueError(
                f"layout 'hilbert' needs a program over a grid of {tokens} cells; {program} names none. Use layout='auto'"
            )
        out.append(Contiguous(tokens, ranks, order))
    return out


def _group(segment: int, tokens: int, ranks: int) -> int:
    """Number of ranks per segment, if segments consist of complete ranks; else all ranks."""
    group, rest = divmod(segment * ranks, tokens)
    if not rest and group and ranks % group == 0:
        return group
    return ranks


def _grid_order(program: Program, leaves: list[Mask], tokens: int) -> Order | None:
    orders = {branch.order for branch in program.branches} - {Identity()}
    if len(orders) == 1:
        return orders.pop()
    grids = {
        leaf.grid
        for leaf in leaves
        if isinstance(leaf, Neighborhood) and math.prod(leaf.grid) == tokens
    }
    if len(grids) == 1 and all(len(grid) in (2, 3) for grid in grids):
        return hilbert(*grids.pop())
    return None


def plan_for(problem: Problem, ranks: int, layout: str = "auto") -> RingPlan:
    """The plan of a ring, from the cache; see `choose`."""
    if any(reads_operands(branch.mask) for branch in problem.program.branches):
        # Not cached: the schedule evaluates masks while it runs, with the tensors of this call.
        return choose(problem, ranks, layout)
    return planner.PLANS.get((problem, ranks, layout), lambda: choose(problem, ranks, layout))


def choose(problem: Problem, ranks: int, layout: str = "auto") -> RingPlan:
    """The layout with the fastest slowest rank, by the loads of the schedules."""
    problem.program.check(problem.q_len, problem.kv_len, problem.q_offset)
    weighed = []
    for candidate in layouts_of(problem.program, problem.q_len, ranks, layout):
        schedule = Schedule(problem.program, candidate, problem.heads, problem.kv_heads)
        weighed.append((candidate, tuple(load(schedule, problem, rank) for rank in _sample(ranks))))
    # Among layouts about as fast as the fastest, the one that moves least.
    soonest = min(_slowest(loads) for _, loads in weighed)
    close = [pair for pair in weighed if _slowest(pair[1]) <= _AS_SOON * soonest]
    best, loads = min(
        close,
        key=lambda pair: sum(candidate.received_bytes for candidate in pair[1]),
    )
    slowest = max(loads, key=lambda candidate: candidate.time)
    bound = (
        "what it receives"
        if slowest.received_bytes * _FLOPS_PER_BYTE > slowest.dense_flops
        else "what it computes"
    )
    reason = (
        "as asked" if layout != "auto" else f"the slowest rank, bound by {bound}, is done soonest"
    )
    if layout == "auto" and len(close) > 1:
        reason += "; of those as soon, it moves least"
    return RingPlan(
        problem,
        Schedule(problem.program, best, problem.heads, problem.kv_heads),
        tuple(weighed),
        reason,
    )


def _slowest(loads: tuple[Load, ...]) -> float:
    return max(load.time for load in loads)


def _sample(ranks: int) -> list[int]:
    """All ranks, or an even sample with the first and the last."""
    if ranks <= _SAMPLED:
        return list(range(ranks))
    return sorted({round(i * (ranks - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)})
