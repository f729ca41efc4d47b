"""Rectangles that are translations of each other, for undecided masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..masks import And, Mask, Not, Or
from ..rectangles import Rectangles, concatenated
from ..regions import EMPTY, FULL, PARTIAL, IntArray, Verdicts, both, either, negate
from ..tiles import Flags

# Periods past this are longer than any sequence that can be counted.
_LONGEST_PERIOD = 2**60
# A formula takes a call per rectangle: below this mean number of pairs, evaluating the mask at all
# pairs at once is faster.
_LEAST_PAIRS_OF_FORMULA = 64


def alignment(mask: Mask, tile: int) -> int:
    """The multiple of `tile` tokens by which the mask repeats.

    `tile` if that is longer than any sequence.
    """
    periods = [leaf.period for leaf in leaves(mask)]
    multiple = math.lcm(tile, *(period for period in periods if period is not None))
    if multiple > _LONGEST_PERIOD:
        return tile
    return multiple


def leaves(mask: Mask) -> list[Mask]:
    """The different masks that an expression joins."""
    if not isinstance(mask, (And, Or, Not)):
        return [mask]
    distinct: dict[Mask, None] = {}
    for part in mask.parts:
        distinct.update(dict.fromkeys(leaves(part)))
    return list(distinct)


def evaluated(mask: Mask, verdicts: Mapping[Mask, Any]) -> Any:
    """The verdict of an expression from those of its leaves."""
    if isinstance(mask, Not):
        return negate(evaluated(mask.mask, verdicts))
    if not isinstance(mask, (And, Or)):
        return verdicts[mask]
    join = both if isinstance(mask, And) else either
    out = evaluated(mask.masks[0], verdicts)
    for part in mask.masks[1:]:
        out = join(out, evaluated(part, verdicts))
    return out


def leaf_verdicts(expanded: Mask, rectangles: Rectangles) -> dict[Mask, Verdicts]:
    """The verdict of each leaf on each rectangle."""
    q, kv = rectangles.regions
    return {leaf: leaf.classify(q, kv) for leaf in leaves(expanded)}


def by_signature(
    verdicts: Mapping[Mask, Verdicts], rectangles: Rectangles, selected: Flags
) -> Iterator[tuple[Rectangles, dict[Mask, Any]]]:
    """Selected rectangles grouped by the verdicts of all leaves, with these verdicts."""
    table = np.stack(list(verdicts.values()), axis=1)
    for signature in np.unique(table[selected], axis=0):
        group = rectangles[selected & (table == signature).all(axis=1)]
        yield group, dict(zip(verdicts, signature, strict=True))


def merged(
    expanded: Mask,
    verdicts: Mapping[Mask, Verdicts],
    rectangles: Rectangles,
    selected: Flags,
    totals: Any = None,
) -> Rectangles:
    """Selected rectangles without repetitions.

    totals: pairs of each owner. Rectangles that a formula counts are added and left out; None to
        use no formulas.
    """
    remaining = [rectangles[:0]]
    for group, signature in by_signature(verdicts, rectangles, selected):
        undecided = undecided_leaves(expanded, signature)
        first, _, times = duplicates(group, undecided)
        distinct = replace(group[first], times=times)
        is_counted = totals is not None and _add_by_formula(
            expanded, signature, undecided, distinct, totals
        )
        if not is_counted:
            remaining.append(distinct)
    return concatenated(remaining)


def undecided_leaves(mask: Mask, signature: Mapping[Mask, Any]) -> list[Mask]:
    """The leaves that an undecided expression depends on."""
    if evaluated(mask, signature) != PARTIAL:
        return []
    if not isinstance(mask, (And, Or, Not)):
        return [mask]
    distinct: dict[Mask, None] = {}
    for part in mask.parts:
        distinct.update(dict.fromkeys(undecided_leaves(part, signature)))
    return list(distinct)


def duplicates(rectangles: Rectangles, undecided: list[Mask]) -> tuple[IntArray, IntArray, Any]:
    """Group rectangles of one owner that are translations of each other.

    undecided: the leaves that must be invariant under the translation.

    Returns the first rectangle of each kind (kinds,), the kind of each rectangle (n,), and the
    number of rectangles of each kind (kinds,) as Python integers.
    """
    q, kv = _normalized(rectangles, undecided)
    keys = np.stack([q, kv, rectangles.rows, rectangles.columns, rectangles.owner], axis=1)
    _, first, kind = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    times = np.zeros(len(first), dtype=object)
    np.add.at(times, kind, rectangles.times)
    return first, kind, times


def _normalized(rectangles: Rectangles, undecided: list[Mask]) -> tuple[IntArray, IntArray]:
    """Starts translated to the least positions with the same verdicts."""
    joint_period = _common(leaf.period for leaf in undecided)
    q_period = _common(leaf.side_periods[0] for leaf in undecided)
    kv_period = _common(leaf.side_periods[1] for leaf in undecided)
    q, kv = rectangles.q, rectangles.kv
    if joint_period is not None:
        shift = q // joint_period * joint_period
        q, kv = q - shift, kv - shift
        # Translating the keys is translating the queries, and then both back.
        if kv_period is None:
            kv_period = q_period
        elif q_period is not None:
            kv_period = math.gcd(q_period, kv_period)
        if kv_period is not None and kv_period % joint_period:
            kv_period = None
    elif q_period is not None:
        q = q % q_period
    if kv_period is not None:
        kv = kv % kv_period
    return q, kv


def _common(periods: Iterable[int | None]) -> int | None:
    """The least common multiple; None if unknown, or beyond any sequence."""
    common = 1
    for period in periods:
        if period is None:
            return None
        common = math.lcm(common, period)
    if common > _LONGEST_PERIOD:
        return None
    return common


def _add_by_formula(
    mask: Mask,
    signature: Mapping[Mask, Any],
    undecided: list[Mask],
    rectangles: Rectangles,
    totals: Any,
) -> bool:
    """Add the pairs of rectangles that one leaf decides.

    Returns False, and adds nothing, without a formula.
    """
    is_small = rectangles.different_pairs <= _LEAST_PAIRS_OF_FORMULA * len(rectangles)
    if len(undecided) != 1 or is_small:
        return False
    (leaf,) = undecided
    # Whether the expression allows the pairs that the leaf allows, and those that it hides.
    if_allowed = bool(evaluated(mask, {**signature, leaf: FULL}) == FULL)
    if_hidden = bool(evaluated(mask, {**signature, leaf: EMPTY}) == FULL)
    counts = np.zeros(len(rectangles), dtype=object)
    sides = rectangles.q, rectangles.kv, rectangles.rows, rectangles.columns
    numbers = zip(*(side.tolist() for side in sides), strict=True)
    for i, (q, kv, rows, columns) in enumerate(numbers):
        allowed = leaf.pairs(range(q, q + rows), range(kv, kv + columns))
        if allowed is None:
            return False
        counts[i] = allowed * if_allowed + (rows * columns - allowed) * if_hidden
    np.add.at(totals, rectangles.owner, counts * rectangles.times)
    return True
