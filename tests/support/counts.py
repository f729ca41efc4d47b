"""Counts of plans, and their committed baseline.

Tiles, pairs, FLOPs, bytes, messages and graphs are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.testing import CompileCounter

import compiled_dilated as cd
from compiled_dilated import Program, counting, masks, planner
from compiled_dilated.heads import head_groups
from compiled_dilated.masks import Mask
from compiled_dilated.native import build
from compiled_dilated.plans import Plan, Problem
from compiled_dilated.ring.layouts import Contiguous
from compiled_dilated.ring.schedules import Schedule
from tests.cases import CASES, Case
from tests.support.case import BATCH, HEAD_DIM

BASELINE = Path(__file__).parents[1] / "data" / "counts.json"
REWRITE = "tools/counts --write"

# By case, by name of the count.
Counts = dict[str, dict[str, int]]

# Tokens per side of the tiles that are counted: small, as most cases are short.
_TILE = 16
_RANKS = 4
# Lengths of the graphs that are counted: ragged, and on both sides of a power of two.
_LENGTHS = (100, 127, 128, 129, 331, 64, 500)

# Long programs beside the short cases, with their tokens.
LONG: dict[str, tuple[Program | Mask, int]] = {
    "longnet, 64K": (cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True), 65536),
    "window, 64K": (cd.local_window(256), 65536),
    "window or sinks, 64K": (masks.causal() & (masks.window(256) | masks.sinks(4)), 65536),
    "hilbert window, 16K": (cd.hilbert_window((128, 128), 12), 16384),
    "block sparse, 16K": (cd.block_sparse(0.01, tokens=16384), 16384),
    "causal, 16K": (masks.causal(), 16384),
}
GRAPHS: dict[str, Program | Mask] = {
    "longnet": cd.longnet((16, 48, 144), (1, 3, 9), causal=True),
    "window or sinks": masks.causal() & (masks.window(33) | masks.sinks(4)),
    "big bird": cd.big_bird(16, 16, 2, 16, 512),
}


def count() -> Counts:
    """All counts of this checkout, on this machine."""
    counts: Counts = {}
    for case in CASES:
        counts[case.name] = _of_case(case)
    for name, (program, tokens) in LONG.items():
        regular = ("strided",) if "longnet" in name else ()
        counts[name] = _of_program(program, (1, 8, tokens, 64), 8, 64, ("tiled", *regular))
    for name, program in GRAPHS.items():
        counts[f"torch.compile, {name}"] = {"graphs": graphs(program)}
    return counts


def _of_case(case: Case) -> dict[str, int]:
    """Counts of a case at the longest of its lengths."""
    tokens = case.lengths[-1]
    lowerings = ("dense", "tiled") if case.refused else ("dense", "strided", "tiled")
    shape = (BATCH, case.heads, tokens, HEAD_DIM)
    return _of_program(case.program(tokens), shape, case.kv_heads, case.value_dim, lowerings)


def _of_program(
    program: Program | Mask,
    q_shape: tuple[int, int, int, int],
    kv_heads: int,
    value_dim: int,
    lowerings: tuple[str, ...],
) -> dict[str, int]:
    plan = cd.plan(
        program, q_shape, kv_heads, value_dim=value_dim, training=True, lowering=lowerings[0]
    )
    problem = plan.problem
    counts = _tiles(problem)
    for lowering in lowerings:
        counts |= _work(planner.choose(problem, lowering), lowering)
    if build.available() is None:
        counts |= _native(planner.choose(problem, "native"))
    return counts | _messages(problem)


def _tiles(problem: Problem) -> dict[str, int]:
    """FULL and PARTIAL tiles of all heads.

    There are none where too many tiles differ to be counted.
    """
    full, partial = 0, 0
    for branch in problem.program.branches:
        for mask, query_heads, _ in head_groups(branch, problem.heads, problem.kv_heads):
            counts = counting.tiles(mask, problem.q_len, problem.kv_len, _TILE, branch.order)
            if counts is None:
                return {}
            full += counts.full * query_heads.count
            partial += counts.partial * query_heads.count
    return {"visible tiles": full + partial, "partial tiles": partial}


def _work(plan: Plan, lowering: str) -> dict[str, int]:
    cost = plan.cost
    return {
        f"{lowering} pairs": cost.pairs,
        f"{lowering} FLOPs": cost.kernel_flops,
        f"{lowering} copied bytes": cost.copied_bytes,
        f"{lowering} kernel calls": cost.calls,
        f"{lowering} planned bytes": plan.memory.total,
    }


def _native(plan: Plan) -> dict[str, int]:
    """Pairs that the native kernel computes.

    They depend on the width of its vectors.
    """
    return {f"native pairs, {isa()}": plan.cost.pairs}


def isa() -> str:
    """The instruction set of this machine's kernels, as "AVX512"."""
    return torch.backends.cpu.get_cpu_capability()


def _messages(problem: Problem) -> dict[str, int]:
    """Steps and messages of all ranks of a ring.

    Their layout is the one that every program has.
    """
    layout = Contiguous(problem.q_len, _RANKS)
    schedule = Schedule(problem.program, layout, problem.heads, problem.kv_heads)
    steps, messages, rows = 0, 0, 0
    for rank in range(_RANKS):
        for step in schedule.steps(rank):
            steps += 1
            messages += len(step.messages)
            rows += sum(message.kv_heads.count * len(message.rows) for message in step.messages)
    width = problem.head_dim + problem.value_dim
    return {
        "ring steps": steps,
        "ring messages": messages,
        "ring received bytes": problem.batch * rows * width * problem.itemsize,
    }


def graphs(program: Program | Mask, compile: Callable[..., Any] = torch.compile) -> int:
    """Graphs that torch.compile makes of a call at several lengths, forward."""
    torch._dynamo.reset()
    counter = CompileCounter()
    attend = compile(cd.compile(program), backend=counter, fullgraph=True)
    with torch.no_grad():
        for tokens in _LENGTHS:
            attend(*torch.randn(3, 1, 2, tokens, 8))
    torch._dynamo.reset()
    return int(counter.frame_count)


def read(path: Path = BASELINE) -> Counts:
    """The committed counts."""
    counts: Counts = json.loads(path.read_text())
    return counts


def write(counts: Counts, path: Path = BASELINE) -> None:
    """Write counts, a line for each case.

    Counts of other instruction sets stay.
    """
    before = read(path) if path.exists() else {}
    lines = []
    for case, numbers in counts.items():
        elsewhere = {
            name: number
            for name, number in before.get(case, {}).items()
            if not _is_of_this_machine(name)
        }
        lines.append(f"{json.dumps(case)}: {json.dumps(numbers | elsewhere, sort_keys=True)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _is_of_this_machine(name: str) -> bool:
    return not name.startswith("native") or name == f"native pairs, {isa()}"


def grown(before: Counts, now: Counts) -> list[str]:
    """Counts above the baseline, or missing there, one a line."""
    lines = []
    for case, numbers in now.items():
        for name, number in numbers.items():
            committed = before.get(case, {}).get(name)
            if committed is None and _has_baseline(name, before):
                lines.append(f"{case}: {name}: {number:,}, not in the baseline")
            elif committed is not None and number > committed:
                lines.append(f"{case}: {name}: was {committed:,}, is {number:,}")
    return lines


def _has_baseline(name: str, before: Counts) -> bool:
    """Whether the baseline was written on a machine that has this count."""
    return not name.startswith("native") or any(name in numbers for numbers in before.values())


def shrunk(before: Counts, now: Counts) -> list[str]:
    """Counts that are smaller than before, or gone, one a line."""
    lines = []
    for case, numbers in before.items():
        for name, committed in numbers.items():
            number = now.get(case, {}).get(name)
            if number is None and _is_of_this_machine(name):
                lines.append(f"{case}: {name}: was {committed:,}, is gone")
            elif number is not None and number < committed:
                lines.append(f"{case}: {name}: was {committed:,}, is {number:,}")
    return lines
