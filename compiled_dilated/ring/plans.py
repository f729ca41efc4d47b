"""Which layout a program wants: bytes, work and memory of the ranks under each, counted from schedules before anything runs."""

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
# So many dense flops take as long as one byte on the wire; and of so many ranks, evenly chosen, the work is looked at.
_FLOPS_PER_BYTE = 20.0
_SAMPLED = 16
# Within this factor two layouts are as soon done, and the one that moves less is better.
_AS_SOON = 1.03


@dataclass(frozen=True)
class Load:
    """What one rank receives, computes and holds. dense_flops: the flops of dense attention that take as long."""

    rank: int
    steps: int
    messages: int
    received_bytes: int
    pairs: int
    dense_flops: float
    peak_bytes: int

    @property
    def time(self) -> float:
        """In dense flops; what is received is received while the step before is computed."""
        return max(self.dense_flops, self.received_bytes * _FLOPS_PER_BYTE)


def load(schedule: Schedule, problem: Problem, rank: int) -> Load:
    """The forward load of one rank; exact, but for the peak, which is the kernels' own prediction."""
    layout, steps = schedule.layout, list(schedule.steps(rank))
    width = problem.head_dim + problem.value_dim
    received = [_bytes_of(step, problem) for step in steps]
    pairs, flops, working = 0, 0.0, 0
    for step in steps:
        for block in step.blocks:
            cost = blocks.plan_of(
                block, problem.batch, problem.head_dim, problem.value_dim, problem.dtype, problem.device, problem.scores
            ).cost
            pairs, flops, working = pairs + cost.pairs, flops + cost.dense_flops, max(working, cost.peak_bytes)
    tokens = layout.count(rank)
    shards = problem.batch * tokens * (problem.heads + problem.kv_heads) * width * problem.itemsize
    # Two steps' messages: one is computed while the next arrives.
    in_flight = max((a + b for a, b in itertools.pairwise([*received, 0])), default=0)
    messages = sum(len(step.messages) for step in steps)
    return Load(rank, len(steps), messages, sum(received), pairs, flops, shards + in_flight + working)


def _bytes_of(step: Step, problem: Problem) -> int:
    rows = sum(message.kv_heads.count * len(message.rows) for message in step.messages)
    return problem.batch * rows * (problem.head_dim + problem.value_dim) * problem.itemsize


@dataclass(frozen=True)
class RingPlan:
    """The chosen schedule and the loads under every layout that was weighed, of all ranks or of a sample of them."""

    problem: Problem
    schedule: Schedule
    weighed: tuple[tuple[Layout, tuple[Load, ...]], ...]
    reason: str
    # What the functions of its program capture, as long as its schedule may be asked.
    operands: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    @property
    def loads(self) -> tuple[Load, ...]:
        """Those under the chosen layout."""
        return next(loads for layout, loads in self.weighed if layout == self.schedule.layout)

    def positions(self, rank: int) -> torch.Tensor:
        """The positions of the tokens that a rank holds, in the order of its memory: `q[:, :, plan.positions(rank)]`."""
        layout = self.schedule.layout
        if not 0 <= arguments.integer("rank", rank) < layout.ranks:
            raise ValueError(f"rank must be at least 0 and less than {layout.ranks}; got {rank}")
        runs = [np.arange(run.start, run.stop, run.step) for run in layout.runs(rank)]
        places = np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(positions(places, layout.order, layout.tokens))

    def to_json(self) -> dict[str, Any]:
        """Everything that `explain` prints, as plain values."""
        problem, layout = self.problem, self.schedule.layout
        return {
            "program": repr(problem.program),
            "q_shape": [problem.batch, problem.heads, problem.q_len, problem.head_dim],
            "kv_heads": problem.kv_heads,
            "dtype": problem.dtype,
            "ranks": layout.ranks,
            "layout": layout.name,
            "reason": self.reason,
            "layouts": [_row(layout, loads) | {"chosen": layout == self.schedule.layout} for layout, loads in self.weighed],
        }

    def explain(self) -> str:
        """What every layout costs a rank, which was chosen and why, as text for a person."""
        problem, layout = self.problem, self.schedule.layout
        sampled = len(self.loads) < layout.ranks
        lines = [
            f"program   {problem.program!r}",
            f"problem   q ({problem.batch}, {problem.heads}, {problem.q_len}, {problem.head_dim}), {problem.kv_heads} key heads, "
            f"{problem.dtype} on {problem.device}, over {layout.ranks} ranks",
            f"chosen    {layout.name}: {self.reason}",
            f"ranks     {'a sample of ' if sampled else 'all '}{len(self.loads)}; a plain ring takes {layout.ranks} steps",
        ]
        cells = []
        for each, loads in self.weighed:
            row = _row(each, loads)
            cells.append(
                [
                    "*" if each == layout else "",
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
        headers = ["", "layout", "steps", "most", "MiB in", "most", "as dense GFLOP, most", "most / mean", "peak MiB"]
        table: str = tabulate(cells, headers=headers, disable_numparse=True, colalign=("left", "left", *["right"] * 7))
        return "\n".join(lines) + "\n\n" + table

    def __str__(self) -> str:
        return self.explain()


def _row(layout: Layout, loads: tuple[Load, ...]) -> dict[str, Any]:
    mean_flops = sum(each.dense_flops for each in loads) / len(loads)
    return {
        "layout": layout.name,
        "steps_mean": sum(each.steps for each in loads) / len(loads),
        "steps_max": max(each.steps for each in loads),
        "received_mib_mean": sum(each.received_bytes for each in loads) / len(loads) / 2**20,
        "received_mib_max": max(each.received_bytes for each in loads) / 2**20,
        "dense_gflop_max": max(each.dense_flops for each in loads) / 1e9,
        "work_max_over_mean": max(each.dense_flops for each in loads) / mean_flops if mean_flops else 1.0,
        "peak_mib": max(each.peak_bytes for each in loads) / 2**20,
    }


def _leaves(mask: Mask) -> Iterator[Mask]:
    for part in mask.parts:
        yield from _leaves(part)
    if not mask.parts:
        yield mask


def layouts_of(program: Program, tokens: int, ranks: int, name: str = "auto") -> list[Layout]:
    """The layouts that are worth weighing for a program, or the one asked for; ValueError where that makes no sense."""
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
            raise ValueError(f"layout 'residue' needs a dilated program; {program!r} names no residue. Use layout='auto'")
        out.append(ByResidue(tokens, ranks, max(rates)))
    order = _grid_order(program, leaves, tokens)
    if name == "hilbert" or (name == "auto" and order is not None):
        if order is None:
            raise ValueError(
                f"layout 'hilbert' needs a program over a grid of {tokens} cells; {program!r} names none. Use layout='auto'"
            )
        out.append(Contiguous(tokens, ranks, order))
    return out


def _group(segment: int, tokens: int, ranks: int) -> int:
    """Ranks that hold one segment, where segments are made of whole ranks; else all."""
    group, rest = divmod(segment * ranks, tokens)
    return group if not rest and group and ranks % group == 0 else ranks


def _grid_order(program: Program, leaves: list[Mask], tokens: int) -> Order | None:
    orders = {branch.order for branch in program.branches} - {Identity()}
    if len(orders) == 1:
        return orders.pop()
    grids = {leaf.grid for leaf in leaves if isinstance(leaf, Neighborhood) and math.prod(leaf.grid) == tokens}
    return hilbert(*grids.pop()) if len(grids) == 1 and all(len(grid) in (2, 3) for grid in grids) else None


def plan_for(problem: Problem, ranks: int, layout: str = "auto") -> RingPlan:
    """The plan of a ring, made when it first comes; see `choose`."""
    if any(reads_operands(branch.mask) for branch in problem.program.branches):
        # Its schedule asks the masks again while it runs: of the tensors of this call, not of the one that it was made for.
        return choose(problem, ranks, layout)
    return planner.PLANS.get((problem, ranks, layout), lambda: choose(problem, ranks, layout))


def choose(problem: Problem, ranks: int, layout: str = "auto") -> RingPlan:
    """The layout under which the slowest rank is done first, by what the schedules say."""
    problem.program.check(problem.q_len, problem.kv_len, problem.q_offset)
    weighed = []
    for each in layouts_of(problem.program, problem.q_len, ranks, layout):
        schedule = Schedule(problem.program, each, problem.heads, problem.kv_heads)
        weighed.append((each, tuple(load(schedule, problem, rank) for rank in _sample(ranks))))
    soonest = min(_slowest(loads) for _, loads in weighed)
    close = [pair for pair in weighed if _slowest(pair[1]) <= _AS_SOON * soonest]
    best, loads = min(close, key=lambda pair: sum(each.received_bytes for each in pair[1]))
    slowest = max(loads, key=lambda each: each.time)
    bound = "what it receives" if slowest.received_bytes * _FLOPS_PER_BYTE > slowest.dense_flops else "what it computes"
    reason = "as asked" if layout != "auto" else f"the slowest rank, bound by {bound}, is done soonest"
    if layout == "auto" and len(close) > 1:
        reason += "; of those as soon, it moves least"
    return RingPlan(problem, Schedule(problem.program, best, problem.heads, problem.kv_heads), tuple(weighed), reason)


def _slowest(loads: tuple[Load, ...]) -> float:
    return max(each.time for each in loads)


def _sample(ranks: int) -> list[int]:
    """All ranks, or some of them, the first and the last among them."""
    if ranks <= _SAMPLED:
        return list(range(ranks))
    return sorted({round(i * (ranks - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)})
