"""Any mask: query tiles that see equally many key tiles together.

Their keys are gathered, the mask is evaluated on PARTIAL tiles alone.
"""

from __future__ import annotations

import numpy as np

from ..masks import Mask
from ..orders import Order
from ..plans import Problem
from ..tiles import TileMap
from .batches import Batch, HeadRange
from .lattice import Table

# Kernels are fast from 256 queries on; keys are gathered at a finer grain, so that less of what is computed is hidden.
_Q_TILE, _KV_TILE = 256, 64


def propose(mask: Mask, order: Order, heads: HeadRange, kv_heads: HeadRange, problem: Problem) -> list[Batch]:
    """The batches of one head range of a branch."""
    tile_map = TileMap.build(
        mask,
        problem.q_len,
        problem.kv_len,
        q_tile=min(_Q_TILE, problem.q_len),
        kv_tile=_KV_TILE,
        order=order,
        q_offset=problem.q_offset,
    )
    permutation = order.permutation(problem.kv_len)
    batches = []
    for rows, full, q_tiles in _alike(tile_map, problem):
        queries = Table(q_tiles[:, None], tile_map.q_tile, rows, permutation, problem.q_offset)
        small = np.stack([_key_tiles(tile_map, tile) for tile in q_tiles])
        ragged = int(small[0, -1]) == tile_map.columns - 1 and problem.kv_len % _KV_TILE
        size = small.shape[1] * _KV_TILE - (_KV_TILE - problem.kv_len % _KV_TILE if ragged else 0)
        masks = (mask,) if full < small.shape[1] else ()
        batches.append(
            Batch(
                heads,
                kv_heads,
                queries,
                Table(small, _KV_TILE, size, permutation),
                masks,
                open=full * _KV_TILE if masks else 0,
                first=True,
            )
        )
    return batches


def _alike(tile_map: TileMap, problem: Problem) -> list[tuple[int, int, np.ndarray]]:
    """(queries per tile, FULL key tiles, the tiles) of query tiles that one batch can take.

    Tiles that see nothing are left out.
    """
    counts = tile_map.counts
    full = np.bincount(tile_map.row_of, weights=tile_map.full, minlength=tile_map.rows).astype(np.int64)
    short = np.zeros(tile_map.rows, dtype=np.int64)
    if problem.kv_len % _KV_TILE:
        # The short last key tile must stand last, among the PARTIAL ones.
        ends = tile_map.indices == tile_map.columns - 1
        short[tile_map.row_of[ends]] = 1
        full[tile_map.row_of[ends & tile_map.full]] -= 1
    rows = np.full(tile_map.rows, tile_map.q_tile)
    rows[-1:] = problem.q_len - (tile_map.rows - 1) * tile_map.q_tile
    shapes = np.stack([rows, counts, full, short], axis=1)
    distinct, which = np.unique(shapes, axis=0, return_inverse=True)
    which = which.reshape(-1)
    return [
        (int(shape[0]), int(shape[2]), np.flatnonzero(which == i).astype(np.int32))
        for i, shape in enumerate(distinct)
        if shape[1] > 0
    ]


def _key_tiles(tile_map: TileMap, row: int) -> np.ndarray:
    """The key tiles of one query tile: FULL ones first, a short last one last."""
    span = slice(tile_map.offsets[row], tile_map.offsets[row + 1])
    indices, full = tile_map.indices[span], tile_map.full[span]
    if tile_map.kv_len % tile_map.kv_tile:
        full = full & (indices != tile_map.columns - 1)
    return indices[np.argsort(~full, kind="stable")]
