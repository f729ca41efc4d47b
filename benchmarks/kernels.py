"""Measure ATen's CPU flash kernel on many small tiles.

Results are shares of its rate on 4096 x 4096.

The figures behind lowerings/tiling/costs.py.

    python benchmarks/kernels.py [--dtype float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness.runs import origin
from tabulate import tabulate

from compiled_dilated import measure
from compiled_dilated.arguments import BYTES
from compiled_dilated.lowerings.tiling.kernels import Tiles, attention

HEADS, HEAD_DIM, PAIRS = 8, 64, 2**24
QUERIES, KEYS = (32, 64, 128, 192, 256, 512, 768, 1024), (128, 256, 512, 1024, 2048)
SHAPES = tuple(itertools.product(QUERIES, KEYS))
DENSE = (4096, 4096)


def call(shape: tuple[int, int], with_bias: bool, dtype: torch.dtype) -> Callable[[], object]:
    """A call of the kernel on tiles with `PAIRS` pairs in all.

    shape: queries and keys of a tile.
    """
    queries, keys = shape
    tiles = tiles_of(shape)
    q = torch.randn(tiles, HEADS, queries, HEAD_DIM, dtype=dtype)
    k = torch.randn(tiles, HEADS, keys, HEAD_DIM, dtype=dtype)
    v = torch.randn(tiles, HEADS, keys, HEAD_DIM, dtype=dtype)
    bias = torch.zeros(queries, keys, dtype=dtype) if with_bias else None
    return partial(attention, q, k, v, Tiles(HEAD_DIM**-0.5, bias))


def tiles_of(shape: tuple[int, int]) -> int:
    """The number of tiles of a call."""
    queries, keys = shape
    return max(1, PAIRS // (queries * keys * HEADS))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--dtype", default="float32", choices=BYTES)
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    options = arguments.parse_args()
    torch.set_num_threads(2)
    dtype = getattr(torch, options.dtype)
    keys = [(DENSE, False), *itertools.product(SHAPES, (False, True))]
    times = measure.interleaved({key: call(*key, dtype) for key in keys}, repeats=9)
    # Pairs a second, by shape and bias.
    rate = {}
    for (shape, with_bias), seconds in times.items():
        pairs = tiles_of(shape) * HEADS * shape[0] * shape[1]
        rate[shape, with_bias] = pairs / measure.median(seconds)
    dense = rate[DENSE, False]
    rows = []
    for shape in SHAPES:
        row = {"queries": shape[0], "keys": shape[1], "share": rate[shape, False] / dense}
        rows.append(row | {"share with a bias": rate[shape, True] / dense})
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.json:
        record = origin() | {"dtype": options.dtype}
        record |= {"dense_gflops": 4 * HEAD_DIM * dense / 1e9, "rows": rows}
        measure.write_json(options.json, record)


if __name__ == "__main__":
    main()
