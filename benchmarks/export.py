"""Packages of cd.export against the same by cd.compile: time, memory, numbers at 20 lengths, size, time to export and to load.

python benchmarks/export.py [--json FILE] [--quick] [--check]

program  LongNet attention of 8 heads of 64
window   a causal window of 1024 tokens and four sinks; decode: one query of it against a cache
model    two layers of LongNet attention and an MLP, 512 wide, against torch.compile of the same

Time and memory are shares of cd.compile, called in turns with the package in one process. "first result" is measured in fresh
processes that have imported torch: from there to the first result, by a package, by a package without this library, and by
cd.compile, whose kernel is in its cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.reports import commit
from tabulate import tabulate
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks, measure

HEADS, HEAD_DIM, WIDTH = 8, 64, 512
# The most time and memory of a package, as shares of cd.compile; and the largest difference of their results.
MOST, MOST_DIFFERENCE = 1.1, 1e-5
LONGNET = cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True)
WINDOW = masks.causal() & (masks.window(1024) | masks.sinks(4))
CHILD = """
import json, sys, time
import torch
torch.set_num_threads({threads})
path, way = sys.argv[1:]
inputs = [torch.randn(1, {heads}, 1024, {head_dim}) for _ in range(3)]
inputs[0] @ inputs[1].mT
started = time.perf_counter()
if way == "package, alone":
    torch.ops.load_library(path + ".so")
    run = torch._inductor.aoti_load_package(path)
else:
    import compiled_dilated as cd
    run = cd.load(path) if way == "package" else cd.compile(cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True))
run(*inputs)
print(json.dumps(time.perf_counter() - started))
"""


class Layer(nn.Module):
    """Attention and an MLP behind norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(LONGNET)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for y in self.project(self.norms[0](x)).chunk(3, -1)
        )
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


@dataclass(frozen=True)
class Case:
    """Something to export.

    package: its name, the same where two cases are entries of one.
    model, inputs: what is exported, and its inputs of some tokens.
    compiled: the same by cd.compile.
    decode: whether the entry "decode" is measured; its package is an earlier case's.
    """

    name: str
    package: str
    model: Any
    inputs: Callable[[int], tuple[Tensor, ...]]
    compiled: Callable[..., Tensor]
    decode: bool = False


def qkv(tokens: int, queries: int | None = None) -> tuple[Tensor, ...]:
    """q, k and v."""
    return tuple(
        torch.randn(1, HEADS, size, HEAD_DIM)
        for size in (tokens if queries is None else queries, tokens, tokens)
    )


def cases() -> list[Case]:
    """All of them."""
    model, window = nn.Sequential(Layer(), Layer()).eval(), cd.compile(WINDOW)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = window(q, k, v, q_offset=k.shape[2] - q.shape[2])
        return out

    traced = torch.compile(model, fullgraph=True, dynamic=True)
    return [
        Case("program", "program", LONGNET, qkv, cd.compile(LONGNET)),
        Case("window", "window", WINDOW, qkv, window),
        Case("window, decode", "window", WINDOW, lambda tokens: qkv(tokens, 1), step, decode=True),
        Case("model", "model", model, lambda tokens: (torch.randn(1, tokens, WIDTH),), traced),
    ]


def measure_case(
    case: Case, path: Path, lengths: Sequence[int], most: int, turns: int
) -> dict[str, Any]:
    """A row: the package against cd.compile at the greatest length, their results at all."""
    run = cd.load(path)
    package = run.decode if case.decode else run
    difference = 0.0
    for tokens in lengths:
        inputs = case.inputs(tokens)
        expected = case.compiled(*inputs)
        difference = max(
            difference, float((package(*inputs) - expected).abs().max() / expected.abs().max())
        )
    inputs = case.inputs(most)
    functions: dict[str, Callable[[], object]] = {
        "package": lambda: package(*inputs),
        "compiled": lambda: case.compiled(*inputs),
    }
    times = measure.interleaved(functions, repeats=turns, warmup=2, seconds=60.0)
    peaks = {name: measure.peak_bytes(function) for name, function in functions.items()}
    shares = [
        ours / theirs for ours, theirs in zip(times["package"], times["compiled"], strict=True)
    ]
    share, memory = measure.median(shares), peaks["package"] / max(peaks["compiled"], 1)
    # Of a single query's memory both have next to nothing.
    fits = share <= MOST and (case.decode or memory <= MOST) and difference <= MOST_DIFFERENCE
    return {
        "case": case.name,
        "tokens": most,
        "package ms": measure.median(times["package"]) * 1e3,
        "compiled ms": measure.median(times["compiled"]) * 1e3,
        "time": share,
        "memory": None if case.decode else memory,
        "lengths": len(lengths),
        "difference": difference,
        "MB": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6,
        "met": fits,
        "seconds": times,
        "peak_bytes": peaks,
    }


def export_case(case: Case, path: Path) -> float:
    """Export what a case is about, in seconds; nothing where another case has done so."""
    if path.exists():
        return 0.0
    path.parent.mkdir()
    started = time.perf_counter()
    cd.export(
        case.model,
        case.inputs(64),
        path,
        lengths=(2, 2**20),
        decode=not isinstance(case.model, nn.Module),
    )
    return time.perf_counter() - started


def first_results(path: Path, threads: int, turns: int) -> list[dict[str, Any]]:
    """Rows: seconds from torch to the first result, each turn in a fresh process."""
    code = CHILD.format(threads=threads, heads=HEADS, head_dim=HEAD_DIM)
    rows = []
    for way in ("package", "package, alone", "compiled"):
        seconds = []
        for turn in range(turns):
            done = subprocess.run(
                [sys.executable, "-c", code, str(path), way],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            seconds.append(json.loads(done.stdout))
            print(f"[{turn + 1}/{turns}] first result, {way}: {seconds[-1]:.2f} s", flush=True)
        rows.append({"first result": way, "s": measure.median(seconds), "seconds": seconds})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table without the single measurements."""
    return tabulate(
        [{key: row[key] for key in row if key not in ("seconds", "peak_bytes")} for row in rows],
        headers="keys", floatfmt=("", "", ".2f", ".2f", ".2f", ".2f", "", ".1e", ".1f", ".1f"), missingval="-",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a sequence of 2048 tokens, few turns: whether it works",
    )
    parser.add_argument("--turns", type=int, default=31, help="calls of each case (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="of the calls that are timed (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens, turns, processes = (2048, 3, 1) if options.quick else (options.tokens, options.turns, 5)
    # Twenty lengths, multiples of nothing and powers of two.
    lengths = [2, 3, 17, 63, 64, 65, *(tokens * share // 14 + 1 for share in range(1, 14)), tokens]
    rows, all_cases = [], cases()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, case in enumerate(all_cases, 1):
            path = Path(folder, case.package, "model.pt2")
            seconds = export_case(case, path)
            print(
                f"[{number}/{len(all_cases)}] {case.name}: exported in {seconds:.1f} s", flush=True
            )
            rows.append(measure_case(case, path, lengths, tokens, turns) | {"export s": seconds})
            print(f"    {rows[-1]['time']:.2f} of the time of cd.compile", flush=True)
        first = first_results(Path(folder, "program", "model.pt2"), options.threads, processes)
    print("\n" + table(rows))
    print(
        "\n"
        + tabulate(
            [{key: row[key] for key in row if key != "seconds"} for row in first],
            headers="keys",
            floatfmt=".2f",
        )
    )
    if options.json:
        record = {
            "hardware": measure.hardware() | {"isa": torch.backends.cpu.get_cpu_capability()},
            "commit": commit(),
        }
        measure.write_json(
            options.json, record | {"command": sys.argv[1:], "rows": rows, "first_results": first}
        )
    return int(options.check and not all(row["met"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
