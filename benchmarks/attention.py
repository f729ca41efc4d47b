"""Measure attention: useful rates as shares of dense SDPA's over 4096 tokens.

python benchmarks/attention.py [--json FILE] [--quick] [--busy | --avx2] [--threads 2] [--only TEXT]

A useful rate is allowed pairs over time. Short causal and full cases are compared with one SDPA of
the same problem, float16 with our own float32. `fallback` runs where there is no compiler, `flex`
is compiled FlexAttention. Needs a quiet machine for half an hour.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import reports
from harness.cases import Case, label, ours_of, same_work
from harness.problems import LONGNET, Problem, pairs_within

import compiled_dilated as cd
from compiled_dilated import masks

WINDOW = masks.window(256)
RADIUS = 12
# Bars of the forward in bfloat16.
LOW_BARS = {"window-16k": 1.0, "longnet-16k": 1.0, "hilbert-64x64": 0.6}
SHORT = (512, 1024, 2048)
LENGTHS = (2**13, 2**15, 2**17, 2**20)
# With this many tokens x heads a tensor takes 0.5 GiB.
MOST_TOKEN_HEADS = 2**21
# Bars of families: time per token within 10%.
FAMILIES = {"window": 1 / 1.1, "hilbert": 1 / 1.1}


def window(tokens: int, **settings: Any) -> Problem:
    """A window of 256 tokens to both sides."""
    return Problem(WINDOW, tokens, **settings)


def grid(rows: int, columns: int, row_major: bool = False, **settings: Any) -> Problem:
    """Neighbours within 12 on both axes, in Hilbert or row-major order."""
    shape = (rows, columns)
    program = masks.neighborhood(shape, RADIUS) if row_major else cd.hilbert_window(shape, RADIUS)

    def pairs() -> int:
        return pairs_within(rows, RADIUS) * pairs_within(columns, RADIUS)

    return Problem(program, rows * columns, pairs_per_head=pairs, **settings)


def longnet(tokens: int, **settings: Any) -> Problem:
    """LongNet with the segments and dilation rates of all benchmarks."""
    return Problem(LONGNET, tokens, **settings)


def near_square(tokens: int) -> tuple[int, int]:
    """Rows and columns, powers of two, nearest to a square."""
    rows = 2 ** ((tokens.bit_length() - 1) // 2)
    return rows, tokens // rows


def rate_cases() -> list[Case]:
    """Shares of dense SDPA's rate in float32."""
    return [
        Case("window-16k", window(2**14), (0.92, 0.85), quick=True),
        Case("window-64k", window(2**16), (0.92, 0.85)),
        Case("hilbert-64x64", grid(64, 64), (0.75, 0.65), quick=True),
        Case("hilbert-256x256", grid(256, 256), (0.70, 0.65)),
        Case("row-major-64x64", grid(64, 64, row_major=True), (0.75, 0.65)),
        Case("longnet-16k", longnet(2**14), (1.05, 0.95), quick=True),
        # The block mask of its union over 128K tokens takes torch minutes.
        Case("longnet-128k", longnet(2**17), (1.05, 0.95), rivals=("fallback",)),
        Case("causal-4k", Problem(masks.causal(), 2**12), rivals=("flex", "fallback", "SDPA")),
        Case("causal-16k", Problem(masks.causal(), 2**14), rivals=("flex", "fallback", "SDPA")),
        Case("window-16k-by-token", window(2**14, by_token=True), (0.80, None)),
        Case("window-16k-gqa", window(2**14, kv_heads=2)),
    ]


def low_precision_cases() -> list[Case]:
    """bfloat16 against dense SDPA in bfloat16, float16 against ours in float32."""
    out = []
    for case in rate_cases():
        if case.name in LOW_BARS:
            low = replace(case.problem, dtype="bfloat16")
            half = replace(case.problem, dtype="float16")
            bars, is_quick = (LOW_BARS[case.name], None), case.name == "window-16k"
            out.append(Case(f"{case.name}-bfloat16", low, bars, quick=is_quick))
            baseline = ours_of(case.problem, "float32")
            out.append(Case(f"{case.name}-float16", half, (0.5, 0.5), baseline))
    return out


def short_cases() -> list[Case]:
    """Never slower than one SDPA of the same problem."""
    out = []
    for name, mask in (("full", masks.full()), ("causal", masks.causal())):
        for tokens in SHORT:
            problem = Problem(mask, tokens)
            baseline, is_quick = same_work(problem, "SDPA"), tokens == 512
            out.append(
                Case(f"{name}-{label(tokens)}", problem, (1.0, 1.0), baseline, quick=is_quick)
            )
    return out


def length_cases() -> list[Case]:
    """Time per token from 8K to 1M tokens."""
    out = []
    for tokens in LENGTHS:
        heads = min(8, MOST_TOKEN_HEADS // tokens)
        problems = {
            "window": window(tokens, heads=heads),
            "hilbert": grid(*near_square(tokens), heads=heads),
        }
        for family, problem in problems.items():
            name = f"length-{family}-{label(tokens)}"
            out.append(Case(name, problem, rivals=(), family=family))
    return out


CASES = (*rate_cases(), *low_precision_cases(), *short_cases(), *length_cases())
AVX2_CASES = (
    Case("avx2-window-16k", window(2**14), (0.75, None), rivals=("fallback",), quick=True),
    Case("avx2-hilbert-64x64", grid(64, 64), (0.65, None), rivals=("fallback",), quick=True),
)


def with_avx2(arguments: list[str]) -> int:
    """Run this script with torch, MKL and our kernels limited to AVX2."""
    with tempfile.TemporaryDirectory() as folder:
        # A wrapper of the compiler, whose last option overrides -march=native.
        compiler = Path(folder, "c++")
        chosen = os.environ.get("CXX", "g++")
        compiler.write_text(f'#!/bin/sh\nexec {chosen} "$@" -march=haswell\n')
        compiler.chmod(0o700)
        limits = {
            "CXX": str(compiler),
            "COMPILED_DILATED_CACHE": str(Path(folder, "cache")),
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
        }
        command = [sys.executable, __file__, *arguments]
        return subprocess.run(command, env={**os.environ, **limits}).returncode


def main() -> int:
    parser = reports.parser(__doc__, CASES, ("flex", "fallback", "SDPA"))
    text = "only window and Hilbert, all limited to AVX2, on one thread"
    parser.add_argument("--avx2", action="store_true", help=text)
    options = parser.parse_args()
    if not options.avx2:
        return reports.run(options, CASES, FAMILIES)
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return with_avx2(sys.argv[1:])
    options.threads = 1
    return reports.run(options, AVX2_CASES, {})


if __name__ == "__main__":
    raise SystemExit(main())
