"""Offsets for buffers: greedy orders, then an exact search.

The exact search is for the parts that greedy orders leave above the lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .. import arguments
from . import exact, greedy
from .parts import Box, Part, most_at_once, parts
from .placements import Buffer, Placement


def solve(
    buffers: Sequence[Buffer],
    capacity: int | None = None,
    seconds: float = 60,
    alignment: int = 1,
) -> Placement:
    """Find offsets at which buffers live at one time do not overlap.

    capacity: bytes of the arena, in which any placement will do; None for the lowest arena
    seconds: the limit of the exact search, in two threads; it ends early at the lower bound, or
        within the capacity
    alignment: every offset is a multiple of it

    Raises ValueError with the lowest height so far if nothing fits into the capacity.

        >>> print(solve([Buffer(0, 4, 2), Buffer(4, 8, 5), Buffer(0, 2, 4), Buffer(2, 4, 2)]))
        4 buffers in 6 bytes, the lower bound
    """
    _check(buffers, capacity, seconds, alignment)
    deadline = time.monotonic() + seconds
    # 1. In units of the alignment.
    boxes = _boxes(buffers, alignment)
    bound = most_at_once(boxes)
    roof = None if capacity is None else capacity // alignment
    if roof is not None and bound > roof:
        raise ValueError(
            f"capacity must be at least {bound * alignment:,}, the bytes that live at once; "
            f"got {capacity:,}"
        )
    # 2. The search.
    offsets = _offsets(boxes, bound, roof, deadline)
    top = greedy.height(boxes, offsets)
    if roof is not None and top > roof:
        raise ValueError(
            f"capacity {capacity:,} was not reached in {seconds} seconds; the least height found "
            f"is {top * alignment:,}, the lower bound {bound * alignment:,}. "
            "Give a larger capacity or more seconds"
        )
    return Placement(
        offsets=tuple(offsets.get(number, 0) * alignment for number in range(len(buffers))),
        height=top * alignment,
        lower_bound=bound * alignment,
        alignment=alignment,
    )


def _boxes(buffers: Sequence[Buffer], alignment: int) -> list[Box]:
    """The buffers that take memory, in units of the alignment, rounded up."""
    boxes: list[Box] = []
    for number, buffer in enumerate(buffers):
        if buffer.size:
            units = -(-buffer.size // alignment)
            boxes.append(Box(number, buffer.lower, buffer.upper, units))
    return boxes


def _offsets(boxes: Sequence[Box], bound: int, roof: int | None, deadline: float) -> greedy.Offsets:
    """Offsets of all boxes by number, in units.

    bound: the lower bound
    roof: the height that will do; None for the lowest
    """
    # The highest part determines the arena: up to its height, lower parts need no search.
    enough = bound if roof is None else roof
    split, offsets = parts(boxes)
    # 1. Greedy orders on every part.
    hard: list[tuple[Part, greedy.Offsets]] = []
    for part in split:
        placed = greedy.place(part, enough, deadline)
        offsets.update(placed)
        if greedy.height(part.boxes, placed) > enough:
            hard.append((part, placed))
    # 2. Exact searches on the parts above, with equal shares of the time left.
    for turn, (part, placed) in enumerate(hard):
        now = time.monotonic()
        if now >= deadline:
            break
        until = now + (deadline - now) / (len(hard) - turn)
        # A search for a placement at the bound ends sooner than one for the lowest placement: it
        # gets the first half of the time.
        fit_until = until
        if roof is None:
            fit_until = (now + until) / 2
        improved = exact.fit(part, enough, fit_until)
        if improved is None and roof is None:
            improved = exact.lower(part, placed, enough, until)
            enough = max(enough, greedy.height(part.boxes, improved))
        if improved is None:
            break
        offsets.update(improved)
    return offsets


def _check(buffers: Sequence[Buffer], capacity: int | None, seconds: float, alignment: int) -> None:
    for number, buffer in enumerate(arguments.sequence("buffers", buffers, "arena.Buffer")):
        arguments.kind(f"buffers[{number}]", buffer, Buffer, "Write Buffer(lower, upper, size)")
    if capacity is not None:
        arguments.whole("capacity", capacity, 0)
    arguments.whole("alignment", alignment, 1)
    arguments.rate("seconds", seconds, zero=True)
