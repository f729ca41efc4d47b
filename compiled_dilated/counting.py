"""Exact counts of allowed pairs and of tiles, without a list of the tiles.

Rectangles of pairs are halved until the mask decides them, a formula counts them, or they are small
enough to evaluate. Masks are periodic: rectangles that a shift by a period maps onto each other are
counted once and multiplied. Work grows with the logarithm of the length.

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

# Distinct rectangles; a mask with more is not counted.
_MOST_DIFFERENT = 2**20
# Remaining rectangles with at most this many pairs in total are evaluated.
_FEW_PAIRS = 2**14
# Evaluating more pairs than this takes minutes.
_MOST_PAIRS = 2**28
_PAIRS_AT_ONCE = 2**17
# Rectangles of this many tokens are not halved further. A function is evaluated at every halving,
# so that it stops earlier.
_SMALLEST, _SMALLEST_OF_FUNCTION = 8, 256
# Periods past this are longer than any sequence that can be counted.
_LONGEST_PERIOD = 2**60
# Other orders than the identity are counted from their `TileMap`, up to this many tokens.
_MOST_MAPPED_TOKENS = 2**22


@dataclass(frozen=True, eq=False)
class TileCounts:
    """Numbers of FULL and PARTIAL tiles, and bytes of the `TileMap` of these tiles."""

    full: int
    partial: int
    nbytes: int


def pairs(mask: Mask, q_len: int, kv_len: int, q_offset: int = 0) -> int | None:
    """Number of allowed pairs.

    None for masks that read data, or with too many different rectangles.

    q_len: queries, at positions q_offset .. q_offset + q_len - 1.
    kv_len: keys, at positions 0 .. kv_len - 1.
    """
    if mask.per_call:
        return None
    formula = mask.pairs(range(q_offset, q_offset + q_len), range(kv_len))
    if formula is not None:
        return formula
    expanded = mask.expanded()
    has_function = any(isinstance(leaf, FromMod | Traced) for leaf in _leaves(expanded))
    smallest = _SMALLEST_OF_FUNCTION if has_function else _SMALLEST
    # Invariant: `total` counts the pairs of all rectangles that are no longer in `remaining`.
    remaining = _Rectangles.whole(q_len, kv_len, q_offset)
    total = 0
    while len(remaining):
        verdicts_of = _leaf_verdicts(expanded, remaining)
        verdict: Verdicts = _evaluated(expanded, verdicts_of)
        total += remaining[verdict == FULL].pairs
        counted, remaining = _merged(expanded, verdicts_of, remaining, verdict == PARTIAL)
        total += counted
        if remaining.different_pairs <= _FEW_PAIRS or remaining.longest <= smallest or 4 * len(remaining) > _MOST_DIFFERENT:
            if remaining.different_pairs > _MOST_PAIRS:
                return None
            return total + _evaluated_pairs(mask, remaining)
        remaining = remaining.split(_alignment(expanded, 1), 1)
    return total


def tiles(
    mask: Mask,
    q_len: int,
    kv_len: int,
    tile: int,
    order: Order,
    q_offset: int = 0,
) -> TileCounts | None:
    """Counts of the tiles that `TileMap.build` lists; None if too many differ."""
    if not isinstance(order, Identity):
        return _mapped_tiles(mask, q_len, kv_len, tile, order)
    expanded = mask.expanded()
    remaining = _Rectangles.whole(q_len, kv_len, q_offset)
    full, partial = 0, 0
    while len(remaining):
        verdict = mask.classify(*remaining.regions)
        full += remaining[verdict == FULL].tiles(tile)
        _, remaining = _merged(
            expanded,
            _leaf_verdicts(expanded, remaining),
            remaining,
            verdict == PARTIAL,
            by_formula=False,
        )
        small = remaining.is_within(tile)
        partial += remaining[small].tiles(tile)
        remaining = remaining[~small]
        if 4 * len(remaining) > _MOST_DIFFERENT:
            return None
        remaining = remaining.split(_alignment(expanded, tile), tile)
    return TileCounts(full, partial, 8 * (-(-q_len // tile) + 1) + 5 * (full + partial))


def _mapped_tiles(
    mask: Mask,
    q_len: int,
    kv_len: int,
    tile: int,
    order: Order,
) -> TileCounts | None:
    if max(q_len, kv_len) > _MOST_MAPPED_TOKENS:
        return None
    tile_map = TileMap.build(mask, q_len, kv_len, q_tile=tile, kv_tile=tile, order=order)
    full = int(tile_map.full.sum())
    return TileCounts(full, len(tile_map.indices) - full, tile_map.nbytes)


@dataclass(frozen=True, eq=False)
class _Rectangles:
    """Rectangles of pairs: queries q .. q + rows - 1, keys kv .. kv + columns - 1.

    times: multiplicity of each rectangle.
    """

    q: IntArray
    kv: IntArray
    rows: IntArray
    columns: IntArray
    times: Any  # object array of Python integers: pairs of a long sequence overflow int64

    @staticmethod
    def whole(q_len: int, kv_len: int, q_offset: int) -> _Rectangles:
        if not q_len or not kv_len:
            q_len = kv_len = 0
        q, kv, rows, columns = (np.array([value], dtype=np.int64) for value in (q_offset, 0, q_len, kv_len))
        rectangles = _Rectangles(q, kv, rows, columns, np.array([1], dtype=object))
        if q_len:
            return rectangles
        return rectangles[:0]

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, which: IntArray | Flags | slice) -> _Rectangles:
        return _Rectangles(
            self.q[which],
            self.kv[which],
            self.rows[which],
            self.columns[which],
            self.times[which],
        )

    @property
    def regions(self) -> tuple[Regions, Regions]:
        return Regions.contiguous(self.q, self.q + self.rows), Regions.contiguous(self.kv, self.kv + self.columns)

    @property
    def areas(self) -> Any:
        """Pairs per rectangle, as Python integers."""
        return self.rows.astype(object) * self.columns.astype(object)

    @property
    def pairs(self) -> int:
        """Number of pairs, with multiplicity."""
        return int((self.areas * self.times).sum())

    @property
    def different_pairs(self) -> int:
        """Number of pairs, without multiplicity."""
        return int(self.areas.sum())

    @property
    def longest(self) -> int:
        """The longest side."""
        return int(max(self.rows.max(initial=0), self.columns.max(initial=0)))

    def tiles(self, tile: int) -> int:
        """Number of tiles, with multiplicity."""
        return int((-(-self.rows // tile) * -(-self.columns // tile) * self.times).sum())

    def is_within(self, tile: int) -> Flags:
        return np.asarray((self.rows <= tile) & (self.columns <= tile))

    def split(self, alignment: int, least: int) -> _Rectangles:
        """Halve the sides of each rectangle.

        Cuts are at a power of two times `alignment`, or times `least` for sides up to `alignment`.
        """
        by_rows = _cut(self.q, self.rows, self.columns, alignment, least)
        parts = [(rows, side) for rows in by_rows for side in _cut(self.kv, self.columns, self.rows, alignment, least)]
        pieces = [_Rectangles(q, kv, rows, columns, self.times) for (q, rows), (kv, columns) in parts]
        out = _concatenated(pieces)
        return out[(out.rows > 0) & (out.columns > 0)]


def _concatenated(parts: list[_Rectangles]) -> _Rectangles:
    return _Rectangles(
        *(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts), strict=True)),
    )


def _cut(
    start: IntArray,
    length: IntArray,
    other: IntArray,
    alignment: int,
    least: int,
) -> list[tuple[IntArray, IntArray]]:
    """Split each side into two parts (start, length).

    The second part is empty if the side is short, or shorter than half the other side.
    """
    step = np.where(length > alignment, alignment, least)
    power = np.frexp(((length - 1) // step).clip(1).astype(np.float64))[1].astype(np.int64) - 1
    first = step << power
    first = np.where(first >= length, first >> 1, first)  # where a float rounded up
    first = np.where((length <= least) | (2 * length < other), length, first)
    return [(start, first), (start + first, length - first)]


def _alignment(mask: Mask, tile: int) -> int:
    """The smallest multiple of `tile` that is a multiple of all finite periods."""
    periods = [leaf.period for leaf in _leaves(mask)]
    alignment = math.lcm(tile, *(period for period in periods if period is not None))
    if alignment <= _LONGEST_PERIOD:
        return alignment
    return tile


def _leaves(mask: Mask) -> list[Mask]:
    """Distinct masks that an expression joins."""
    if isinstance(mask, (And, Or, Not)):
        return list(dict.fromkeys(leaf for part in mask.parts for leaf in _leaves(part)))
    return [mask]


def _evaluated(mask: Mask, verdicts_of: Mapping[Mask, Any]) -> Any:
    """The verdict of an expression, from the verdicts of its leaves."""
    if isinstance(mask, Not):
        return negate(_evaluated(mask.mask, verdicts_of))
    if not isinstance(mask, (And, Or)):
        return verdicts_of[mask]
    join = both if isinstance(mask, And) else either
    out = _evaluated(mask.masks[0], verdicts_of)
    for part in mask.masks[1:]:
        out = join(out, _evaluated(part, verdicts_of))
    return out


def _leaf_verdicts(expanded: Mask, rectangles: _Rectangles) -> dict[Mask, Verdicts]:
    q, kv = rectangles.regions
    return {leaf: leaf.classify(q, kv) for leaf in _leaves(expanded)}


def _merged(
    expanded: Mask, verdicts_of: Mapping[Mask, Verdicts], rectangles: _Rectangles, selected: Flags, by_formula: bool = True
) -> tuple[int, _Rectangles]:
    """Merge undecided rectangles up to shifts.

    Returns the pairs counted by a formula, and the remaining rectangles.
    """
    table = np.stack(list(verdicts_of.values()), axis=1)
    total, remaining = 0, [rectangles[:0]]
    # Rectangles with equal verdicts of all leaves depend on the same undecided leaves.
    for signature in np.unique(table[selected], axis=0):
        group = rectangles[selected & (table == signature).all(axis=1)]
        verdict = dict(zip(verdicts_of, signature, strict=True))
        undecided = _undecided(expanded, verdict)
        group = _representatives(group, undecided)
        counted = _by_formula(expanded, verdict, undecided, group) if by_formula else None
        if counted is None:
            remaining.append(group)
        else:
            total += counted
    return total, _concatenated(remaining)


def _undecided(mask: Mask, verdicts_of: Mapping[Mask, Any]) -> list[Mask]:
    """The leaves that an undecided expression depends on."""
    if _evaluated(mask, verdicts_of) != PARTIAL:
        return []
    if isinstance(mask, (And, Or, Not)):
        return list(
            dict.fromkeys(leaf for part in mask.parts for leaf in _undecided(part, verdicts_of)),
        )
    return [mask]


def _representatives(rectangles: _Rectangles, undecided: list[Mask]) -> _Rectangles:
    """One rectangle per class of shifts that leave the undecided leaves unchanged."""
    joint = _common(leaf.period for leaf in undecided)
    q_period = _common(leaf.side_periods[0] for leaf in undecided)
    kv_period = _common(leaf.side_periods[1] for leaf in undecided)
    q, kv = rectangles.q, rectangles.kv
    if joint is not None:
        # Shifting only the key equals shifting only the query, and then both back.
        sides = [period for period in (q_period, kv_period) if period is not None]
        side_period = math.gcd(*sides) if sides else None
        moved = q // joint * joint
        q, kv = q - moved, kv - moved
        kv_period = None if side_period is None or side_period % joint else side_period
    elif q_period is not None:
        q = q % q_period
    if kv_period is not None:
        kv = kv % kv_period
    kinds = np.stack([q, kv, rectangles.rows, rectangles.columns], axis=1)
    _, first, group = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    times = np.zeros(len(first), dtype=object)
    np.add.at(times, group.reshape(-1), rectangles.times)
    return replace(rectangles[first], times=times)


def _common(periods: Any) -> int | None:
    """Least common multiple; None if a period is None or the result is too long."""
    finite = list(periods)
    if None in finite:
        return None
    common = math.lcm(*finite)
    if common <= _LONGEST_PERIOD:
        return common
    return None


def _by_formula(
    mask: Mask,
    verdicts_of: Mapping[Mask, Any],
    undecided: list[Mask],
    rectangles: _Rectangles,
) -> int | None:
    """Pairs of rectangles that one leaf decides and has a formula for; None otherwise."""
    if len(undecided) != 1:
        return None
    (leaf,) = undecided
    if_visible, if_hidden = (bool(_evaluated(mask, {**verdicts_of, leaf: verdict}) == FULL) for verdict in (FULL, EMPTY))
    total = 0
    for q, kv, rows, columns, times in zip(*vars(rectangles).values(), strict=True):
        visible = leaf.pairs(range(int(q), int(q + rows)), range(int(kv), int(kv + columns)))
        if visible is None:
            return None
        hidden = int(rows) * int(columns) - visible
        total += times * (visible * if_visible + hidden * if_hidden)
    return total


def _evaluated_pairs(mask: Mask, rectangles: _Rectangles) -> int:
    """Evaluate all pairs of some rectangles; rectangles of equal shape together."""
    total = 0
    shapes = np.stack([rectangles.rows, rectangles.columns], axis=1)
    distinct, group = np.unique(shapes, axis=0, return_inverse=True)
    for number, (rows, columns) in enumerate(distinct.tolist()):
        same = rectangles[group.reshape(-1) == number]
        at_once = max(1, _PAIRS_AT_ONCE // (rows * columns))
        for start in range(0, len(same), at_once):
            chunk = same[start : start + at_once]
            total += int((_visible_pairs(mask, chunk, rows, columns) * chunk.times).sum())
    return total


def _visible_pairs(mask: Mask, rectangles: _Rectangles, rows: int, columns: int) -> Any:
    """Allowed pairs per rectangle, as Python integers."""
    q = torch.from_numpy(rectangles.q)[:, None, None] + torch.arange(rows)[None, :, None]
    kv = torch.from_numpy(rectangles.kv)[:, None, None] + torch.arange(columns)[None, None, :]
    zero = torch.zeros((), dtype=torch.int64)
    allowed = torch.as_tensor(mask.allows(zero, zero, q, kv)).broadcast_to(len(rectangles), rows, columns)
    return allowed.sum(dim=(1, 2)).numpy().astype(object)
