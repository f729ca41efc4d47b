"""Counts of allowed pairs, of pairs per cell, and of tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..masks import And, Mask, Not, Or, conjunction, conjuncts
from ..masks.data import DocumentLengths
from ..masks.functions import FromMod
from ..masks.traced import Traced
from ..masks.unclassified import Unclassified
from ..orders import Identity, Order
from ..rectangles import Rectangles
from ..regions import FULL, PARTIAL, IntArray, Verdicts
from ..tiles import TileMap
from .pairwise import add_estimates, add_pairs
from .symmetries import (
    alignment,
    by_signature,
    duplicates,
    evaluated,
    leaf_verdicts,
    leaves,
    merged,
    undecided_leaves,
)

# The limit of different rectangles of one size; masks with more are not counted.
_MOST_DIFFERENT = 2**20
_MOST_DIFFERENT_OF_CELLS = 2**18
# If all rectangles together have at most this many pairs, the mask is evaluated at all of them.
_FEW_PAIRS = 2**14
# Evaluating the mask at more pairs than this takes minutes. For a raster's cells it must take less:
# beyond the limit a sample of pairs is evaluated.
_MOST_PAIRS = 2**28
_MOST_PAIRS_OF_CELLS = 2**24
_MOST_PAIRS_OF_TILES = 2**26
# Tokens per side at which rectangles are not halved further.
_SMALLEST = 8
# Tokens up to which an order other than the identity is counted, by its map.
_MOST_MAPPED_TOKENS = 2**22


@dataclass(frozen=True, eq=False)
class TileCounts:
    """Numbers of FULL and PARTIAL tiles, and bytes of their `TileMap`."""

    full: int
    partial: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Allowed pairs of each cell of a raster.

    pairs: (rows, columns), Python integers; floats where estimated.
    exact: False if some cells are estimated from a sample of their pairs.
    """

    pairs: Any
    exact: bool


def pairs(mask: Mask, q_len: int, kv_len: int, q_offset: int = 0) -> int | None:
    """Number of allowed pairs; None if they cannot be counted.

    Queries are at positions q_offset .. q_offset + q_len - 1, keys at 0 .. kv_len - 1. Masks that
    read data, and too many different rectangles, cannot be counted.
    """
    if mask.per_call:
        return None
    # 1. A formula for the mask, or for its documents.
    count = mask.pairs(range(q_offset, q_offset + q_len), range(kv_len))
    if count is None:
        count = _pairs_by_document(mask, q_len, kv_len, q_offset)
    if count is not None:
        return count
    # 2. Halving; the mask is evaluated at the pairs that remain.
    expanded = _expanded(mask)
    totals, remaining = _decided(expanded, Rectangles.whole(q_len, kv_len, q_offset), 1)
    if remaining.different_pairs > _MOST_PAIRS:
        return None
    add_pairs(expanded, remaining, totals)
    return int(totals[0])


def _pairs_by_document(mask: Mask, q_len: int, kv_len: int, q_offset: int) -> int | None:
    """Pairs summed over documents, those of one length counted once.

    None unless the mask has documents by lengths, and its other parts are the same in each.
    """
    parts = conjuncts(mask)
    documents = [part for part in parts if isinstance(part, DocumentLengths)]
    within = conjunction(tuple(part for part in parts if not isinstance(part, DocumentLengths)))
    if len(documents) != 1 or within.period != 1:
        return None
    # Per document: its queries, its keys, and the distance from its first key to its first query.
    starts, stops = documents[0].starts, documents[0].stops
    first, last = np.maximum(starts, q_offset), np.minimum(stops, q_offset + q_len)
    shapes = np.stack([last - first, np.minimum(stops, kv_len) - starts, first - starts], axis=1)
    shapes = shapes[(shapes[:, 0] > 0) & (shapes[:, 1] > 0)]
    distinct, multiplicities = np.unique(shapes, axis=0, return_counts=True)
    total = 0
    for shape, times in zip(distinct.tolist(), multiplicities.tolist(), strict=True):
        count = pairs(within, *shape)
        if count is None:
            return None
        total += count * times
    return total


def cells(mask: Mask, q_cuts: IntArray, kv_cuts: IntArray) -> CellCounts:
    """Allowed pairs of every cell of a raster of positions.

    Cells that are translations of each other are counted once.

    q_cuts, kv_cuts: ascending borders of the cells, the first and the last included.
    """
    # 1. Cells that the mask decides.
    expanded, raster = _expanded(mask), Rectangles.cells(q_cuts, kv_cuts)
    counts = np.zeros(len(raster), dtype=object)
    verdicts = leaf_verdicts(expanded, raster)
    verdict: Verdicts = evaluated(expanded, verdicts)
    counts[verdict == FULL] = raster[verdict == FULL].areas
    # 2. The others, one of each kind.
    exact = True
    for group, signature in by_signature(verdicts, raster, verdict == PARTIAL):
        first, kind, _ = duplicates(group, undecided_leaves(expanded, signature))
        kinds = len(first)
        times = np.ones(kinds, dtype=object)
        distinct = replace(group[first], owner=np.arange(kinds), times=times)
        totals, remaining = _decided(expanded, distinct, kinds, _MOST_DIFFERENT_OF_CELLS)
        if remaining.different_pairs <= _MOST_PAIRS_OF_CELLS:
            add_pairs(expanded, remaining, totals)
        else:
            exact = False
            totals = add_estimates(expanded, remaining, totals)
        counts[group.owner] = totals[kind]
    return CellCounts(counts.reshape(len(q_cuts) - 1, len(kv_cuts) - 1), exact)


def _decided(
    expanded: Mask, remaining: Rectangles, owners: int, most: int = _MOST_DIFFERENT
) -> tuple[Any, Rectangles]:
    """Pairs counted by verdicts and formulas, and the uncounted rectangles.

    owners: number of owners; their pairs are returned as (owners,) Python integers.
    most: limit of different rectangles.
    """
    totals = np.zeros(owners, dtype=object)
    while len(remaining):
        # FULL rectangles are counted, EMPTY ones dropped.
        verdicts = leaf_verdicts(expanded, remaining)
        verdict: Verdicts = evaluated(expanded, verdicts)
        full = remaining[verdict == FULL]
        np.add.at(totals, full.owner, full.pairs)
        # PARTIAL ones are counted by a formula, or merged with their translations and halved.
        remaining = merged(expanded, verdicts, remaining, verdict == PARTIAL, totals)
        is_small = remaining.different_pairs <= _FEW_PAIRS or remaining.longest <= _SMALLEST
        if is_small or 4 * len(remaining) > most:
            break
        remaining = remaining.split(alignment(expanded, 1), 1)
    return totals, remaining


def _expanded(mask: Mask) -> Mask:
    """The mask as an expression of masks with more symmetries.

    Functions become masks that only `add_pairs` and `add_estimates` evaluate.
    """
    if isinstance(mask, Unclassified):
        return mask
    if isinstance(mask, FromMod | Traced):
        return Unclassified(mask, mask.within)
    if isinstance(mask, And | Or | Not):
        return mask._map(_expanded)
    return mask.expanded()


def tiles(
    mask: Mask, q_len: int, kv_len: int, tile: int, order: Order, q_offset: int = 0
) -> TileCounts | None:
    """Counts of the tiles that `TileMap.build` lists.

    None if too many of them differ.
    """
    if not isinstance(order, Identity):
        return _mapped_tiles(mask, q_len, kv_len, tile, order)
    if any(isinstance(leaf, FromMod | Traced) for leaf in leaves(mask)):
        # A function is evaluated at every pair of its tiles: count the pairs first.
        bound = tiles(_expanded(mask), q_len, kv_len, tile, order, q_offset)
        if bound is None or (bound.full + bound.partial) * tile**2 > _MOST_PAIRS_OF_TILES:
            return None
    expanded = mask.expanded()
    remaining = Rectangles.whole(q_len, kv_len, q_offset)
    full, partial = 0, 0
    while len(remaining):
        verdict = mask.classify(*remaining.regions)
        full += remaining[verdict == FULL].tiles(tile)
        verdicts = leaf_verdicts(expanded, remaining)
        remaining = merged(expanded, verdicts, remaining, verdict == PARTIAL)
        # Undecided rectangles within one tile are PARTIAL tiles.
        small = remaining.is_within(tile)
        partial += remaining[small].tiles(tile)
        remaining = remaining[~small]
        if 4 * len(remaining) > _MOST_DIFFERENT:
            return None
        remaining = remaining.split(alignment(expanded, tile), tile)
    # Offsets are int64; a tile is an int32 and a flag.
    nbytes = 8 * (-(-q_len // tile) + 1) + 5 * (full + partial)
    return TileCounts(full, partial, nbytes)


def _mapped_tiles(
    mask: Mask, q_len: int, kv_len: int, tile: int, order: Order
) -> TileCounts | None:
    """Counts of an order's map; None for too many tokens."""
    if max(q_len, kv_len) > _MOST_MAPPED_TOKENS:
        return None
    tile_map = TileMap.build(mask, q_len, kv_len, q_tile=tile, kv_tile=tile, order=order)
    full = int(tile_map.full.sum())
    return TileCounts(full, len(tile_map.indices) - full, tile_map.nbytes)
