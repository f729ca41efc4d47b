"""What a model takes under plain torch.compile and under passes.compile: peak, time, the longest sequence, a million tokens.

python benchmarks/memory.py [--json FILE] [--only headline|longest|million|order] [--tokens 65536] [--step training|inference]

headline  a training step and an inference of four layers, a vocabulary of 32K, as shares of plain torch.compile
longest   the most tokens that one training step takes in a process of 8 GiB: plain, eager with a checkpoint for each block,
          torch's own activation_memory_budget, ours
million   bfloat16 inference of 2^20 tokens, width 256, four layers, plain and ours
order     of each two candidates of passes.compile whose times differ (in every turn, and by more than a twentieth), whether the
          estimate has the faster one right

The model: an embedding, blocks of LongNet attention and a SwiGLU MLP behind norms, a projection to the vocabulary and its loss.
Every figure comes from a process of its own: freed memory that an allocator keeps would hide what the next one takes. Peaks are
resident bytes, the kernel's high-water mark: beyond what was there before the step, in `longest` and `million` those of the
whole process, with what compiling took.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import compiled_dilated as cd
import passes
from compiled_dilated import measure

HEADS, LAYERS, VOCABULARY = 8, 4, 32768
ATTEND = cd.compile(cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True))
# As shares of plain torch.compile: (peak, time).
WANTED = {"training": (0.25, 1.15), "inference": (0.4, 1.05)}
_LIMIT_BYTES = 8 * 2**30
_PROBES = (8192, 16384)
_REPEATS = 3
# Width and tokens of the models whose candidates are put in order, and by how much two times differ that are not the same.
_ORDERED = ((256, 2048), (512, 4096))
_SAME = 1.05
# Of torch's own budgets the one whose peak is least on four layers: 0.1 of what would be saved.
_BUILT_IN_BUDGET = 0.1

Row = dict[str, Any]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        x = x + self.out(ATTEND(q, k, v).transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """checkpointed: blocks keep their input alone, and are computed again in backward."""

    def __init__(self, width: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = (
            nn.Embedding(VOCABULARY, width),
            nn.Linear(width, VOCABULARY, bias=False),
        )
        self.blocks, self.checkpointed = (
            nn.ModuleList(Block(width) for _ in range(LAYERS)),
            checkpointed,
        )

    def forward(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return (
            x if wanted is None else F.cross_entropy(self.head(x).flatten(0, 1), wanted.flatten())
        )


@dataclass(frozen=True)
class Job:
    """Steps in a process of its own. kind: training or inference; ways: of plain, checkpoints, built-in and passes.

    share: the budget of passes, as a share of plain's estimate beyond its inputs; where nothing fits, the least that does.
    peaks: whether to measure what each step holds. repeats: steps of each in turn, for their time, after the first.
    """

    kind: str
    ways: tuple[str, ...]
    tokens: int
    width: int = 512
    dtype: str = "float32"
    share: float = 0
    peaks: bool = False
    repeats: int = 0

    def apart(self) -> dict[str, Row]:
        """Figures by way. Raises CalledProcessError where the process dies, as it does when memory runs out."""
        print(
            f"{self.kind} of {self.tokens:,} tokens: {' and '.join(self.ways)} ...",
            file=sys.stderr,
            flush=True,
        )
        command = [sys.executable, __file__, "--job", json.dumps(asdict(self))]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Row] = json.loads(run.stdout.splitlines()[-1])
        for way, row in found.items():
            held, seconds = row["process_bytes"] / 2**30, row["first_seconds"]
            print(
                f"    {way}: {held:.2f} GiB in the process, {seconds:.0f} s to compile and step",
                file=sys.stderr,
                flush=True,
            )
        return found

    def here(self) -> dict[str, Row]:
        """The same, of this process."""
        steps = {way: Step(self, way) for way in self.ways}
        rows = {way: step.first() for way, step in steps.items()}
        for way, step in steps.items():
            if self.peaks:
                rows[way] |= step.peak()
        for way, seconds in measure.interleaved(
            {way: step.run for way, step in steps.items()}, self.repeats, warmup=0
        ).items():
            if seconds:
                rows[way]["seconds"] = measure.median(seconds)
        return rows


class Step:
    """One way of a job, ready to run."""

    def __init__(self, job: Job, way: str) -> None:
        torch.manual_seed(0)
        self.way, self.training = way, job.kind == "training"
        self.model = Model(job.width, checkpointed=way == "checkpoints").to(
            getattr(torch, job.dtype)
        )
        tokens = torch.randint(VOCABULARY, (1, job.tokens))
        self.inputs = (tokens, tokens) if self.training else (tokens,)
        self.compiled: Callable[..., Any] = self.model
        if way == "passes":
            plain = passes.estimate(self.model, self.inputs, train=self.training, passes=[()])[0]
            budget = plain.input_bytes + int(plain.added_bytes * job.share)
            self.compiled = passes.compile(self.model, memory_budget=budget, dynamic=False)
        elif way != "checkpoints":
            functorch_config.activation_memory_budget = (
                _BUILT_IN_BUDGET if way == "built-in" else 1.0
            )
            self.compiled = torch.compile(self.model, dynamic=False)

    def under(self, candidate: tuple[Any, ...]) -> Step:
        """The same step with these passes."""
        step = copy.copy(self)
        step.compiled = passes.compile(self.model, passes=candidate, dynamic=False)
        return step

    def run(self) -> None:
        with torch.set_grad_enabled(self.training):
            out = self.compiled(*self.inputs)
            if self.training:
                torch.autograd.grad(out, list(self.model.parameters()))

    def first(self) -> Row:
        """Compiles and runs; the most that the whole process held meanwhile."""
        with measure.resident_peak() as resident:
            try:
                seconds = measure.timed(self.run)
            except passes.BudgetError as error:
                self.compiled = passes.compile(
                    self.model, memory_budget=error.least_bytes, dynamic=False
                )
                seconds = measure.timed(self.run)
            row: Row = {"process_bytes": resident(), "first_seconds": seconds, "passes": ""}
        if self.way == "passes":
            chosen = passes.report(self.compiled).choices[0].chosen
            row |= {
                "predicted_bytes": chosen.added_bytes,
                "passes": ", ".join(map(repr, chosen.passes)),
            }
        return row

    def peak(self) -> Row:
        """What one step holds, and its time."""
        times: list[float] = []
        held = measure.peak_bytes(lambda: times.append(measure.timed(self.run)))
        return {"peak_bytes": held, "seconds": times[0]}


def headline(tokens: int, share: float, kinds: Sequence[str]) -> list[Row]:
    """Peaks each in a process of its own, times in turn in one process."""
    rows = []
    for kind in kinds:
        memory_wanted, time_wanted = WANTED[kind]
        job = Job(
            kind, ("plain", "passes"), tokens, share=share if kind == "training" else memory_wanted
        )
        plain, ours = (replace(job, ways=(way,), peaks=True).apart()[way] for way in job.ways)
        times = replace(job, repeats=_REPEATS).apart()
        rows.append(
            {
                "step": kind,
                "tokens": tokens,
                "plain MiB": plain["peak_bytes"] / 2**20,
                "ours MiB": ours["peak_bytes"] / 2**20,
                "predicted MiB": ours["predicted_bytes"] / 2**20,
                "of plain": ours["peak_bytes"] / plain["peak_bytes"],
                "wanted": memory_wanted,
                "plain s": times["plain"]["seconds"],
                "time of plain": times["passes"]["seconds"] / times["plain"]["seconds"],
                "time wanted": time_wanted,
                "passes": ours["passes"],
            }
        )
    return rows


def _whole(way: str, tokens: int, found: Row) -> Row:
    """A row of what the whole process held, and of its only step."""
    row = {"way": way, "tokens": tokens, "process GiB": found["process_bytes"] / 2**30}
    return row | {"compile and step s": found["first_seconds"], "passes": found["passes"]}


def longest(*_: Any) -> list[Row]:
    """By a line through two short lengths; where that takes more than the limit, by a line through the last two."""
    rows = []
    for way in ("plain", "checkpoints", "built-in", "passes"):
        points, found = list[tuple[int, int]](), Row()
        for tokens in _PROBES:
            points.append((tokens, Job("training", (way,), tokens).apart()[way]["process_bytes"]))
        while points[-1][1] > _LIMIT_BYTES or not found:
            (low, less), (high, more) = points[-2:]
            tokens = (
                high + int((0.99 * _LIMIT_BYTES - more) * (high - low) / (more - less)) // 256 * 256
            )
            found = Job("training", (way,), tokens).apart()[way]
            points.append((tokens, found["process_bytes"]))
        rows.append(_whole(way, tokens, found))
    return rows


def million(*_: Any) -> list[Row]:
    job, ways = (
        Job("inference", (), 2**20, width=256, dtype="bfloat16", share=WANTED["inference"][0]),
        ("plain", "passes"),
    )
    return [_whole(way, job.tokens, replace(job, ways=(way,)).apart()[way]) for way in ways]


def order(*_: Any) -> list[Row]:
    """The candidates in the order of the estimate; of those that are estimated alike, for their passes find nothing, one."""
    rows = []
    for kind, (width, tokens) in itertools.product(WANTED, _ORDERED):
        print(
            f"{kind} of {tokens:,} tokens, width {width}: every candidate ...",
            file=sys.stderr,
            flush=True,
        )
        torch._dynamo.reset()
        step = Step(Job(kind, ("plain",), tokens, width), "plain")
        distinct: dict[tuple[float, int], Any] = {}
        for each in passes.estimate(step.model, step.inputs, train=step.training):
            distinct.setdefault((each.seconds, each.peak_bytes), each)
        estimates = list(distinct.values())
        steps = {repr(each.passes): step.under(each.passes).run for each in estimates}
        turns = [*measure.interleaved(steps, _REPEATS).values()]
        times = [measure.median(seconds) for seconds in turns]
        predicted = [each.seconds for each in estimates]
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(len(times)), 2)
            if _differ(turns[i], turns[j])
        ]
        rows.append(
            {
                "step": kind,
                "width": width,
                "tokens": tokens,
                "candidates": [*steps],
                "predicted s": predicted,
                "measured s": times,
                "pairs": len(pairs),
                "right": sum(
                    (predicted[i] < predicted[j]) == (times[i] < times[j]) for i, j in pairs
                ),
            }
        )
    return rows


def _differ(these: Sequence[float], those: Sequence[float]) -> bool:
    """Whether one is slower than the other beyond the machine's noise."""
    less, more = sorted((these, those), key=measure.median)
    return max(less) < min(more) and measure.median(more) > _SAME * measure.median(less)


TABLES = {"order": order, "headline": headline, "longest": longest, "million": million}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--only", choices=TABLES, action="append", help="tables to measure; headline if not given"
    )
    parser.add_argument("--tokens", type=int, default=65536, help="of headline")
    parser.add_argument(
        "--step", choices=WANTED, action="append", help="of headline; both if not given"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0.25,
        help="of the training in headline, as a share of plain's estimate",
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(Job(**json.loads(arguments.job)).here()))
        return
    tables = {}
    for name in arguments.only or ["headline"]:
        tables[name] = TABLES[name](arguments.tokens, arguments.budget, arguments.step or [*WANTED])
        print(f"\n{name}\n{tabulate(tables[name], headers='keys', floatfmt='.3g')}", flush=True)
    if arguments.json:
        measure.write_json(arguments.json, {"hardware": measure.hardware(), "tables": tables})


if __name__ == "__main__":
    main()
