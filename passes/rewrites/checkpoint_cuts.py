"""Which values of a forward to keep, so that the rest can be recomputed piece by piece.

    step      0    1    2  |  3    4  |  5    6        a cut after step 2 keeps what is made up to it and used after it
    values    a----------->|--------->|                a, c at the first cut; e at the second, for a is kept already
              b--->        |          |
                        c--|->   e----|->

Between two cuts lies what is recomputed, and so held, at one time. After Chen et al., Training Deep Nets with Sublinear Memory
Cost (1604.06174), which tries bounds on a piece; here the cuts for each bound are those that keep least.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """`size` bytes, made by step `born` and used by step `last` for the last time."""

    size: int
    born: int
    last: int


def kept(values: Sequence[Value], steps: int, bound: int) -> set[int]:
    """The numbers of the values that cuts keep, with the fewest bytes for which no piece makes more than `bound` bytes.

    A piece of a single step may make more.
    """
    cuts = _cuts(values, steps, bound)
    return {number for number, each in enumerate(values) if any(each.born < cut <= each.last for cut in cuts)}


def _cuts(values: Sequence[Value], steps: int, bound: int) -> list[int]:
    """How many steps stand before each cut."""
    # least[end]: the fewest bytes that cuts keep up to one there, the one before it at came[end].
    born = _by_step(values, steps)
    least, came = [0] + [-1] * steps, [0] * (steps + 1)
    for end in range(1, steps + 1):
        made = keeps = 0
        for start in range(end - 1, -1, -1):
            made += sum(each.size for each in born[start])
            if made > bound and start < end - 1:
                break
            keeps += sum(each.size for each in born[start] if each.last >= end)
            if least[end] < 0 or least[start] + keeps < least[end]:
                least[end], came[end] = least[start] + keeps, start
    return list(_back(came, steps))


def _by_step(values: Sequence[Value], steps: int) -> list[list[Value]]:
    born: list[list[Value]] = [[] for _ in range(steps)]
    for each in values:
        born[each.born].append(each)
    return born


def _back(came: Sequence[int], end: int) -> Iterable[int]:
    while came[end]:
        end = came[end]
        yield end
