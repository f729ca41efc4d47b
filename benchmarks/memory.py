"""What a whole model takes under plain torch.compile and under passes.compile, in one run: peak, time, gradients.

    python benchmarks/memory.py [--tokens 65536] [--width 512] [--layers 4] [--vocabulary 32768] [--budget 0.25] [--json FILE]

The model: an embedding, blocks of LongNet attention and a SwiGLU MLP behind norms, a projection to the vocabulary and its loss.
Peaks are resident bytes beyond what was there before the step (the kernel's high-water mark), each program in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import compiled_dilated as cd
from compiled_dilated import measure

HEADS, REPEATS = 8, 3
ATTEND = cd.compile(cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True))
# As shares of plain torch.compile: (peak, time).
WANTED = {"training": (0.25, 1.15), "inference": (0.4, 1.05)}


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
    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))

    def forward(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        x = self.blocks(self.embedding(tokens))
        return x if wanted is None else F.cross_entropy(self.head(x).flatten(0, 1), wanted.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 65536), ("width", 512), ("layers", 4), ("vocabulary", 32768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--budget", type=float, default=0.25, help="of a training step, as a share of plain's estimate beyond inputs"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measured(arguments, *arguments.one.split(":"))))
        return
    rows = [_compared(arguments, kind) for kind in WANTED]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if arguments.json:
        sizes = {name: value for name, value in vars(arguments).items() if name not in ("json", "one")}
        measure.write_json(arguments.json, {"hardware": measure.hardware(), **sizes, "rows": rows})
    raise SystemExit(not all(row["ok"] for row in rows))


def _compared(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Plain and planned, each in a process of its own: freed memory that an allocator keeps would hide what the other takes."""
    found = {}
    for program in ("plain", "planned"):
        command = [sys.executable, __file__, "--one", f"{kind}:{program}"]
        for name in ("tokens", "width", "layers", "vocabulary", "budget"):
            command += [f"--{name}", str(getattr(arguments, name))]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[program] = json.loads(run.stdout.splitlines()[-1])
    plain, planned = found["plain"], found["planned"]
    memory, seconds = planned["peak_bytes"] / plain["peak_bytes"], planned["seconds"] / plain["seconds"]
    return {
        "step": kind,
        "plain MiB": plain["peak_bytes"] / 2**20,
        "planned MiB": planned["peak_bytes"] / 2**20,
        "of plain": memory,
        "wanted": WANTED[kind][0],
        "plain s": plain["seconds"],
        "time of plain": seconds,
        "time wanted": WANTED[kind][1],
        "predicted MiB": planned["predicted_bytes"] / 2**20,
        "passes": planned["passes"],
        "ok": memory <= WANTED[kind][0] and seconds <= WANTED[kind][1],
    }


def _measured(arguments: argparse.Namespace, kind: str, program: str) -> dict[str, Any]:
    import passes

    torch.manual_seed(0)
    model = Model(arguments.width, arguments.layers, arguments.vocabulary)
    tokens = torch.randint(arguments.vocabulary, (1, arguments.tokens))
    inputs = (tokens, tokens) if kind == "training" else (tokens,)
    plain = passes.estimate(model, inputs, train=kind == "training", passes=[()])[0]
    budget = plain.input_bytes + int(plain.added_bytes * (arguments.budget if kind == "training" else WANTED[kind][0]))
    planned = program == "planned"
    step = passes.compile(model, memory_budget=budget, dynamic=False) if planned else torch.compile(model, dynamic=False)

    def run() -> None:
        with torch.set_grad_enabled(kind == "training"):
            out = step(*inputs)
            if kind == "training":
                torch.autograd.grad(out, list(model.parameters()))

    try:
        run()
    except passes.BudgetError as error:  # the row says what was wanted, and that it was not reached
        step = passes.compile(model, memory_budget=error.least_bytes, dynamic=False)
        run()
    chosen = passes.report(step).choices[0].chosen if planned else plain
    return {
        "peak_bytes": measure.peak_bytes(run),
        "seconds": measure.median(measure.interleaved({"step": run}, repeats=REPEATS)["step"]),
        "predicted_bytes": chosen.added_bytes,
        "passes": ", ".join(map(repr, chosen.passes)),
    }


if __name__ == "__main__":
    main()
