"""Exact numbers of allowed pairs and of tiles, without a list of the tiles.

Rectangles of pairs are halved until the mask decides them, a formula counts them, or they are small enough to ask about every
pair. A mask looks the same after certain moves, so of rectangles that such a move maps onto each other one is kept, and how
many it stands for. Work then grows with the logarithm of the length.

    causal(), 8 tokens            # FULL, counted at once; . EMPTY
    1 . . .   4 x 2 . .           1: four rectangles on the diagonal, one kept, times 4
    # 1 . .                       the next halving keeps one of its 4 x 2 quarters
    # # 1 .
    # # # 1
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .masks import And, Mask, Not, Or, conjunction, conjuncts
from .masks.asked import Asked
from .masks.data import DocumentLengths
from .masks.explicit import splitmix64
from .masks.functions import FromMod, Traced
from .orders import Identity, Order
from .rectangles import Rectangles, concatenated
from .regions import EMPTY, FULL, PARTIAL, IntArray, Verdicts, both, either, negate
from .tiles import Flags, TileMap

# Rectangles of one size that may differ; more are not counted.
_MOST_DIFFERENT = 2**20
_MOST_DIFFERENT_OF_CELLS = 2**18
# Where all rectangles that are left hold few pairs, these are asked about at once.
_FEW_PAIRS = 2**14
# Asking about more pairs than this takes minutes; of a raster's cells it has to take less,
# and past that some are drawn at random.
_MOST_PAIRS = 2**28
_MOST_PAIRS_OF_CELLS = 2**24
_MOST_DRAWN = 2**22
_MOST_PAIRS_OF_TILES = 2**26
# Few enough for one thread: many short parallel regions are slow beside other work.
_PAIRS_AT_ONCE = 2**15
# Where pairs of a rectangle are drawn, at least so many are.
_LEAST_DRAWN = 16
# Rectangles of so many tokens are not halved further.
_SMALLEST = 8
# Periods past this are longer than any sequence that can be counted.
_LONGEST_PERIOD = 2**60
# An order other than the identity is counted by its map, up to so many tokens.
_MOST_MAPPED_TOKENS = 2**22


@dataclass(frozen=True, eq=False)
class TileCounts:
    """Number of FULL and of PARTIAL tiles of a mask, and the bytes of the `TileMap` that would list them."""

    full: int
    partial: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Allowed pairs of each cell of a raster.

    pairs: (rows, columns), Python's integers; floats where some are estimated.
    exact: False where too many pairs had to be asked about, so that those of some cells are estimated from a sample.
    """

    pairs: Any
    exact: bool


def pairs(mask: Mask, q_len: int, kv_len: int, q_offset: int = 0) -> int | None:
    """Number of allowed pairs; None for masks that read data, or that have too many different rectangles.

    The queries stand at positions q_offset .. q_offset + q_len - 1, the keys at 0 .. kv_len - 1.
    """
    if mask.per_call:
        return None
    formula = mask.pairs(range(q_offset, q_offset + q_len), range(kv_len))
    if formula is not None:
        return formula
    by_document = _pairs_by_document(mask, q_len, kv_len, q_offset)
    if by_document is not None:
        return by_document
    expanded = _expanded(mask)
    totals, left = _decided(expanded, Rectangles.whole(q_len, kv_len, q_offset), 1)
    if left.different_pairs > _MOST_PAIRS:
        return None
    _ask(expanded, left, totals)
    return int(totals[0])


def _pairs_by_document(mask: Mask, q_len: int, kv_len: int, q_offset: int) -> int | None:
    """Pairs of documents whose other masks look the same in each, documents of one length counted once; None elsewhere."""
    parts = conjuncts(mask)
    documents = [part for part in parts if isinstance(part, DocumentLengths)]
    rest = conjunction(tuple(part for part in parts if not isinstance(part, DocumentLengths)))
    if len(documents) != 1 or rest.period != 1:
        return None
    # Of each document the queries and the keys that there are, and how far its first query is from its first key.
    starts, stops = documents[0].starts, documents[0].stops
    first, last = np.maximum(starts, q_offset), np.minimum(stops, q_offset + q_len)
    shapes = np.stack([last - first, np.minimum(stops, kv_len) - starts, first - starts], axis=1)
    shapes = shapes[(shapes[:, 0] > 0) & (shapes[:, 1] > 0)]
    total = 0
    for (queries, keys, offset), times in zip(
        *(x.tolist() for x in np.unique(shapes, axis=0, return_counts=True)), strict=True
    ):
        of_one = pairs(rest, queries, keys, offset)
        if of_one is None:
            return None
        total += of_one * times
    return total


def cells(mask: Mask, q_cuts: IntArray, kv_cuts: IntArray) -> CellCounts:
    """Allowed pairs of every cell of a raster of positions; the cuts ascend, the first and the last border included.

    Cells that a move maps onto each other are counted once.
    """
    expanded, raster = _expanded(mask), Rectangles.cells(q_cuts, kv_cuts)
    counts = np.zeros(len(raster), dtype=object)
    of = _leaf_verdicts(expanded, raster)
    verdict: Verdicts = _evaluated(expanded, of)
    counts[verdict == FULL] = raster[verdict == FULL].areas
    exact = True
    for some, signature in _by_signature(of, raster, verdict == PARTIAL):
        first, which, _ = _alike(some, _undecided(expanded, signature))
        distinct = replace(
            some[first], owner=np.arange(len(first)), times=np.ones(len(first), dtype=object)
        )
        totals, left = _decided(expanded, distinct, len(first), _MOST_DIFFERENT_OF_CELLS)
        if left.different_pairs <= _MOST_PAIRS_OF_CELLS:
            _ask(expanded, left, totals)
        else:
            exact = False
            totals += _estimated(expanded, left, len(first))
        counts[some.owner] = totals[which]
    return CellCounts(counts.reshape(len(q_cuts) - 1, len(kv_cuts) - 1), exact)


def _decided(
    expanded: Mask, left: Rectangles, owners: int, most: int = _MOST_DIFFERENT
) -> tuple[Any, Rectangles]:
    """Pairs of each owner that classification and formulas count, and rectangles whose pairs have to be asked about."""
    totals = np.zeros(owners, dtype=object)
    while len(left):
        of = _leaf_verdicts(expanded, left)
        verdict: Verdicts = _evaluated(expanded, of)
        full = left[verdict == FULL]
        np.add.at(totals, full.owner, full.pairs)
        left = _merged(expanded, of, left, verdict == PARTIAL, totals)
        if left.different_pairs <= _FEW_PAIRS or left.longest <= _SMALLEST or 4 * len(left) > most:
            break
        left = left.split(_alignment(expanded, 1), 1)
    return totals, left


def _expanded(mask: Mask) -> Mask:
    """The mask as an expression of masks with more symmetries, functions as masks that only `_ask` evaluates."""
    if isinstance(mask, Asked):
        return mask
    if isinstance(mask, FromMod | Traced):
        return Asked(mask, mask.within)
    if isinstance(mask, And | Or | Not):
        return mask._map(_expanded)
    return mask.expanded()


def tiles(
    mask: Mask, q_len: int, kv_len: int, tile: int, order: Order, q_offset: int = 0
) -> TileCounts | None:
    """Counts of the tiles that `TileMap.build` lists; None where too many of them differ."""
    if not isinstance(order, Identity):
        return _mapped_tiles(mask, q_len, kv_len, tile, order)
    if any(isinstance(leaf, FromMod | Traced) for leaf in _leaves(mask)):
        # A function is asked about every pair of its tiles: first how many these are.
        asked = tiles(_expanded(mask), q_len, kv_len, tile, order, q_offset)
        if asked is None or (asked.full + asked.partial) * tile**2 > _MOST_PAIRS_OF_TILES:
            return None
    expanded = mask.expanded()
    left = Rectangles.whole(q_len, kv_len, q_offset)
    full, partial = 0, 0
    while len(left):
        verdict = mask.classify(*left.regions)
        full += left[verdict == FULL].tiles(tile)
        left = _merged(expanded, _leaf_verdicts(expanded, left), left, verdict == PARTIAL)
        small = left.is_within(tile)
        partial += left[small].tiles(tile)
        left = left[~small]
        if 4 * len(left) > _MOST_DIFFERENT:
            return None
        left = left.split(_alignment(expanded, tile), tile)
    return TileCounts(full, partial, 8 * (-(-q_len // tile) + 1) + 5 * (full + partial))


def _mapped_tiles(
    mask: Mask, q_len: int, kv_len: int, tile: int, order: Order
) -> TileCounts | None:
    if max(q_len, kv_len) > _MOST_MAPPED_TOKENS:
        return None
    tile_map = TileMap.build(mask, q_len, kv_len, q_tile=tile, kv_tile=tile, order=order)
    full = int(tile_map.full.sum())
    return TileCounts(full, len(tile_map.indices) - full, tile_map.nbytes)


def _alignment(mask: Mask, tile: int) -> int:
    """The multiple of `tile` tokens by which parts of a sequence are alike, as far as that is known."""
    periods = [leaf.period for leaf in _leaves(mask)]
    alignment = math.lcm(tile, *(period for period in periods if period is not None))
    return alignment if alignment <= _LONGEST_PERIOD else tile


def _leaves(mask: Mask) -> list[Mask]:
    """The masks that an expression joins, each once."""
    if isinstance(mask, (And, Or, Not)):
        return list(dict.fromkeys(leaf for part in mask.parts for leaf in _leaves(part)))
    return [mask]


def _evaluated(mask: Mask, of: Mapping[Mask, Any]) -> Any:
    """The verdict of an expression, or many of them, from those of its leaves."""
    if isinstance(mask, Not):
        return negate(_evaluated(mask.mask, of))
    if not isinstance(mask, (And, Or)):
        return of[mask]
    join = both if isinstance(mask, And) else either
    out = _evaluated(mask.masks[0], of)
    for part in mask.masks[1:]:
        out = join(out, _evaluated(part, of))
    return out


def _leaf_verdicts(expanded: Mask, rectangles: Rectangles) -> dict[Mask, Verdicts]:
    q, kv = rectangles.regions
    return {leaf: leaf.classify(q, kv) for leaf in _leaves(expanded)}


def _by_signature(
    of: Mapping[Mask, Verdicts], rectangles: Rectangles, wanted: Flags
) -> Iterator[tuple[Rectangles, dict[Mask, Any]]]:
    """Those rectangles of which all leaves say the same, and what they say."""
    table = np.stack(list(of.values()), axis=1)
    for signature in np.unique(table[wanted], axis=0):
        yield (
            rectangles[wanted & (table == signature).all(axis=1)],
            dict(zip(of, signature, strict=True)),
        )


def _merged(
    expanded: Mask,
    of: Mapping[Mask, Verdicts],
    rectangles: Rectangles,
    wanted: Flags,
    totals: Any = None,
) -> Rectangles:
    """Undecided rectangles without repetitions.

    totals: pairs of each owner; pairs that a formula counts are added to it, and their rectangles left out.
    """
    left = [rectangles[:0]]
    for some, verdict in _by_signature(of, rectangles, wanted):
        undecided = _undecided(expanded, verdict)
        first, _, times = _alike(some, undecided)
        distinct = replace(some[first], times=times)
        if totals is None or not _count_by_formula(expanded, verdict, undecided, distinct, totals):
            left.append(distinct)
    return concatenated(left)


def _undecided(mask: Mask, of: Mapping[Mask, Any]) -> list[Mask]:
    """The leaves that an undecided expression depends on."""
    if _evaluated(mask, of) != PARTIAL:
        return []
    if isinstance(mask, (And, Or, Not)):
        return list(dict.fromkeys(leaf for part in mask.parts for leaf in _undecided(part, of)))
    return [mask]


def _alike(rectangles: Rectangles, undecided: list[Mask]) -> tuple[IntArray, IntArray, Any]:
    """Rectangles of one owner that a move maps onto each other which leaves the undecided leaves as they are.

    Returns the number of one of each kind, the kind of each rectangle, and how many rectangles a kind stands for. Owners that
    are single rectangles of a raster, cells, are no part of the kind.
    """
    q, kv = _moved(rectangles, undecided)
    kinds = np.stack([q, kv, rectangles.rows, rectangles.columns, rectangles.owner], axis=1)
    _, first, which = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    times = np.zeros(len(first), dtype=object)
    np.add.at(times, which, rectangles.times)
    return first, which, times


def _moved(rectangles: Rectangles, undecided: list[Mask]) -> tuple[IntArray, IntArray]:
    """Where rectangles start after the move to the least positions that leaves the undecided leaves as they are."""
    joint = _common(leaf.period for leaf in undecided)
    q_alone = _common(leaf.side_periods[0] for leaf in undecided)
    kv_alone = _common(leaf.side_periods[1] for leaf in undecided)
    q, kv = rectangles.q, rectangles.kv
    if joint is not None:
        # Moving the key alone is moving the query alone, and then both back.
        alone = (
            kv_alone
            if q_alone is None
            else q_alone
            if kv_alone is None
            else math.gcd(q_alone, kv_alone)
        )
        moved = q // joint * joint
        q, kv = q - moved, kv - moved
        kv_alone = None if alone is None or alone % joint else alone
    elif q_alone is not None:
        q = q % q_alone
    return q, kv if kv_alone is None else kv % kv_alone


def _common(periods: Any) -> int | None:
    """The least common multiple, None where one is None or it is longer than a sequence."""
    known = list(periods)
    if None in known:
        return None
    common = math.lcm(*known)
    return common if common <= _LONGEST_PERIOD else None


def _count_by_formula(
    mask: Mask, of: Mapping[Mask, Any], undecided: list[Mask], rectangles: Rectangles, totals: Any
) -> bool:
    """Add the pairs of rectangles that one leaf decides to their owners' totals; False where it has no formula."""
    # A formula is asked rectangle by rectangle: of small ones their pairs are asked sooner, all at once.
    if len(undecided) != 1 or rectangles.different_pairs <= _SMALLEST**2 * len(rectangles):
        return False
    (leaf,) = undecided
    if_seen, if_hidden = (
        bool(_evaluated(mask, {**of, leaf: verdict}) == FULL) for verdict in (FULL, EMPTY)
    )
    counts = np.zeros(len(rectangles), dtype=object)
    for number, (q, kv, rows, columns) in enumerate(
        zip(
            *(
                side.tolist()
                for side in (rectangles.q, rectangles.kv, rectangles.rows, rectangles.columns)
            ),
            strict=True,
        )
    ):
        seen = leaf.pairs(range(q, q + rows), range(kv, kv + columns))
        if seen is None:
            return False
        counts[number] = seen * if_seen + (rows * columns - seen) * if_hidden
    np.add.at(totals, rectangles.owner, counts * rectangles.times)
    return True


def _ask(mask: Mask, rectangles: Rectangles, totals: Any) -> None:
    """Add the pairs of rectangles to their owners' totals, asked one by one; rectangles of one shape together."""
    mask = mask.on("cpu")  # its tables as tensors once, not at each chunk
    shapes = np.stack([rectangles.rows, rectangles.columns], axis=1)
    distinct, which = np.unique(shapes, axis=0, return_inverse=True)
    for number, (rows, columns) in enumerate(distinct.tolist()):
        alike = rectangles[which.reshape(-1) == number]
        at_once = max(1, _PAIRS_AT_ONCE // (rows * columns))
        for start in range(0, len(alike), at_once):
            some = alike[start : start + at_once]
            q = some.q[:, None, None] + np.arange(rows)[None, :, None]
            kv = some.kv[:, None, None] + np.arange(columns)[None, None, :]
            seen = _seen(mask, q, kv).reshape(len(some), rows * columns)
            np.add.at(totals, some.owner, seen.sum(axis=1).astype(object) * some.times)


def _estimated(mask: Mask, rectangles: Rectangles, owners: int) -> Any:
    """Pairs of each owner by a sample of the pairs of each rectangle, the same at every call."""
    mask = mask.on("cpu")
    drawn = max(_LEAST_DRAWN, _MOST_DRAWN // len(rectangles))
    totals = np.zeros(owners, dtype=np.float64)
    draws = np.arange(drawn, dtype=np.uint64)
    at_once = max(1, _PAIRS_AT_ONCE // drawn)
    for start in range(0, len(rectangles), at_once):
        some = rectangles[start : start + at_once]
        row = np.arange(start, start + len(some), dtype=np.uint64)[:, None]
        random = splitmix64(splitmix64(row) ^ draws)
        # The two halves of a number are independent: one draws the query, the other the key.
        q = some.q[:, None] + (
            (random >> np.uint64(32)) % some.rows[:, None].astype(np.uint64)
        ).astype(np.int64)
        low = random & np.uint64(0xFFFFFFFF)
        kv = some.kv[:, None] + (low % some.columns[:, None].astype(np.uint64)).astype(np.int64)
        share = _seen(mask, q, kv).mean(axis=1)
        np.add.at(totals, some.owner, share * some.pairs.astype(np.float64))
    return totals


def _seen(mask: Mask, q: IntArray, kv: IntArray) -> Flags:
    """Whether pairs of positions that broadcast are allowed, of batch entry and head 0."""
    zero = torch.zeros((), dtype=torch.int64)
    seen = torch.as_tensor(mask.allows(zero, zero, torch.from_numpy(q), torch.from_numpy(kv)))
    allowed: Flags = seen.broadcast_to(np.broadcast_shapes(q.shape, kv.shape)).numpy()
    return allowed
