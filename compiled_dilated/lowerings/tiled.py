"""Any mask: query tiles that see equally many key tiles together.

Their keys are gathered, the mask is evaluated on PARTIAL tiles alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from ..heads import HeadRange
from ..masks import Mask
from ..orders import Order
from ..plans import Problem
from ..tiles import TileIndices, TileMap
from .batches import Batch
from .lattice import Table

# Kernels are fast from 256 queries on; keys are gathered at a finer grain, so that less of what is computed is hidden. What a
# query tile sees beyond `_MOST_SMALL` key tiles is merged in further batches, so that what is gathered at once stays small.
_Q_TILE, _KV_TILE, _MOST_SMALL = 256, 64, 32


@dataclass(frozen=True)
class _Shape:
    """What query tiles of one batch have in common.

    Tokens, FULL key tiles, all key tiles, keys, and which part of all its key tiles this is.
    """

    rows: int
    full: int
    small: int
    columns: int
    part: int


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
    for shape, (q_tiles, small) in _alike(tile_map).items():
        queries = Table(np.array(q_tiles, dtype=np.int32)[:, None], tile_map.q_tile, shape.rows, permutation, problem.q_offset)
        keys = Table(np.stack(small), _KV_TILE, shape.columns, permutation)
        masks = (mask,) if shape.full < shape.small else ()
        seen = shape.full * _KV_TILE if masks else 0
        batches.append(Batch(heads, kv_heads, queries, keys, masks, open=seen, first=shape.part == 0))
    return batches


def _alike(tile_map: TileMap) -> dict[_Shape, tuple[list[int], list[TileIndices]]]:
    """Query tiles, and the key tiles that each sees, by what one batch has in common; the parts of a tile in turn."""
    found: dict[_Shape, tuple[list[int], list[TileIndices]]] = defaultdict(lambda: ([], []))
    for row in range(tile_map.rows):
        seen, full = _key_tiles(tile_map, row)
        rows = min(tile_map.q_tile, tile_map.q_len - row * tile_map.q_tile)
        for start in range(0, len(seen), _MOST_SMALL):
            small = seen[start : start + _MOST_SMALL]
            last = (int(small[-1]) + 1) * _KV_TILE
            columns = len(small) * _KV_TILE - max(0, last - tile_map.kv_len)
            shape = _Shape(rows, min(max(full - start, 0), len(small)), len(small), columns, start // _MOST_SMALL)
            found[shape][0].append(row)
            found[shape][1].append(small)
    return dict(sorted(found.items(), key=lambda each: each[0].part))


def _key_tiles(tile_map: TileMap, row: int) -> tuple[TileIndices, int]:
    """The key tiles of one query tile, FULL ones first, a short last one last; and how many stand in front that are FULL."""
    span = slice(tile_map.offsets[row], tile_map.offsets[row + 1])
    indices, full = tile_map.indices[span], tile_map.full[span]
    if tile_map.kv_len % tile_map.kv_tile:
        full = full & (indices != tile_map.columns - 1)
    return np.concatenate([indices[full], indices[~full]]), int(full.sum())
