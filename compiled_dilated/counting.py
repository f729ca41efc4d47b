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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .masks import And, Mask, Not, Or
from .masks.functions import FromMod, Traced
from .orders import Identity, Order
from .regions import EMPTY, FULL, PARTIAL, IntArray, Regions, Verdicts, both, either, negate
from .tiles import Flags, TileMap

# Rectangles of one size that may differ; more are not counted.
_MOST_DIFFERENT = 2**20
# Where all rectangles that are left hold few pairs, these are asked about at once.
_FEW_PAIRS = 2**14
# Asking about more pairs than this takes minutes.
_MOST_PAIRS = 2**28
_PAIRS_AT_ONCE = 2**17
# Rectangles of so many tokens are not halved further. A function is asked about every pair at each halving: it stops earlier.
_SMALLEST, _SMALLEST_OF_FUNCTION = 8, 256
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


def pairs(mask: Mask, q_len: int, kv_len: int, q_offset: int = 0) -> int | None:
    """Number of allowed pairs; None for masks that read data, or that have too many different rectangles.

    The queries stand at positions q_offset .. q_offset + q_len - 1, the keys at 0 .. kv_len - 1.
    """
    if mask.per_call:
        return None
    formula = mask.pairs(range(q_offset, q_offset + q_len), range(kv_len))
    if formula is not None:
        return formula
    expanded = mask.expanded()
    asks_function = any(isinstance(leaf, FromMod | Traced) for leaf in _leaves(expanded))
    smallest = _SMALLEST_OF_FUNCTION if asks_function else _SMALLEST
    left = _Rectangles.whole(q_len, kv_len, q_offset)
    total = 0
    while len(left):
        of = _leaf_verdicts(expanded, left)
        verdict: Verdicts = _evaluated(expanded, of)
        total += left[verdict == FULL].pairs
        counted, left = _merged(expanded, of, left, verdict == PARTIAL)
        total += counted
        if left.different_pairs <= _FEW_PAIRS or left.longest <= smallest or 4 * len(left) > _MOST_DIFFERENT:
            return None if left.different_pairs > _MOST_PAIRS else total + _asked(mask, left)
        left = left.split(_alignment(expanded, 1), 1)
    return total


def tiles(mask: Mask, q_len: int, kv_len: int, tile: int, order: Order, q_offset: int = 0) -> TileCounts | None:
    """Counts of the tiles that `TileMap.build` lists; None where too many of them differ."""
    if not isinstance(order, Identity):
        return _mapped_tiles(mask, q_len, kv_len, tile, order)
    expanded = mask.expanded()
    left = _Rectangles.whole(q_len, kv_len, q_offset)
    full, partial = 0, 0
    while len(left):
        verdict = mask.classify(*left.regions)
        full += left[verdict == FULL].tiles(tile)
        _, left = _merged(expanded, _leaf_verdicts(expanded, left), left, verdict == PARTIAL, by_formula=False)
        small = left.is_within(tile)
        partial += left[small].tiles(tile)
        left = left[~small]
        if 4 * len(left) > _MOST_DIFFERENT:
            return None
        left = left.split(_alignment(expanded, tile), tile)
    return TileCounts(full, partial, 8 * (-(-q_len // tile) + 1) + 5 * (full + partial))


def _mapped_tiles(mask: Mask, q_len: int, kv_len: int, tile: int, order: Order) -> TileCounts | None:
    if max(q_len, kv_len) > _MOST_MAPPED_TOKENS:
        return None
    tile_map = TileMap.build(mask, q_len, kv_len, q_tile=tile, kv_tile=tile, order=order)
    full = int(tile_map.full.sum())
    return TileCounts(full, len(tile_map.indices) - full, tile_map.nbytes)


@dataclass(frozen=True, eq=False)
class _Rectangles:
    """Pairs of queries q .. q + rows - 1 and keys kv .. kv + columns - 1; `times`: how many rectangles each stands for."""

    q: IntArray
    kv: IntArray
    rows: IntArray
    columns: IntArray
    times: Any  # of Python's integers: all pairs of a long sequence are more than an int64 holds

    @staticmethod
    def whole(q_len: int, kv_len: int, q_offset: int) -> _Rectangles:
        if not q_len or not kv_len:
            q_len = kv_len = 0
        q, kv, rows, columns = (np.array([value], dtype=np.int64) for value in (q_offset, 0, q_len, kv_len))
        rectangles = _Rectangles(q, kv, rows, columns, np.array([1], dtype=object))
        return rectangles if q_len else rectangles[:0]

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, which: IntArray | Flags | slice) -> _Rectangles:
        return _Rectangles(self.q[which], self.kv[which], self.rows[which], self.columns[which], self.times[which])

    @property
    def regions(self) -> tuple[Regions, Regions]:
        return Regions.contiguous(self.q, self.q + self.rows), Regions.contiguous(self.kv, self.kv + self.columns)

    @property
    def areas(self) -> Any:
        """Pairs of each, as Python's integers."""
        return self.rows.astype(object) * self.columns.astype(object)

    @property
    def pairs(self) -> int:
        """Pairs of all rectangles that these stand for."""
        return int((self.areas * self.times).sum())

    @property
    def different_pairs(self) -> int:
        """Pairs of these rectangles alone."""
        return int(self.areas.sum())

    @property
    def longest(self) -> int:
        """The longest side."""
        return int(max(self.rows.max(initial=0), self.columns.max(initial=0)))

    def tiles(self, tile: int) -> int:
        """Tiles of all rectangles that these stand for."""
        return int((-(-self.rows // tile) * -(-self.columns // tile) * self.times).sum())

    def is_within(self, tile: int) -> Flags:
        return np.asarray((self.rows <= tile) & (self.columns <= tile))

    def split(self, alignment: int, least: int) -> _Rectangles:
        """Cut sides in two, at a power of two times `alignment`, or times `least` where they are no longer than it."""
        by_rows = _cut(self.q, self.rows, self.columns, alignment, least)
        parts = [(rows, side) for rows in by_rows for side in _cut(self.kv, self.columns, self.rows, alignment, least)]
        pieces = [_Rectangles(q, kv, rows, columns, self.times) for (q, rows), (kv, columns) in parts]
        out = _concatenated(pieces)
        return out[(out.rows > 0) & (out.columns > 0)]


def _concatenated(parts: list[_Rectangles]) -> _Rectangles:
    return _Rectangles(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts), strict=True)))


def _cut(start: IntArray, length: IntArray, other: IntArray, alignment: int, least: int) -> list[tuple[IntArray, IntArray]]:
    """Two parts (start, length) of each side; the second is empty where the side is short, or shorter than half the other."""
    step = np.where(length > alignment, alignment, least)
    power = np.frexp(((length - 1) // step).clip(1).astype(np.float64))[1].astype(np.int64) - 1
    first = step << power
    first = np.where(first >= length, first >> 1, first)  # where a float rounded up
    first = np.where((length <= least) | (2 * length < other), length, first)
    return [(start, first), (start + first, length - first)]


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


def _leaf_verdicts(expanded: Mask, rectangles: _Rectangles) -> dict[Mask, Verdicts]:
    q, kv = rectangles.regions
    return {leaf: leaf.classify(q, kv) for leaf in _leaves(expanded)}


def _merged(
    expanded: Mask, of: Mapping[Mask, Verdicts], rectangles: _Rectangles, wanted: Flags, by_formula: bool = True
) -> tuple[int, _Rectangles]:
    """Undecided rectangles without repetitions: (pairs counted by a formula, rectangles left)."""
    table = np.stack(list(of.values()), axis=1)
    total, kept = 0, [rectangles[:0]]
    for signature in np.unique(table[wanted], axis=0):
        some = rectangles[wanted & (table == signature).all(axis=1)]
        verdict = dict(zip(of, signature, strict=True))
        undecided = _undecided(expanded, verdict)
        some = _representatives(some, undecided)
        counted = _by_formula(expanded, verdict, undecided, some) if by_formula else None
        if counted is None:
            kept.append(some)
        else:
            total += counted
    return total, _concatenated(kept)


def _undecided(mask: Mask, of: Mapping[Mask, Any]) -> list[Mask]:
    """The leaves that an undecided expression depends on."""
    if _evaluated(mask, of) != PARTIAL:
        return []
    if isinstance(mask, (And, Or, Not)):
        return list(dict.fromkeys(leaf for part in mask.parts for leaf in _undecided(part, of)))
    return [mask]


def _representatives(rectangles: _Rectangles, undecided: list[Mask]) -> _Rectangles:
    """One of all rectangles that a move maps onto each other which leaves the undecided leaves as they are."""
    joint = _common(leaf.period for leaf in undecided)
    q_alone = _common(leaf.side_periods[0] for leaf in undecided)
    kv_alone = _common(leaf.side_periods[1] for leaf in undecided)
    q, kv = rectangles.q, rectangles.kv
    if joint is not None:
        # Moving the key alone is moving the query alone, and then both back.
        alone = kv_alone if q_alone is None else q_alone if kv_alone is None else math.gcd(q_alone, kv_alone)
        moved = q // joint * joint
        q, kv = q - moved, kv - moved
        kv_alone = None if alone is None or alone % joint else alone
    elif q_alone is not None:
        q = q % q_alone
    if kv_alone is not None:
        kv = kv % kv_alone
    kinds = np.stack([q, kv, rectangles.rows, rectangles.columns], axis=1)
    _, first, which = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    times = np.zeros(len(first), dtype=object)
    np.add.at(times, which.reshape(-1), rectangles.times)
    return replace(rectangles[first], times=times)


def _common(periods: Any) -> int | None:
    """The least common multiple, None where one is None or it is longer than a sequence."""
    known = list(periods)
    if None in known:
        return None
    common = math.lcm(*known)
    return common if common <= _LONGEST_PERIOD else None


def _by_formula(mask: Mask, of: Mapping[Mask, Any], undecided: list[Mask], rectangles: _Rectangles) -> int | None:
    """Pairs of rectangles that one leaf decides, where it has a formula; None elsewhere."""
    if len(undecided) != 1:
        return None
    (leaf,) = undecided
    if_seen, if_hidden = (bool(_evaluated(mask, {**of, leaf: verdict}) == FULL) for verdict in (FULL, EMPTY))
    total = 0
    for q, kv, rows, columns, times in zip(*vars(rectangles).values(), strict=True):
        seen = leaf.pairs(range(int(q), int(q + rows)), range(int(kv), int(kv + columns)))
        if seen is None:
            return None
        hidden = int(rows) * int(columns) - seen
        total += times * (seen * if_seen + hidden * if_hidden)
    return total


def _asked(mask: Mask, rectangles: _Rectangles) -> int:
    """Pairs of rectangles, asked one by one; rectangles of one shape together."""
    total = 0
    shapes = np.stack([rectangles.rows, rectangles.columns], axis=1)
    distinct, which = np.unique(shapes, axis=0, return_inverse=True)
    for number, (rows, columns) in enumerate(distinct.tolist()):
        alike = rectangles[which.reshape(-1) == number]
        at_once = max(1, _PAIRS_AT_ONCE // (rows * columns))
        for start in range(0, len(alike), at_once):
            some = alike[start : start + at_once]
            total += int((_seen_pairs(mask, some, rows, columns) * some.times).sum())
    return total


def _seen_pairs(mask: Mask, rectangles: _Rectangles, rows: int, columns: int) -> Any:
    """Allowed pairs of each rectangle, as Python's integers."""
    q = torch.from_numpy(rectangles.q)[:, None, None] + torch.arange(rows)[None, :, None]
    kv = torch.from_numpy(rectangles.kv)[:, None, None] + torch.arange(columns)[None, None, :]
    zero = torch.zeros((), dtype=torch.int64)
    seen = torch.as_tensor(mask.allows(zero, zero, q, kv)).broadcast_to(len(rectangles), rows, columns)
    return seen.sum(dim=(1, 2)).numpy().astype(object)
