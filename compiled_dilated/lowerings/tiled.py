"""Any mask in any order: key tiles gathered per query tile.

The mask is evaluated on PARTIAL tiles only.

    window(2), tiles of 4 queries and 2 keys      query tile 1 is computed with its five key tiles:
       0 1 2 3 4 5
     0 # # +                                      # # # + +    FULL ones first, seen by all queries;
     1   + # # # +     # FULL  + PARTIAL          a bias hides pairs of the PARTIAL ones

Query tiles with equally many key tiles form one batch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from ..heads import HeadRange, head_groups
from ..masks import Mask
from ..orders import Order
from ..plans import Problem, Proposal, Refusal
from ..programs import Branch
from ..tiles import TileIndices, TileMap
from .batched import Batched
from .tiling import costs
from .tiling.batches import Batch
from .tiling.lattice import Table

# Kernels are fast from 256 queries on; smaller key tiles have fewer hidden pairs.
_Q_TILE, _KV_TILE = 256, 64
# Key tiles of one gather, which bounds its memory; more key tiles go to further batches.
_MOST_GATHERED = 32


@dataclass(frozen=True)
class _Shape:
    """Properties that all query tiles of a batch share.

    rows: number of queries.
    full: number of FULL key tiles.
    gathered: number of all key tiles.
    columns: number of keys.
    part: index of this run of `_MOST_GATHERED` key tiles.
    """

    rows: int
    full: int
    gathered: int
    columns: int
    part: int


def propose(problem: Problem) -> list[Proposal | Refusal]:
    """One proposal or refusal per branch."""
    return [
        propose_branch(index, branch, problem)
        for index, branch in enumerate(problem.program.branches)
    ]


def propose_branch(index: int, branch: Branch, problem: Problem) -> Proposal:
    """A proposal for all heads of a branch."""
    batches: list[Batch] = []
    for mask, heads, kv_heads in head_groups(branch, problem.heads, problem.kv_heads):
        batches += _batches(mask, branch.order, heads, kv_heads, problem)
    return Proposal("tiled", index, costs.of(batches, problem), tuple(batches))


def _batches(
    mask: Mask, order: Order, heads: HeadRange, kv_heads: HeadRange, problem: Problem
) -> list[Batch]:
    """Batches of heads with equal masks."""
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
    for shape, (q_tiles, key_tiles) in _by_shape(tile_map).items():
        small = np.array(q_tiles, dtype=np.int32)[:, None]
        queries = Table(small, tile_map.q_tile, shape.rows, permutation, problem.q_offset)
        keys = Table(np.stack(key_tiles), _KV_TILE, shape.columns, permutation)
        batch = Batch(heads, kv_heads, queries, keys)
        # Without PARTIAL tiles no pair is hidden, and the kernel needs no bias.
        if shape.full < shape.gathered:
            batch = replace(batch, masks=(mask,), unmasked_columns=shape.full * _KV_TILE)
        batches.append(batch)
    return batches


def _by_shape(tile_map: TileMap) -> dict[_Shape, tuple[list[int], list[TileIndices]]]:
    """Query tiles and their key tiles, grouped by shape."""
    groups: dict[_Shape, tuple[list[int], list[TileIndices]]] = defaultdict(lambda: ([], []))
    for row in range(tile_map.rows):
        visible, full = _key_tiles(tile_map, row)
        rows = min(tile_map.q_tile, tile_map.q_len - row * tile_map.q_tile)
        for start in range(0, len(visible), _MOST_GATHERED):
            gathered = visible[start : start + _MOST_GATHERED]
            # A short last key tile comes last: the keys that it lacks are cut off at the end.
            last = (int(gathered[-1]) + 1) * _KV_TILE
            columns = len(gathered) * _KV_TILE - max(0, last - tile_map.kv_len)
            full_here = min(max(full - start, 0), len(gathered))
            shape = _Shape(rows, full_here, len(gathered), columns, start // _MOST_GATHERED)
            q_tiles, key_tiles = groups[shape]
            q_tiles.append(row)
            key_tiles.append(gathered)
    return groups


def _key_tiles(tile_map: TileMap, row: int) -> tuple[TileIndices, int]:
    """Key tiles of a query tile, FULL ones first, and their number.

    A short last key tile comes last.
    """
    span = slice(tile_map.offsets[row], tile_map.offsets[row + 1])
    indices, full = tile_map.indices[span], tile_map.full[span]
    if tile_map.kv_len % tile_map.kv_tile:
        # The short tile counts as PARTIAL, so that it comes last.
        full = full & (indices != tile_map.columns - 1)
    return np.concatenate([indices[full], indices[~full]]), int(full.sum())


# `auto` weighs it branch by branch (per_branch.py), for branches that `strided` refuses.
LOWERING = Batched("tiled", propose, automatic=False)
