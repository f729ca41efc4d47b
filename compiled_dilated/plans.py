"""What a plan is made of: the problem, what each lowering proposes or why it refuses, what it costs. Values only, no tensors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from tabulate import tabulate

from . import rates
from .arguments import BYTES
from .footprints import Fit, Footprint
from .mods import Graph, Kind, Mod, kind_of
from .programs import Program

Made = TypeVar("Made")


@dataclass(frozen=True)
class Scores:
    """A score_mod as plans see it: its graph, and dtype and shape of each operand."""

    graph: Graph
    operands: tuple[Kind, ...]

    @staticmethod
    def of(mod: Mod | None) -> Scores | None:
        """Of a call's score_mod."""
        return None if mod is None else Scores(mod.graph, tuple(map(kind_of, mod.operands)))


@dataclass(frozen=True)
class Problem:
    """A program and everything a plan may depend on; lengths in tokens.

    scores: the score_mod, if any.
    partial: a part of a larger softmax, merged into what there is; its backward is given the merged out and lse.
    """

    program: Program
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: str
    device: str
    q_offset: int = 0
    training: bool = False
    scores: Scores | None = None
    partial: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per element of q, k, v and out."""
        return BYTES[self.dtype]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in (
            self.batch,
            self.heads,
            self.kv_heads,
            self.q_len,
            self.kv_len,
            self.head_dim,
            self.value_dim,
        )

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v and out together."""
        queries = self.heads * self.q_len * (self.head_dim + self.value_dim)
        keys = self.kv_heads * self.kv_len * (self.head_dim + self.value_dim)
        return self.batch * (queries + keys) * self.itemsize

    @property
    def footprint(self) -> Footprint:
        """Bytes of the tensors of a call, and of what every backward copies of the lse."""
        rows = self.batch * self.heads * self.q_len
        output = rows * self.value_dim * self.itemsize
        lse = rows * max(4, self.itemsize)
        if not self.training:
            return Footprint(self.tensor_bytes - output, output, lse, 0, 0)
        # A backward copies the lse, and marks rows without keys by a byte each.
        inputs = self.tensor_bytes - output
        return Footprint(inputs, output, lse, self.tensor_bytes, lse + rows)


def problem_of(
    program: Program,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    dtype: object,
    device: str,
    q_offset: int,
    training: bool,
    scores: Scores | None = None,
) -> Problem:
    """The problem that these shapes pose."""
    batch, heads, q_len, head_dim = q_shape
    return Problem(
        program, batch, heads, k_shape[1], q_len, k_shape[2], head_dim, v_shape[3], str(dtype).removeprefix("torch."), device,
        q_offset, training, scores,
    )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a proposal takes, for the whole problem, forward alone but for the last.

    pairs: query-key pairs computed, over batch and heads. kernel_flops: 4 * D per pair (2 D + 2 Dv). copied_bytes: gathered tiles
    and merged results. calls: kernel calls. peak_bytes: most held at once beyond q, k, v and out. dense_flops: the flops that a
    dense kernel would do in the same time, the measure that proposals are compared by. backward_bytes: most that a backward holds
    at once beyond them and the gradients.
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
    """A lowering's way to compute a branch (or, `branch` None, the whole program). What `work` is only the lowering knows.

    counting: the cost, or a function that counts it.
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
        """What it takes; counted when first asked for, where that takes time."""
        return self.counting if isinstance(self.counting, Cost) else self.counting()


@dataclass(frozen=True)
class Refusal:
    """Why a lowering does not compute something, and what to do instead."""

    lowering: str
    branch: int | None
    reason: str
    way_out: str

    def __str__(self) -> str:
        where = "" if self.branch is None else f" for branch {self.branch}"
        return f"lowering {self.lowering!r} refuses{where}: {self.reason}. {self.way_out}"


@dataclass(frozen=True, eq=False)
class Plan:
    """The chosen proposals, in branch order, and everything that was weighed against them.

    untried: lowerings that neither proposed nor refused.
    fit: the largest shapes within a memory limit, where one was given.
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
        """Bytes of a call at its peak; with `training`, of its forward and backward."""
        tensors = self.problem.footprint
        # Branches run one after the other.
        workspaces = [proposal.workspaces for proposal in self.chosen]
        forward = max((pair[0] for pair in workspaces), default=0)
        if not self.problem.training:
            return replace(tensors, workspace=forward)
        backward = max((pair[1] for pair in workspaces), default=0) + tensors.workspace
        # A forward has no gradients beside its workspace.
        return replace(tensors, workspace=max(backward, forward - tensors.gradients))

    @cached_property
    def lowering(self) -> str:
        """The lowering, or lowerings joined by +, that will run."""
        return "+".join(dict.fromkeys(proposal.lowering for proposal in self.chosen))

    @property
    def cost(self) -> Cost:
        """The cost of what was chosen; branches run one after the other, so peaks do not add up."""
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
        """Expected time of some proposals, one after the other, by `rates`; None where no rate was measured."""
        problem = self.problem
        times = [
            rates.seconds(
                each.lowering,
                problem.dtype,
                problem.device,
                each.cost.dense_flops,
                problem.training,
            )
            for each in proposals
        ]
        known = [time for time in times if time is not None]
        return sum(known) if len(known) == len(times) else None

    def to_json(self) -> dict[str, Any]:
        """Everything that `explain` prints, as plain values."""
        problem = self.problem
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
            "computed_pairs": self.cost.pairs,
            "kernel_gflop": self.cost.kernel_flops / 1e9,
            "copied_bytes": self.cost.copied_bytes,
            "kernel_calls": self.cost.calls,
            "peak_bytes": self.cost.peak_bytes,
            "tensor_bytes": problem.tensor_bytes,
            "training": problem.training,
            "memory": self.memory.to_json(),
            "fit": None if self.fit is None else self.fit.to_json(),
            "tiles": list(self.tiles),
            "estimated_seconds": self.seconds_of(self.chosen),
            "rates": f"{rates.MACHINE}: {rates.FILES}",
            "candidates": [self._row(each) for each in self.weighed],
            "untried": list(self.untried),
        }

    def explain(self) -> str:
        """What was tried, what was chosen and why, as text for a person."""
        problem = self.problem
        lines = [
            f"program   {problem.program}",
            f"problem   q ({problem.batch}, {problem.heads}, {problem.q_len}, {problem.head_dim}), "
            f"{problem.kv_heads} key heads of {problem.kv_len} tokens, {problem.dtype} on {problem.device}",
            f"chosen    {self.lowering}: {self.reason}",
        ]
        if self.untried:
            lines.append(
                f"not tried {', '.join(self.untried)} (lowering={self.untried[0]!r} would)"
            )
        lines += [
            self._pairs_line(),
            *self._tile_lines(),
            self._work_line(),
            self._time_line(),
            self._memory_line(),
        ]
        if self.fit is not None:
            lines += self.fit.lines(problem.batch, problem.q_len)
        return "\n".join(lines) + "\n\n" + self._table()

    def _pairs_line(self) -> str:
        cost = self.cost
        if self.useful_pairs is not None:
            share = self.useful_pairs / cost.pairs if cost.pairs else 1.0
            return f"pairs     {self.useful_pairs:,} allowed, {cost.pairs:,} computed ({share:.0%} useful)"
        if self._reads_data:
            return f"pairs     at most {cost.pairs:,} computed; how many are allowed depends on data that only a call has"
        return f"pairs     {cost.pairs:,} computed; the allowed ones are too many different ones to count in seconds"

    def _tile_lines(self) -> list[str]:
        return [
            f"tiles     branch {row['branch']}, heads {row['heads']}: {_counts(row)}"
            for row in self.tiles
        ]

    def _work_line(self) -> str:
        cost = self.cost
        most = "at most " if self._reads_data else ""
        return (
            f"work      {most}{cost.kernel_flops / 1e9:,.1f} GFLOP in {cost.calls} kernel call{'s' * (cost.calls != 1)}, "
            f"{cost.copied_bytes / 2**20:,.1f} MiB moved beside them"
        )

    def _time_line(self) -> str:
        time, problem = self.seconds_of(self.chosen), self.problem
        if time is None:
            return f"time      no estimate: no rate was measured for {problem.dtype} on {problem.device}"
        about, what = self._about, "forward and backward" if problem.training else "forward"
        return (
            f"time      {about} {_milliseconds(time)} ms {what}, an estimate by rates of {rates.MACHINE}\n"
            f"          ({rates.FILES})"
        )

    @property
    def _reads_data(self) -> bool:
        return any(branch.mask.per_call for branch in self.problem.program.branches)

    @property
    def _about(self) -> str:
        """Of masks that read data a plan counts what they may allow."""
        return "at most" if self._reads_data else "about"

    def _memory_line(self) -> str:
        what = "forward and backward" if self.problem.training else "forward"
        return f"memory    {what} at most {self.memory}"

    def _table(self) -> str:
        """What was tried, a row for each proposal and refusal, and what the columns mean."""
        rows = [self._row(each) for each in self.weighed]
        cells = [
            [
                "*" if row["chosen"] else "",
                row["lowering"],
                "all" if row["branch"] is None else row["branch"],
                f"{row['kernel_gflop']:,.1f}" if "kernel_gflop" in row else "",
                f"{row['dense_gflop']:,.1f}" if "dense_gflop" in row else "",
                _milliseconds(row["estimated_seconds"])
                if row.get("estimated_seconds") is not None
                else "",
                row.get("calls", ""),
                f"{row['peak_bytes'] / 2**20:,.1f}" if "peak_bytes" in row else "",
                row.get("refused", ""),
            ]
            for row in rows
        ]
        headers = [
            "",
            "lowering",
            "branch",
            "GFLOP",
            "as dense GFLOP",
            "est. ms",
            "calls",
            "peak MiB",
            "refused because",
        ]
        alignment = ("left", "left", *["right"] * 6, "left")
        table: str = tabulate(cells, headers=headers, disable_numparse=True, colalign=alignment)
        proposed = sum(isinstance(each, Proposal) for each in self.weighed)
        legend = "as dense GFLOP: what dense attention would compute in the same time"
        return (
            f"{table}\n{legend}{'; the least sum is chosen' if proposed > len(self.chosen) else ''}"
        )

    def _row(self, each: Proposal | Refusal) -> dict[str, Any]:
        row: dict[str, Any] = {
            "lowering": each.lowering,
            "branch": each.branch,
            "chosen": any(each is one for one in self.chosen),
        }
        if isinstance(each, Refusal):
            return row | {"refused": each.reason, "way_out": each.way_out}
        cost = each.cost
        return row | {
            "kernel_gflop": cost.kernel_flops / 1e9,
            "dense_gflop": cost.dense_flops / 1e9,
            "estimated_seconds": self.seconds_of((each,)),
            "calls": cost.calls,
            "peak_bytes": cost.peak_bytes,
        }

    def __str__(self) -> str:
        return self.explain()


class PlanCache:
    """Plans of all kinds by value, the one used longest ago given up first. Safe to lose at any moment."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._plans: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made for this key, or `make()`."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                kept: Made = self._plans[key]
                return kept
        plan = make()
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > self.most:
                self._plans.popitem(last=False)
        return plan

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        """Forget all plans."""
        with self._lock:
            self._plans.clear()


def _counts(row: dict[str, Any]) -> str:
    """The tiles of a branch in words."""
    size = f"{row['tile']} x {row['tile']} tokens"
    if row["full"] is None:
        return f"of {size}, too many different ones to count"
    return f"{row['full']:,} full and {row['partial']:,} partial of {size}; a list of them takes {row['bytes'] / 2**20:,.3f} MiB"


def _milliseconds(seconds: float) -> str:
    """Three digits: it is an estimate."""
    return f"{float(f'{seconds * 1e3:.3g}'):,.10g}"
