"""What a whole model takes under plain torch.compile and under passes.compile: peak, time, the longest sequence, a million tokens.

python benchmarks/memory.py [--json FILE] [--only headline|longest|million] [--tokens 65536] [--budget 0.25]

headline  a training step and an inference of four layers, a vocabulary of 32K, as shares of plain torch.compile
longest   the most tokens that one training step takes in a process of 8 GiB: plain, eager with a checkpoint for each block,
          torch's own activation_memory_budget, ours
million   bfloat16 inference of 2^20 tokens, width 256, four layers, plain and ours

The model: an embedding, blocks of LongNet attention and a SwiGLU MLP behind norms, a projection to the vocabulary and its loss.
Every figure comes from a process of its own: freed memory that an allocator keeps would hide what the next one takes. Peaks are
resident bytes, the kernel's high-water mark: beyond what was there before the step, in `longest` those of the whole process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
_PROBES = (4096, 8192)
_REPEATS = 4
# Of torch's own budgets the one whose peak is least on four layers: 0.1 of what would be saved.
_BUILT_IN_BUDGET = 0.1

Row = dict[str, Any]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(self.before(x)).chunk(3, dim=-1))
        x = x + self.out(ATTEND(q, k, v).transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """checkpointed: blocks keep their input alone, and are computed again in backward."""

    def __init__(self, width: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.blocks, self.checkpointed = nn.ModuleList(Block(width) for _ in range(LAYERS)), checkpointed

    def forward(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x if wanted is None else F.cross_entropy(self.head(x).flatten(0, 1), wanted.flatten())


@dataclass(frozen=True)
class Job:
    """Steps in a process of its own. kind: training or inference; way: plain, checkpoints, built-in or passes.

    share: the budget of passes, as a share of plain's estimate beyond its inputs; where nothing fits, the least that does.
    repeats: steps after the first, of which one is measured for its peak and the others for their time.
    """

    kind: str
    way: str
    tokens: int
    width: int = 512
    dtype: str = "float32"
    share: float = 0
    repeats: int = 0

    def apart(self) -> Row:
        """Its figures. Raises CalledProcessError where the process dies, as it does when memory runs out."""
        command = [sys.executable, __file__, "--job", json.dumps(asdict(self))]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found: Row = json.loads(run.stdout.splitlines()[-1])
        return found

    def here(self) -> Row:
        """Its figures, of this process."""
        torch.manual_seed(0)
        training = self.kind == "training"
        model = Model(self.width, checkpointed=self.way == "checkpoints").to(getattr(torch, self.dtype))
        tokens = torch.randint(VOCABULARY, (1, self.tokens))
        inputs = (tokens, tokens) if training else (tokens,)

        def run() -> None:
            with torch.set_grad_enabled(training):
                out = step(*inputs)
                if training:
                    torch.autograd.grad(out, list(model.parameters()))

        step, row = self._step(model, inputs), Row()
        with measure.resident_peak() as resident:
            try:
                first = measure.timed(run)
            except passes.BudgetError as error:
                step = passes.compile(model, memory_budget=error.least_bytes, dynamic=False)
                first = measure.timed(run)
            row |= {"process_bytes": resident(), "first_seconds": first}
        if self.repeats:
            row["peak_bytes"] = measure.peak_bytes(run)
            row["seconds"] = measure.median([measure.timed(run) for _ in range(self.repeats - 1)])
        if self.way == "passes":
            chosen = passes.report(step).choices[0].chosen
            row |= {"predicted_bytes": chosen.added_bytes, "passes": ", ".join(map(repr, chosen.passes))}
        return row

    def _step(self, model: Model, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        if self.way == "passes":
            plain = passes.estimate(model, inputs, train=self.kind == "training", passes=[()])[0]
            budget = plain.input_bytes + int(plain.added_bytes * self.share)
            return passes.compile(model, memory_budget=budget, dynamic=False)
        if self.way == "built-in":
            functorch_config.activation_memory_budget = _BUILT_IN_BUDGET
        return model if self.way == "checkpoints" else torch.compile(model, dynamic=False)


def headline(tokens: int, share: float) -> list[Row]:
    rows = []
    for kind, (memory_wanted, time_wanted) in WANTED.items():
        plain = Job(kind, "plain", tokens, repeats=_REPEATS).apart()
        ours = Job(kind, "passes", tokens, share=share if kind == "training" else memory_wanted, repeats=_REPEATS).apart()
        memory, seconds = ours["peak_bytes"] / plain["peak_bytes"], ours["seconds"] / plain["seconds"]
        rows.append(
            {
                "step": kind,
                "tokens": tokens,
                "plain MiB": plain["peak_bytes"] / 2**20,
                "ours MiB": ours["peak_bytes"] / 2**20,
                "predicted MiB": ours["predicted_bytes"] / 2**20,
                "of plain": memory,
                "wanted": memory_wanted,
                "plain s": plain["seconds"],
                "time of plain": seconds,
                "time wanted": time_wanted,
                "passes": ours["passes"],
            }
        )
    return rows


def longest(*_: Any) -> list[Row]:
    """By a line through two short lengths, then shorter until it fits."""
    rows = []
    for way in ("plain", "checkpoints", "built-in", "passes"):
        (low, less), (high, more) = ((n, Job("training", way, n).apart()["process_bytes"]) for n in _PROBES)
        tokens, found = low + int((_LIMIT_BYTES - less) / ((more - less) / (high - low))), Row()
        while not found or found["process_bytes"] > _LIMIT_BYTES:
            tokens = (tokens - tokens // 64) // 256 * 256
            found = Job("training", way, tokens).apart()
        row = {"way": way, "tokens": tokens, "process GiB": found["process_bytes"] / 2**30, "passes": found.get("passes", "")}
        rows.append(row | {"compile and step s": found["first_seconds"]})
    return rows


def million(*_: Any) -> list[Row]:
    rows = []
    for way in ("plain", "passes"):
        found = Job("inference", way, 2**20, width=256, dtype="bfloat16", repeats=2).apart()
        row = {"way": way, "tokens": 2**20, "MiB": found["peak_bytes"] / 2**20, "s": found["seconds"]}
        rows.append(row | {"tokens/s": 2**20 / found["seconds"], "passes": found.get("passes", "")})
    return rows


TABLES = {"headline": headline, "longest": longest, "million": million}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--only", choices=TABLES, action="append", help="tables to measure; headline if not given")
    parser.add_argument("--tokens", type=int, default=65536, help="of headline")
    parser.add_argument("--budget", type=float, default=0.25, help="of the training in headline, as a share of plain's estimate")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(Job(**json.loads(arguments.job)).here()))
        return
    tables = {}
    for name in arguments.only or ["headline"]:
        tables[name] = TABLES[name](arguments.tokens, arguments.budget)
        print(f"\n{name}\n{tabulate(tables[name], headers='keys', floatfmt='.3g')}", flush=True)
    if arguments.json:
        measure.write_json(arguments.json, {"hardware": measure.hardware(), "tables": tables})


if __name__ == "__main__":
    main()
