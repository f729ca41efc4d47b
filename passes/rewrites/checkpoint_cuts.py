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

    By dynamic programming.
    """
    values_of: list[list[Value]] = [[] for _ in range(steps)]
    for value in values:
        values_of[value.first].append(value)
    # least[end]: the fewest bytes kept by cuts up to one at `end`, -1 before any is tried
    # previous[end]: the cut before it, 0 if there is none
    least, previous = [0] + [-1] * steps, [0] * (steps + 1)
    for end in range(1, steps + 1):
        # Try pieces [start, end), longer and longer: their bytes, and those that the cut keeps.
        piece_bytes = cut_bytes = 0
        for start in range(end - 1, -1, -1):
            piece_bytes += sum(value.size for value in values_of[start])
            if piece_bytes > bound and start < end - 1:
                break
            cut_bytes += sum(value.size for value in values_of[start] if value.last >= end)
            if least[end] < 0 or least[start] + cut_bytes < least[end]:
                least[end], previous[end] = least[start] + cut_bytes, start
    # Back from the end, cut by cut.
    cuts: list[int] = []
    cut = previous[steps]
    while cut:
        cuts.append(cut)
        cut = previous[cut]
    return cuts
