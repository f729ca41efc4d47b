"""Plans of a ring: candidate layouts, their loads, and the choice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from .. import arguments, planner
from ..masks import Mask
from ..masks.congruent import Congruent
from ..masks.neighborhoods import Neighborhood
from ..masks.segments import Segments
from ..masks.traced import reads_operands
from ..orders import Identity, Order, hilbert
from ..plans import Problem
from ..programs import Program
from .layouts import ByResidue, Contiguous, Layout, Striped, Zigzag
from .loads import Load, load_of, summary
from .moved import positions
from .schedules import Schedule

LAYOUTS = ("auto", "contiguous", "zigzag", "striped", "residue", "hilbert")
# Loads are computed for at most this many ranks, evenly spaced.
_SAMPLED = 16
# Layouts within this factor of the fastest count as equally fast; the one that moves least is
# chosen.
_TIME_TOLERANCE = 1.03


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
        rows = []
        for candidate, loads in self.weighed:
            rows.append(summary(candidate, loads) | {"chosen": candidate == layout})
        return {
            "program": repr(problem.program),
            "q_shape": [problem.batch, problem.heads, problem.q_len, problem.head_dim],
            "kv_heads": problem.kv_heads,
            "dtype": problem.dtype,
            "ranks": layout.ranks,
            "layout": layout.name,
            "reason": self.reason,
            "layouts": rows,
        }

    def explain(self) -> str:
        """Costs per layout, the choice and its reason, as text."""
        problem, layout = self.problem, self.schedule.layout
        q_shape = (problem.batch, problem.heads, problem.q_len, problem.head_dim)
        sample = "a sample of" if len(self.loads) < layout.ranks else "all"
        lines = [
            f"program   {problem.program}",
            f"problem   q {q_shape}, {problem.kv_heads} key heads, "
            f"{problem.dtype} on {problem.device}, over {layout.ranks} ranks",
            f"chosen    {layout.name}: {self.reason}",
            f"ranks     {sample} {len(self.loads)}; a plain ring takes {layout.ranks} steps",
        ]
        return "\n".join(lines) + "\n\n" + self._table()

    def _table(self) -> str:
        """One row per layout; the chosen one has a star."""
        cells = []
        for layout, loads in self.weighed:
            row = summary(layout, loads)
            numbers = [
                f"{row['steps_mean']:.1f}",
                row["steps_max"],
                f"{row['received_mib_mean']:,.2f}",
                f"{row['received_mib_max']:,.2f}",
                f"{row['dense_gflop_max']:,.2f}",
                f"{row['work_max_over_mean']:.2f}",
                f"{row['peak_mib']:,.1f}",
            ]
            star = "*" if layout == self.schedule.layout else ""
            cells.append([star, row["layout"], *numbers])
        headers = ["", "layout", "steps", "most", "MiB in", "most"]
        headers += ["as dense GFLOP, most", "most / mean", "peak MiB"]
        alignment = ("left", "left", *["right"] * 7)
        table: str = tabulate(cells, headers=headers, disable_numparse=True, colalign=alignment)
        return table

    def __str__(self) -> str:
        return self.explain()


def layouts_of(program: Program, tokens: int, ranks: int, name: str = "auto") -> list[Layout]:
    """Candidate layouts of a program, or the named one.

    Raises ValueError if the named layout does not apply to the program.
    """
    arguments.choice("layout", name, LAYOUTS)
    if name != "auto":
        return [_named(name, program, tokens, ranks)]
    out: list[Layout] = []
    for candidate in LAYOUTS[1:]:
        layout = _layout(candidate, program, tokens, ranks)
        if layout is not None:
            out.append(layout)
    return out


def _named(name: str, program: Program, tokens: int, ranks: int) -> Layout:
    """The named layout; ValueError if it does not apply."""
    layout = _layout(name, program, tokens, ranks)
    if layout is not None:
        return layout
    if name == "residue":
        reason = f"needs a dilated program; {program} names no residue"
    else:
        reason = f"needs a program over a grid of {tokens} cells; {program} names none"
    raise ValueError(f"layout {name!r} {reason}. Use layout='auto'")


def _layout(name: str, program: Program, tokens: int, ranks: int) -> Layout | None:
    """The named layout for a program; None if it does not apply."""
    parts: list[Mask] = []
    for branch in program.branches:
        parts += branch.mask.walk()
    if name == "zigzag":
        # A zigzag per longest segment evens the causal work within it.
        lengths = [part.length for part in parts if isinstance(part, Segments)]
        longest = max(lengths, default=tokens)
        return Zigzag(tokens, ranks, _ranks_per_segment(longest, tokens, ranks))
    if name == "striped":
        return Striped(tokens, ranks)
    if name == "residue":
        rates = [part.modulus for part in parts if isinstance(part, Congruent)]
        rate = max(rates, default=1)
        if rate == 1:
            return None
        return ByResidue(tokens, ranks, rate)
    if name == "hilbert":
        order = _grid_order(program, parts, tokens)
        if order is None:
            return None
        return Contiguous(tokens, ranks, order)
    return Contiguous(tokens, ranks)


def _ranks_per_segment(segment: int, tokens: int, ranks: int) -> int:
    """Number of ranks per segment; all ranks if segments cut some."""
    group, uneven = divmod(segment * ranks, tokens)
    if not uneven and group and ranks % group == 0:
        return group
    return ranks


def _grid_order(program: Program, parts: list[Mask], tokens: int) -> Order | None:
    """The program's order, else a Hilbert curve through its grid, else None."""
    orders = {branch.order for branch in program.branches} - {Identity()}
    if len(orders) == 1:
        return orders.pop()
    neighborhoods = [part for part in parts if isinstance(part, Neighborhood)]
    grids = {part.grid for part in neighborhoods if math.prod(part.grid) == tokens}
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
    """Choose the layout whose slowest rank is the fastest.

    Times are those of the loads, counted from the schedules.
    """
    problem.program.check(problem.q_len, problem.kv_len, problem.q_offset)
    weighed = []
    for candidate in layouts_of(problem.program, problem.q_len, ranks, layout):
        schedule = Schedule(problem.program, candidate, problem.heads, problem.kv_heads)
        loads = tuple(load_of(schedule, problem, rank) for rank in _sample(ranks))
        weighed.append((candidate, loads))
    # Among layouts about as fast as the fastest, the one that moves least.
    fastest = min(_slowest(loads).time for _, loads in weighed)
    close = [pair for pair in weighed if _slowest(pair[1]).time <= _TIME_TOLERANCE * fastest]
    best, loads = min(close, key=lambda pair: sum(load.received_bytes for load in pair[1]))
    reason = "as asked"
    if layout == "auto":
        reason = f"the slowest rank, bound by {_slowest(loads).bound}, is done soonest"
        if len(close) > 1:
            reason += "; of those as soon, it moves least"
    schedule = Schedule(problem.program, best, problem.heads, problem.kv_heads)
    return RingPlan(problem, schedule, tuple(weighed), reason)


def _slowest(loads: tuple[Load, ...]) -> Load:
    """The load of the slowest rank."""
    return max(loads, key=lambda load: load.time)


def _sample(ranks: int) -> list[int]:
    """All ranks, or an even sample with the first and the last."""
    if ranks <= _SAMPLED:
        return list(range(ranks))
    return sorted({round(i * (ranks - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)})
