"""Measure the tile maps of a million tokens: time, bytes, and correctness.

    python benchmarks/plans.py [--json FILE]

Counts are checked on sampled rows of tiles, each classified against every key tile directly.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from harness.runs import origin
from tabulate import tabulate

from compiled_dilated import masks, measure, orders
from compiled_dilated.block_masks import block_masks
from compiled_dilated.masks import Mask
from compiled_dilated.orders import Order, curves
from compiled_dilated.tiles import TileMap

TOKENS, TILE, SIDE = 2**20, 128, 1024
LONGNET = masks.segments(8192) & masks.congruent(4, 1, period=8192)

GRID, CURVE = masks.neighborhood((SIDE, SIDE), 12), orders.hilbert(SIDE, SIDE)

# (name, mask, order, the most seconds)
CASES: tuple[tuple[str, Mask, Order, float], ...] = (
    ("window 256", masks.window(256), orders.identity(), 0.1),
    ("LongNet branch 8192/4, residue order", LONGNET, orders.residue(4, period=8192), 0.1),
    ("LongNet branch 2048/1", masks.segments(2048), orders.identity(), 0.1),
    ("Hilbert window radius 12, 1024 x 1024", GRID, CURVE, 1.0),
)
MOST_BYTES = 4 * 2**20
IN_PARTS = {
    "window 256 | sinks 4": masks.window(256) | masks.sinks(4),
    "window 256 | global 4": masks.window(256) | masks.global_tokens(4),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    target = arguments.parse_args().json
    rows = [_map(*case) for case in CASES] + [_parts(name, mask) for name, mask in IN_PARTS.items()]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if target:
        measure.write_json(target, origin() | {"tokens": TOKENS, "tile": TILE, "rows": rows})
    raise SystemExit(not all(row["ok"] for row in rows))


def _map(name: str, mask: Mask, order: Order, allowed: float) -> dict[str, object]:
    seconds = []
    for _ in range(5):
        for cached in (curves.curve, curves.curve_coordinates):
            cached.cache_clear()
        start = time.perf_counter()
        tile_map = TileMap.build(mask, TOKENS, TOKENS, q_tile=TILE, kv_tile=TILE, order=order)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    transposed = tile_map.transpose()
    with_transpose = measure.median(seconds) + time.perf_counter() - start
    # 64 rows of tiles, classified again one by one.
    sample = range(0, tile_map.rows, tile_map.rows // 64)
    is_right = all(_row(mask, order, row) == tile_map.counts[row] for row in sample)
    size = max(tile_map.nbytes, transposed.nbytes)
    return {
        "mask": name,
        "seconds": measure.median(seconds),
        "allowed": allowed,
        "with transpose": with_transpose,
        "tiles": len(tile_map.indices),
        "MiB": size / 2**20,
        "counts right": is_right,
        "ok": measure.median(seconds) <= allowed and size <= MOST_BYTES and is_right,
    }


def _row(mask: Mask, order: Order, row: int) -> int:
    """Count the key tiles of a query tile, classified one by one."""
    starts = np.arange(0, TOKENS, TILE)
    kv = order.regions(starts, starts + TILE, TOKENS)
    return int((mask.classify(kv[np.full(len(starts), row)], kv) > 0).sum())


def _parts(name: str, mask: Mask) -> dict[str, object]:
    """Measure the block masks that FlexAttention needs for a mask."""
    start = time.perf_counter()
    parts = block_masks(mask, TOKENS, TOKENS, tile=TILE)
    seconds = time.perf_counter() - start
    # A block mask has its lists by query tile and by key tile.
    by_query = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    lists = [*by_query, *(name.replace("kv", "q") for name in by_query)]
    size = tiles = 0
    for part in parts:
        block_mask = part.block_mask
        size += sum(getattr(block_mask, name).nbytes for name in lists)
        tiles += int(block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())
    return {
        "mask": f"{name}, {len(parts)} block masks",
        "seconds": seconds,
        "allowed": None,
        "with transpose": seconds,
        "tiles": tiles,
        "MiB": size / 2**20,
        "counts right": None,
        "ok": size <= MOST_BYTES,
    }


if __name__ == "__main__":
    main()
