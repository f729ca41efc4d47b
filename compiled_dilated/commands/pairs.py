"""How many pairs a program allows, exactly, without looking at each of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from ..masks import Mask, conjuncts
from ..masks.positions import Congruent
from ..orders import Order, identity, residue
from ..programs import Program
from ..regions import IntArray
from ..tiles import TileMap

_TILE = 128
_PAIRS_AT_ONCE = 2**22


def allowed(program: Program, tokens: int, heads: int) -> int:
    """Pairs over all heads and branches, a pair that two branches allow counted twice; `tokens` queries and keys.

    Raises ValueError for masks that read data, which a count would depend on.
    """
    if program.names:
        raise ValueError(f"{program!r} reads the data tensors {list(program.names)}; its pairs depend on what a call passes")
    program.check(tokens, tokens)
    total = 0
    for branch in program.branches:
        masks = Counter(branch.mask_at(head, heads) for head in branch.head_range(heads))
        total += sum(count * of_mask(mask, tokens, branch.order) for mask, count in masks.items())
    return total


def of_mask(mask: Mask, tokens: int, order: Order = identity()) -> int:
    """Pairs that a mask of one head allows."""
    order = _tiling(mask, order)
    tiles = TileMap.build(mask, tokens, tokens, q_tile=_TILE, kv_tile=_TILE, order=order)
    sizes = np.full(tiles.rows, _TILE)
    if tokens % _TILE:
        sizes[-1] = tokens % _TILE
    rows, columns = tiles.row_of, tiles.indices
    whole = int((sizes[rows[tiles.full]] * sizes[columns[tiles.full]]).sum())
    return whole + _count(mask, tokens, order, rows[~tiles.full].astype(np.int64), columns[~tiles.full].astype(np.int64))


def _tiling(mask: Mask, order: Order) -> Order:
    """An order in which most tiles are whole or empty, so that few pairs need be looked at."""
    dilated = next((part for part in conjuncts(mask) if isinstance(part, Congruent)), None)
    return order if dilated is None or order != identity() else residue(dilated.modulus, dilated.within)


def _count(mask: Mask, tokens: int, order: Order, rows: IntArray, columns: IntArray) -> int:
    """Allowed pairs in some tiles, asked pair by pair; tiles that a shift by the mask's period makes equal are asked once."""
    inside = np.maximum(rows, columns) < tokens // _TILE  # the last tile may be short
    times = np.ones(len(rows), dtype=np.int64)
    if mask.period is not None and order == identity():
        kinds = np.stack([np.where(inside, rows * _TILE % mask.period, rows), columns - rows, inside.astype(np.int64)])
        _, first, times = np.unique(kinds, axis=1, return_index=True, return_counts=True)
        rows, columns = rows[first], columns[first]
    permutation = order.permutation(tokens)
    position = torch.arange(tokens) if permutation is None else torch.from_numpy(permutation.astype(np.int64))
    within, total, zero = torch.arange(_TILE), 0, torch.zeros((), dtype=torch.int64)
    for chunk in np.array_split(np.arange(len(rows)), max(1, -(-len(rows) * _TILE**2 // _PAIRS_AT_ONCE))):
        q, kv = (torch.from_numpy(side[chunk])[:, None] * _TILE + within for side in (rows, columns))
        q_at, kv_at = (position[places.clamp(max=tokens - 1)] for places in (q, kv))
        seen = mask.allows(zero, zero, q_at[:, :, None], kv_at[:, None, :])
        seen = seen & (q < tokens)[:, :, None] & (kv < tokens)[:, None, :]
        total += int((seen.sum(dim=(1, 2)) * torch.from_numpy(times[chunk])).sum())
    return total
