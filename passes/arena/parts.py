"""A problem cut into parts that are solved alone, in units of the alignment.

Buffers that never meet in time part it. A buffer that meets all others of its part lies below them, which costs nothing: wherever
a placement has it, what is below it may change places with it. Above it the rest may part again.

    [ c ]      [ d ]           [ c ]  |  [ d ]      c and d never meet: two parts,
    [       a      ]    ->     ------ | ------      each on the floor that a has raised
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A buffer in units: its number among the buffers, its steps [lower, upper), its size."""

    number: int
    lower: int
    upper: int
    size: int

    def meets(self, other: Box) -> bool:
        return self.lower < other.upper and other.lower < self.upper


@dataclass(frozen=True)
class Part:
    """Boxes that lie above `floor`, connected in time, none of which meets all others unless it is alone."""

    floor: int
    boxes: tuple[Box, ...]

    @property
    def bound(self) -> int:
        """The least height that the boxes can reach, from the floor of the arena."""
        return self.floor + most_at_once(self.boxes)


def parts(boxes: Sequence[Box]) -> tuple[list[Part], dict[int, int]]:
    """The parts of a problem, and the offsets of what lies below them by its number."""
    found: list[Part] = []
    settled: dict[int, int] = {}
    open_parts = [Part(0, group) for group in _connected(boxes)]
    while open_parts:
        part = open_parts.pop()
        latest, earliest = max(box.lower for box in part.boxes), min(box.upper for box in part.boxes)
        # It meets all others if it lives when the last of them comes and has come before the first of them goes.
        below = [box for box in part.boxes if box.upper > latest and box.lower < earliest]
        if not below:
            found.append(part)
            continue
        floor = part.floor
        for box in below:
            settled[box.number] = floor
            floor += box.size
        below_numbers = {box.number for box in below}
        rest = [box for box in part.boxes if box.number not in below_numbers]
        open_parts += [Part(floor, group) for group in _connected(rest)]
    return found, settled


def most_at_once(boxes: Sequence[Box]) -> int:
    """The units that live together at the fullest step: no placement is lower."""
    change: dict[int, int] = {}
    for box in boxes:
        change[box.lower] = change.get(box.lower, 0) + box.size
        change[box.upper] = change.get(box.upper, 0) - box.size
    held = most = 0
    for step in sorted(change):
        held += change[step]
        most = max(most, held)
    return most


def _connected(boxes: Sequence[Box]) -> Iterator[tuple[Box, ...]]:
    """Groups that share no step, in the order of time."""
    group: list[Box] = []
    end = 0
    for box in sorted(boxes, key=lambda each: (each.lower, each.number)):
        if group and box.lower >= end:
            yield tuple(group)
            group = []
        end = box.upper if not group else max(end, box.upper)
        group.append(box)
    if group:
        yield tuple(group)
