"""Measure packages of cd.export: time, memory, errors and size, against cd.compile.

python benchmarks/export.py [--json FILE] [--quick] [--check]

program  LongNet attention of 8 heads of 64
window   a causal window of 1024 tokens and four sinks; decode: one query of it against a cache
model    two layers of LongNet attention and an MLP, 512 wide, against torch.compile of the same

Time and memory are shares of cd.compile, called in turns with the package in one process; results
are compared at 20 lengths. Peaks are measured behind the times of all cases, with every buffer on
pages of its own, so that they do not depend on the calls before. "first result" is measured in
fresh processes, from after the import of torch to the first result: by a package, by a package
without this library, and by cd.compile, whose kernel is in its cache.
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
from harness.runs import origin
from tabulate import tabulate
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks, measure
from passes.allocators import map_buffers

HEADS, HEAD_DIM, WIDTH = 8, 64, 512
# The most time and memory of a package, as shares of cd.compile; the largest error of its results.
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
    longnet = cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True)
    run = cd.load(path) if way == "package" else cd.compile(longnet)
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
    """An entry of a package.

    package: the package's name; two cases may be entries of one package.
    model: the exported model.
    inputs: the entry's inputs for a number of tokens.
    compiled: the same model by cd.compile.
    decode: whether the entry is "decode"; its package is an earlier case's.
    """

    name: str
    package: str
    model: Any
    inputs: Callable[[int], tuple[Tensor, ...]]
    compiled: Callable[..., Tensor]
    decode: bool = False


def qkv(tokens: int, queries: int | None = None) -> tuple[Tensor, ...]:
    """q, k and v, of as many queries as tokens by default."""
    sizes = (tokens if queries is None else queries, tokens, tokens)
    return tuple(torch.randn(1, HEADS, size, HEAD_DIM) for size in sizes)


def cases() -> list[Case]:
    """All cases."""
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
    """Measure a package against cd.compile.

    lengths: numbers of tokens at which results are compared.
    most: tokens of the calls that are timed.
    """
    run = cd.load(path)
    package = run.decode if case.decode else run
    differences = []
    for tokens in lengths:
        inputs = case.inputs(tokens)
        expected = case.compiled(*inputs)
        differences.append((package(*inputs) - expected).abs().max() / expected.abs().max())
    # NaN if one is: Python's max may lose it.
    difference = torch.stack(differences).max().item()
    functions = functions_of(case, path, case.inputs(most))
    times = measure.interleaved(functions, repeats=turns, warmup=2, seconds=60.0)
    pairs = zip(times["package"], times["compiled"], strict=True)
    share = measure.median([of_package / compiled for of_package, compiled in pairs])
    return {
        "case": case.name,
        "tokens": most,
        "package ms": measure.median(times["package"]) * 1e3,
        "compiled ms": measure.median(times["compiled"]) * 1e3,
        "time": share,
        "memory": None,
        "lengths": len(lengths),
        "difference": difference,
        "MB": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6,
        "met": share <= MOST and difference <= MOST_DIFFERENCE,
        "seconds": times,
    }


def measure_peaks(case: Case, path: Path, row: dict[str, Any]) -> None:
    """Add the peaks of a package and of cd.compile to a row."""
    functions = functions_of(case, path, case.inputs(row["tokens"]))
    peaks = {}
    for name, function in functions.items():
        # The first call of a package reads its weights.
        function()
        peaks[name] = measure.peak_bytes(function)
    row["peak_bytes"] = peaks
    # A single query takes next to no memory: its ratio means nothing.
    if not case.decode:
        row["memory"] = peaks["package"] / max(peaks["compiled"], 1)
        row["met"] &= row["memory"] <= MOST


def functions_of(
    case: Case, path: Path, inputs: tuple[Tensor, ...]
) -> dict[str, Callable[[], object]]:
    """The calls that are compared."""
    run = cd.load(path)
    package = run.decode if case.decode else run
    return {"package": lambda: package(*inputs), "compiled": lambda: case.compiled(*inputs)}


def export_case(case: Case, path: Path) -> float:
    """Export a case; its seconds, 0 if an earlier case exported it."""
    if path.exists():
        return 0.0
    path.parent.mkdir()
    is_program = not isinstance(case.model, nn.Module)
    started = time.perf_counter()
    cd.export(case.model, case.inputs(64), path, lengths=(2, 2**20), decode=is_program)
    return time.perf_counter() - started


def first_results(path: Path, threads: int, turns: int) -> list[dict[str, Any]]:
    """Measure the first results in fresh processes."""
    code = CHILD.format(threads=threads, heads=HEADS, head_dim=HEAD_DIM)
    rows = []
    for way in ("package", "package, alone", "compiled"):
        command = [sys.executable, "-c", code, str(path), way]
        seconds = []
        for turn in range(turns):
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds.append(json.loads(run.stdout))
            print(f"[{turn + 1}/{turns}] first result, {way}: {seconds[-1]:.2f} s", flush=True)
        rows.append({"first result": way, "s": measure.median(seconds), "seconds": seconds})
    return rows


def without(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Rows without some columns."""
    out = []
    for row in rows:
        out.append({name: value for name, value in row.items() if name not in names})
    return out


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = out.add_argument
    option("--json", type=Path, metavar="FILE", help="where to write the figures")
    option("--quick", action="store_true", help="2048 tokens and few turns, to test the script")
    option("--turns", type=int, default=31, help="calls of each case (%(default)s)")
    option("--tokens", type=int, default=16384, help="of the calls that are timed (%(default)s)")
    option("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    option("--check", action="store_true", help="exit with 1 if a bar is missed")
    return out


def main() -> int:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    tokens, turns, processes = options.tokens, options.turns, 5
    if options.quick:
        tokens, turns, processes = 2048, 3, 1
    # Twenty lengths: around multiples of tiles, and multiples of nothing.
    lengths = [2, 3, 17, 63, 64, 65, *(tokens * share // 14 + 1 for share in range(1, 14)), tokens]
    rows, all_cases = [], cases()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, case in enumerate(all_cases, 1):
            path = Path(folder, case.package, "model.pt2")
            seconds = export_case(case, path)
            progress = f"[{number}/{len(all_cases)}] {case.name}"
            print(f"{progress}: exported in {seconds:.1f} s", flush=True)
            rows.append(measure_case(case, path, lengths, tokens, turns) | {"export s": seconds})
            print(f"    {rows[-1]['time']:.2f} of the time of cd.compile", flush=True)
        map_buffers()
        for case, row in zip(all_cases, rows, strict=True):
            measure_peaks(case, Path(folder, case.package, "model.pt2"), row)
        first = first_results(Path(folder, "program", "model.pt2"), options.threads, processes)
    formats = ("", "", ".2f", ".2f", ".2f", ".2f", "", ".1e", ".1f", ".1f")
    table = without(rows, "seconds", "peak_bytes")
    print("\n" + tabulate(table, headers="keys", floatfmt=formats, missingval="-"))
    print("\n" + tabulate(without(first, "seconds"), headers="keys", floatfmt=".2f"))
    if options.json:
        measure.write_json(options.json, origin() | {"rows": rows, "first_results": first})
    return int(options.check and not all(row["met"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
