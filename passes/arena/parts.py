"""A placement problem split into independent parts, in units of the alignment.

Groups of buffers that never overlap in time are independent. A buffer that overlaps all others of
its part is placed below them at no cost: in any placement it can be swapped with what is below it.
The boxes above it may split again.

    [ c ]      [ d ]           [ c ]  |  [ d ]      c and d never overlap: two parts,
    [       a      ]    ->     ------ | ------      with the top of a as their floor
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A buffer that is live during the steps [lower, upper).

    number: its place among all buffers
    size: in units of the alignment
    """

    number: int
    lower: int
    upper: int
    size: int

    def meets(self, box: Box) -> bool:
        """Whether both are live at some step."""
        return self.lower < box.upper and box.lower < self.upper


@dataclass(frozen=True)
class Part:
    """Boxes above `floor`, connected in time, none of which overlaps all others."""

    floor: int
    boxes: tuple[Box, ...]

    @property
    def bound(self) -> int:
        """The lowest possible height, from the bottom of the arena."""
        return self.floor + most_at_once(self.boxes)


def parts(boxes: Sequence[Box]) -> tuple[list[Part], dict[int, int]]:
    """Split a problem into independent parts.

    Returns the parts, and the offsets of the boxes below them by number.
    """
    finished: list[Part] = []
    offsets: dict[int, int] = {}
    candidates = [Part(0, group) for group in _connected(boxes)]
    while candidates:
        part = candidates.pop()
        # A box overlaps all others if it begins before the first of them ends, and ends after the
        # last of them has begun.
        last_start = max(box.lower for box in part.boxes)
        first_end = min(box.upper for box in part.boxes)
        below = [box for box in part.boxes if box.upper > last_start and box.lower < first_end]
        if not below:
            finished.append(part)
            continue
        floor = part.floor
        for box in below:
            offsets[box.number] = floor
            floor += box.size
        above = [box for box in part.boxes if box.number not in offsets]
        candidates += [Part(floor, group) for group in _connected(above)]
    return finished, offsets


def profile(boxes: Sequence[Box]) -> tuple[list[int], list[int]]:
    """How many units are live over time.

    Returns the steps at which a box begins or ends, and the units live from each to the next.
    """
    change: dict[int, int] = {}
    for box in boxes:
        change[box.lower] = change.get(box.lower, 0) + box.size
        change[box.upper] = change.get(box.upper, 0) - box.size
    steps = sorted(change)
    return steps, list(itertools.accumulate(change[step] for step in steps))


def most_at_once(boxes: Sequence[Box]) -> int:
    """The most units live at one step: no placement is lower."""
    _, live = profile(boxes)
    return max(live, default=0)


def _connected(boxes: Sequence[Box]) -> Iterator[tuple[Box, ...]]:
    """Yield groups that share no step, in the order of time."""
    group: list[Box] = []
    end = 0
    for box in sorted(boxes, key=lambda box: (box.lower, box.number)):
        if group and box.lower >= end:
            yield tuple(group)
            group = []
        end = box.upper if not group else max(end, box.upper)
        group.append(box)
    if group:
        yield tuple(group)
