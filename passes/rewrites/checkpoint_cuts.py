"""Checkpoint cuts: which values of a forward to keep.

    step      0    1    2  |  3    4  |  5    6        a cut after step 2 keeps the values made
    values    a----------->|--------->|                before it and used after it: a and c; the
              b--->        |          |                second keeps e, for a is kept already
                        c--|->   e----|->

The piece between two cuts is recomputed, and so live, at one time. After Chen et al., Training Deep
Nets with Sublinear Memory Cost (1604.06174), which tries bounds on a piece; here the cuts for each
bound are those that keep fewest bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Value:
    """`size` bytes, computed by step `first`, last used by step `last`."""

    size: int
    first: int
    last: int


def values_to_keep(values: Sequence[Value], steps: int, bound: int) -> set[int]:
    """Numbers of the values to keep: the fewest bytes under a bound.

    steps: of the forward
    bound: the most bytes that a piece may compute; a piece of a single step may compute more
    """
    cuts = _cuts(values, steps, bound)
    numbers = set[int]()
    for number, value in enumerate(values):
        if any(value.first < cut <= value.last for cut in cuts):
            numbers.add(number)
    return numbers


def _cuts(values: Sequence[Value], steps: int, bound: int) -> list[int]:
    """The number of steps before each cut, last cut first.

    By dynamic programming, one operation of numpy for all starts of a piece.
    """
    made_by: list[list[Value]] = [[] for _ in range(steps)]
    last_used_by: list[list[Value]] = [[] for _ in range(steps)]
    for value in values:
        made_by[value.first].append(value)
        last_used_by[value.last].append(value)
    # fewest[start]: the fewest bytes kept by cuts up to one at `start` and a next one at `end`
    # previous[end]: the cut before one at `end`, 0 if there is none
    fewest, previous = np.zeros(steps + 1, np.int64), [0] * (steps + 1)
    first = piece_bytes = 0
    for end in range(1, steps + 1):
        # 1. A value counts for every cut before it, from the step that makes it to its last use.
        for value in made_by[end - 1]:
            piece_bytes += value.size
            fewest[:end] += value.size
        for value in last_used_by[end - 1]:
            fewest[: value.first + 1] -= value.size
        # 2. The pieces [start, end) within the bound start at `first` or later.
        while piece_bytes > bound and first < end - 1:
            piece_bytes -= sum(value.size for value in made_by[first])
            first += 1
        # 3. The best of them; of equal ones the shortest.
        previous[end] = end - 1 - int(fewest[first:end][::-1].argmin())
        fewest[end] = fewest[previous[end]]
    # Back from the end, cut by cut.
    cuts: list[int] = []
    cut = previous[steps]
    while cut:
        cuts.append(cut)
        cut = previous[cut]
    return cuts
