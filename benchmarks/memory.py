"""Measure a model under plain torch.compile and under passes.compile: memory and time.

python benchmarks/memory.py [--json FILE] [--only headline|first|longest|million|order]
                            [--tokens 65536] [--step training|inference]

headline  a training step and an inference of four layers, a vocabulary of 32K, as shares of plain
          torch.compile
first     the first step, compilation included, with empty caches of inductor and a budget that
          plain fits, as a share of plain torch.compile's
longest   the most tokens of one training step in a process of 8 GiB: plain, eager with a checkpoint
          for each block, torch's own activation_memory_budget, ours
million   bfloat16 inference of 2^20 tokens, width 256, four layers, plain and ours
order     pairs of candidates of passes.compile whose times differ (in every turn, and by more than
          5%): whether the estimate has the same order

The model: an embedding, blocks of LongNet attention and a SwiGLU MLP behind norms, a projection to
the vocabulary and its loss. Every figure is from a process of its own, as freed memory in an
allocator's cache would hide the needs of the next step. Peaks are resident bytes, the kernel's
high-water mark: beyond those before the step; in `longest` and `million` those of the whole
process, with its compilation.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.runs import origin
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
# Bars of peak and time, as shares of plain torch.compile.
BARS = {"training": (0.25, 1.15), "inference": (0.4, 1.05)}
# The bar of a first step under a budget that plain fits, as a share of plain torch.compile's.
_FIRST_BAR = 1.3
_LIMIT_BYTES = 8 * 2**30
_PROBES = (8192, 16384)
_REPEATS = 3
# Width and tokens of the models of `order`, and the ratio from which two times differ.
_ORDERED = ((256, 2048), (512, 4096))
_SAME = 1.05
# The value of torch's activation_memory_budget with the least peak on four layers.
_BUILT_IN_BUDGET = 0.1

Row = dict[str, Any]


class Block(nn.Module):
    """Attention and a SwiGLU MLP, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.gate, self.up = linear(width, 4 * width), linear(width, 4 * width)
        self.down = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in qkv)
        x = x + self.out(ATTEND(q, k, v).transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """A language model over a vocabulary of 32K.

    checkpointed: whether activations of blocks are computed again in backward.
    """

    def __init__(self, width: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        if targets is None:
            return x
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Job:
    """Steps in a process of its own.

    kind: training or inference.
    ways: plain, checkpoints, built-in, passes, or some of them.
    share: the budget of passes, as a share of plain's estimate beyond its inputs; if nothing fits,
        the least possible budget is taken.
    peaks: whether the peak of each step is measured.
    repeats: steps of each way in turn, for their time.
    """

    kind: str
    ways: tuple[str, ...]
    tokens: int
    width: int = 512
    dtype: str = "float32"
    share: float = 0
    peaks: bool = False
    repeats: int = 0

    def apart(self, cache: str | None = None) -> dict[str, Row]:
        """Run in a process of its own; figures by way.

        cache: inductor's directory; the user's if not given.

        Raises CalledProcessError if the process dies, as it does when memory is exhausted.
        """
        log(f"{self.kind} of {self.tokens:,} tokens: {' and '.join(self.ways)} ...")
        command = [sys.executable, __file__, "--job", json.dumps(asdict(self))]
        environment = dict(os.environ)
        if cache is not None:
            environment["TORCHINDUCTOR_CACHE_DIR"] = cache
        run = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        rows: dict[str, Row] = json.loads(run.stdout.splitlines()[-1])
        for way, row in rows.items():
            peak = f"{row['process_bytes'] / 2**30:.2f} GiB in the process"
            log(f"    {way}: {peak}, {row['first_seconds']:.0f} s to compile and step")
        return rows

    def here(self) -> dict[str, Row]:
        """Run in this process; figures by way."""
        steps = {way: Step(self, way) for way in self.ways}
        rows, runs = {}, {}
        for way, step in steps.items():
            rows[way] = step.first()
            runs[way] = step.run
        if self.peaks:
            for way, step in steps.items():
                rows[way] |= step.peak()
        for way, seconds in measure.interleaved(runs, self.repeats, warmup=0).items():
            if seconds:
                rows[way]["seconds"] = measure.median(seconds)
        return rows


def log(line: str) -> None:
    """Print progress on stderr; stdout is read by other processes."""
    print(line, file=sys.stderr, flush=True)


class Step:
    """A step of a model, compiled one way."""

    def __init__(self, job: Job, way: str) -> None:
        torch.manual_seed(0)
        self.way, self.training = way, job.kind == "training"
        model = Model(job.width, checkpointed=way == "checkpoints")
        self.model = model.to(getattr(torch, job.dtype))
        tokens = torch.randint(VOCABULARY, (1, job.tokens))
        self.inputs = (tokens, tokens) if self.training else (tokens,)
        self.compiled: Callable[..., Any] = self.model
        if way == "passes":
            budget = 2**40
            if math.isfinite(job.share):
                (plain,) = passes.estimate(
                    self.model, self.inputs, train=self.training, passes=[()]
                )
                budget = plain.input_bytes + int(plain.added_bytes * job.share)
            self.compiled = passes.compile(self.model, memory_budget=budget, dynamic=False)
        elif way != "checkpoints":
            budgets = {"built-in": _BUILT_IN_BUDGET}
            functorch_config.activation_memory_budget = budgets.get(way, 1.0)
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
        """Compile and run; the peak of the process."""
        with measure.resident_peak() as resident:
            try:
                seconds = measure.timed(self.run)
            except passes.BudgetError as error:
                # The budget fits no candidate: the least possible one is taken.
                self.compiled = passes.compile(
                    self.model, memory_budget=error.least_bytes, dynamic=False
                )
                seconds = measure.timed(self.run)
            row: Row = {"process_bytes": resident(), "first_seconds": seconds, "passes": ""}
        if self.way == "passes":
            chosen = passes.report(self.compiled).choices[0].chosen
            names = ", ".join(map(repr, chosen.passes))
            row |= {"predicted_bytes": chosen.added_bytes, "passes": names}
        return row

    def peak(self) -> Row:
        """Peak and time of one step."""
        times: list[float] = []
        peak = measure.peak_bytes(lambda: times.append(measure.timed(self.run)))
        return {"peak_bytes": peak, "seconds": times[0]}


def headline(tokens: int, share: float, kinds: Sequence[str]) -> list[Row]:
    """Measure peaks in processes of their own, times in turn in one."""
    rows = []
    for kind in kinds:
        memory_bar, time_bar = BARS[kind]
        # The budget of inference is its bar.
        budget = share if kind == "training" else memory_bar
        job = Job(kind, ("plain", "passes"), tokens, share=budget)
        peaks = {way: replace(job, ways=(way,), peaks=True).apart()[way] for way in job.ways}
        plain, reduced = peaks["plain"], peaks["passes"]
        times = replace(job, repeats=_REPEATS).apart()
        row = {
            "step": kind,
            "tokens": tokens,
            "plain MiB": plain["peak_bytes"] / 2**20,
            "ours MiB": reduced["peak_bytes"] / 2**20,
            "predicted MiB": reduced["predicted_bytes"] / 2**20,
            "of plain": reduced["peak_bytes"] / plain["peak_bytes"],
            "bar": memory_bar,
            "plain s": times["plain"]["seconds"],
            "time of plain": times["passes"]["seconds"] / times["plain"]["seconds"],
            "time bar": time_bar,
            "passes": reduced["passes"],
        }
        rows.append(row)
    return rows


def first(tokens: int, share: float, kinds: Sequence[str]) -> list[Row]:
    """Measure first steps under a budget that plain fits, in processes with empty caches."""
    rows = []
    for kind in kinds:
        seconds: dict[str, list[float]] = {"plain": [], "passes": []}
        for _ in range(_REPEATS):
            for way, times in seconds.items():
                job = Job(kind, (way,), 2048, share=math.inf)
                with tempfile.TemporaryDirectory() as cache:
                    times.append(job.apart(cache)[way]["first_seconds"])
        plain, under_budget = (measure.median(times) for times in seconds.values())
        row = {"step": kind, "tokens": 2048, "plain s": plain, "under a budget s": under_budget}
        rows.append(row | {"of plain": under_budget / plain, "bar": _FIRST_BAR, "seconds": seconds})
    return rows


def _row(way: str, tokens: int, figures: Row) -> Row:
    """The row of a process with one step."""
    row = {"way": way, "tokens": tokens, "process GiB": figures["process_bytes"] / 2**30}
    return row | {"compile and step s": figures["first_seconds"], "passes": figures["passes"]}


def longest(*_: Any) -> list[Row]:
    """The most tokens within the limit, by the secant method."""
    rows = []
    for way in ("plain", "checkpoints", "built-in", "passes"):
        points: list[tuple[int, int]] = []
        for tokens in _PROBES:
            peak = Job("training", (way,), tokens).apart()[way]["process_bytes"]
            points.append((tokens, peak))
        figures = Row()
        while points[-1][1] > _LIMIT_BYTES or not figures:
            # The length on the line through the last two points, a multiple of 256 tokens.
            (low, less), (high, more) = points[-2:]
            step = (0.99 * _LIMIT_BYTES - more) * (high - low) / (more - less)
            tokens = high + int(step) // 256 * 256
            figures = Job("training", (way,), tokens).apart()[way]
            points.append((tokens, figures["process_bytes"]))
        rows.append(_row(way, tokens, figures))
    return rows


def million(*_: Any) -> list[Row]:
    """Inference of 2^20 tokens."""
    budget = BARS["inference"][0]
    job = Job("inference", (), 2**20, width=256, dtype="bfloat16", share=budget)
    rows = []
    for way in ("plain", "passes"):
        rows.append(_row(way, job.tokens, replace(job, ways=(way,)).apart()[way]))
    return rows


def order(*_: Any) -> list[Row]:
    """Compare the order of estimated times with that of measured ones."""
    rows = []
    for kind, (width, tokens) in itertools.product(BARS, _ORDERED):
        log(f"{kind} of {tokens:,} tokens, width {width}: every candidate ...")
        torch._dynamo.reset()
        step = Step(Job(kind, ("plain",), tokens, width), "plain")
        # Candidates with equal estimates have passes that change nothing: one of them is measured.
        distinct: dict[tuple[float, int], Any] = {}
        for estimate in passes.estimate(step.model, step.inputs, train=step.training):
            distinct.setdefault((estimate.seconds, estimate.peak_bytes), estimate)
        steps = {}
        for estimate in distinct.values():
            steps[repr(estimate.passes)] = step.under(estimate.passes).run
        turns = [*measure.interleaved(steps, _REPEATS).values()]
        times = [measure.median(seconds) for seconds in turns]
        predicted = [estimate.seconds for estimate in distinct.values()]
        # Pairs whose measured order is certain, and those of them with the same predicted order.
        pairs = right = 0
        for i, j in itertools.combinations(range(len(times)), 2):
            if _differ(turns[i], turns[j]):
                pairs += 1
                right += (predicted[i] < predicted[j]) == (times[i] < times[j])
        row = {"step": kind, "width": width, "tokens": tokens, "candidates": [*steps]}
        row |= {"predicted s": predicted, "measured s": times, "pairs": pairs, "right": right}
        rows.append(row)
    return rows


def _differ(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether times differ in every turn, and medians by over `_SAME`."""
    less, more = sorted((a, b), key=measure.median)
    return max(less) < min(more) and measure.median(more) > _SAME * measure.median(less)


TABLES = {
    "headline": headline,
    "first": first,
    "longest": longest,
    "million": million,
    "order": order,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--json", type=Path, help="where to write the figures")
    text = "tables to measure; headline if not given"
    option("--only", choices=TABLES, action="append", help=text)
    option("--tokens", type=int, default=65536, help="of headline")
    option("--step", choices=BARS, action="append", help="of headline and first; both if not given")
    text = "of the training in headline, as a share of plain's estimate"
    option("--budget", type=float, default=0.25, help=text)
    option("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(Job(**json.loads(arguments.job)).here()))
        return
    tables = {}
    for name in arguments.only or ["headline"]:
        tables[name] = TABLES[name](arguments.tokens, arguments.budget, arguments.step or [*BARS])
        print(f"\n{name}\n{tabulate(tables[name], headers='keys', floatfmt='.3g')}", flush=True)
    if arguments.json:
        measure.write_json(arguments.json, origin() | {"tables": tables})


if __name__ == "__main__":
    main()
