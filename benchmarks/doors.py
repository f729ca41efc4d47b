"""What the checks of a call cost: looking for NaN that hidden keys hold, and tracing a function at every call.

python benchmarks/doors.py [--json FILE] [--tokens N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import torch
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
    """Median seconds of a call with the look for NaN, without it, and where hidden keys hold NaN."""
    attend = cd.compile(program)  # type: ignore[call-overload]
    q, k, v = inputs
    spoiled_k = k.detach().clone()
    spoiled_k[:, :, 0] = torch.nan  # seen by the first rows
    grad = torch.ones_like(q)

    def run(key: Tensor) -> None:
        out = attend(q, key, v)
        if backward:
            torch.autograd.grad(out, [q, v], grad)

    def without() -> None:
        with mock.patch.object(hidden, "has_nan", return_value=False):
            run(k)

    functions = {
        "checked": lambda: run(k),
        "unchecked": without,
        "with NaN": lambda: run(spoiled_k),
    }
    return {
        name: measure.median(seconds)
        for name, seconds in measure.interleaved(functions, repeats=15, seconds=14.0).items()
    }


def bias(table: Tensor) -> mods.ScoreMod:
    """A learned bias, as users write it."""
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
            rows.append(
                {
                    "program": name,
                    "pass": "forward + backward" if backward else "forward",
                    "ms": seconds["checked"] * 1e3,
                    "check": seconds["checked"] / seconds["unchecked"],
                    "with NaN": seconds["with NaN"] / seconds["unchecked"],
                }
            )
            print(f"{name}: {rows[-1]['pass']} done", flush=True)
    table = torch.randn(64, 64)
    tracing = measure.interleaved(
        {"trace": lambda: [mods.trace_score_mod(bias(table), torch.float32) for _ in range(100)]},
        repeats=15,
        seconds=10.0,
    )
    trace_ms = measure.median(tracing["trace"]) * 10
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print(f"\ntracing a score_mod: {trace_ms:.2f} ms a call")
    if options.json:
        record = {
            "hardware": measure.hardware(),
            "tokens": options.tokens,
            "rows": rows,
            "trace_ms": trace_ms,
        }
        measure.write_json(options.json, record)


if __name__ == "__main__":
    main()
