"""What share of its rate on dense 4096 x 4096 a CPU's flash kernel keeps on many small problems.

The figures behind lowerings/costs.py.

    python benchmarks/kernels.py [--dtype float32] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tabulate import tabulate

from compiled_dilated import measure
from compiled_dilated.lowerings.tiling.kernels import Tiles, attention

HEADS, HEAD_DIM, PAIRS = 8, 64, 2**24
SHAPES = [
    (rows, columns)
    for rows in (32, 64, 128, 192, 256, 512, 768, 1024)
    for columns in (128, 256, 512, 1024, 2048)
]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"]
    )
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    options = arguments.parse_args()
    torch.set_num_threads(2)
    dtype = getattr(torch, options.dtype)

    def call(rows: int, columns: int, masked: bool):  # type: ignore[no-untyped-def]
        count = max(1, PAIRS // (rows * columns * HEADS))
        q, k, v = (
            torch.randn(count, HEADS, length, HEAD_DIM, dtype=dtype)
            for length in (rows, columns, columns)
        )
        tiles = Tiles(HEAD_DIM**-0.5, torch.zeros(rows, columns, dtype=dtype) if masked else None)
        return lambda: attention(q, k, v, tiles), count * HEADS * rows * columns

    calls = {(4096, 4096, False): call(4096, 4096, False)}
    calls |= {
        (*shape, masked): call(*shape, masked) for shape in SHAPES for masked in (False, True)
    }
    times = measure.interleaved({key: run for key, (run, _) in calls.items()}, repeats=9)
    rate = {key: calls[key][1] / measure.median(seconds) for key, seconds in times.items()}
    dense = rate[4096, 4096, False]
    rows = [
        {
            "queries": q,
            "keys": kv,
            "share": rate[q, kv, False] / dense,
            "share with a bias": rate[q, kv, True] / dense,
        }
        for q, kv in SHAPES
    ]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.json:
        gflops = 4 * HEAD_DIM * dense / 1e9
        measure.write_json(
            options.json,
            {
                "hardware": measure.hardware(),
                "dtype": options.dtype,
                "dense_gflops": gflops,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
