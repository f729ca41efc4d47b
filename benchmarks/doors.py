"""Measure the checks of a call.

They are the search for NaN in hidden keys, and the tracing of a function.

python benchmarks/doors.py [--json FILE] [--tokens N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import torch
from harness.runs import origin
from tabulate import tabulate
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks, measure, mods
from compiled_dilated.lowerings import hidden

HEADS, HEAD_DIM = 8, 64
PROGRAMS = {
    "window 256": masks.window(256),
    "causal window 256": masks.causal() & masks.window(256),
    "causal": masks.causal(),
    "LongNet causal": cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True),
}


def times(program: object, inputs: list[Tensor], backward: bool) -> dict[str, float]:
    """Median seconds of a call: with the search, without, with NaN."""
    attend = cd.compile(program)  # type: ignore[call-overload]
    q, k, v = inputs
    nan_k = k.detach().clone()
    nan_k[:, :, 0] = torch.nan  # a key that the first rows see
    grad = torch.ones_like(q)

    def run(key: Tensor) -> None:
        out = attend(q, key, v)
        if backward:
            torch.autograd.grad(out, [q, v], grad)

    def run_unchecked() -> None:
        with mock.patch.object(hidden, "has_nan", return_value=False):
            run(k)

    functions = {
        "checked": lambda: run(k),
        "unchecked": run_unchecked,
        "with NaN": lambda: run(nan_k),
    }
    return measure.medians(measure.interleaved(functions, repeats=15, seconds=14.0))


def bias(table: Tensor) -> mods.ScoreMod:
    """A learned bias as a score_mod."""
    return lambda score, b, h, q_idx, kv_idx: score + table[q_idx, kv_idx]


def main() -> None:
    """Print the table; write it."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    arguments.add_argument(
        "--tokens", type=int, default=16384, help="tokens of the sequence (default 16384)"
    )
    options = arguments.parse_args()
    torch.set_num_threads(2)
    inputs = [torch.randn(1, HEADS, options.tokens, HEAD_DIM).requires_grad_() for _ in range(3)]
    rows = []
    for name, program in PROGRAMS.items():
        for backward in (False, True):
            with torch.set_grad_enabled(backward):
                seconds = times(program, inputs, backward)
            row = {
                "program": name,
                "pass": "forward + backward" if backward else "forward",
                "ms": seconds["checked"] * 1e3,
                # Ratios to a call without the search.
                "with NaN": seconds["with NaN"] / seconds["unchecked"],
            }
            # A forward of the native kernel notices NaN while it writes: it has no search.
            if backward:
                row["check"] = seconds["checked"] / seconds["unchecked"]
            rows.append(row)
            print(f"{name}: {row['pass']} done", flush=True)
    trace_ms = trace_milliseconds()
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print(f"\ntracing a score_mod: {trace_ms:.2f} ms a call")
    if options.json:
        record = origin() | {"tokens": options.tokens}
        measure.write_json(options.json, record | {"rows": rows, "trace_ms": trace_ms})


def trace_milliseconds() -> float:
    """Median milliseconds to trace a score_mod."""
    table = torch.randn(64, 64)

    def trace() -> None:
        for _ in range(100):
            mods.trace_score_mod(bias(table), torch.float32)

    seconds = measure.interleaved({"trace": trace}, repeats=15, seconds=10.0)
    return measure.median(seconds["trace"]) / 100 * 1e3


if __name__ == "__main__":
    main()
