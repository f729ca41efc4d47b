"""Offsets for buffers: greedy orders first, then an exact search on what they leave open."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .. import arguments
from . import exact, greedy
from .parts import Box, most_at_once, parts
from .placements import Buffer, Placement


def solve(buffers: Sequence[Buffer], capacity: int | None = None, seconds: float = 60, alignment: int = 1) -> Placement:
    """Offsets, multiples of `alignment`, at which buffers that live together do not overlap.

    capacity: bytes of the arena, within which any placement will do; without it, the lowest arena that is found. seconds: the
    most that the exact search may take; reaching the lower bound, or the capacity, ends it. Two threads search.

    Raises ValueError with the least height that was found where nothing fits into the capacity.

        >>> print(solve([Buffer(0, 4, 2), Buffer(4, 8, 5), Buffer(0, 2, 4), Buffer(2, 4, 2)]))
        4 buffers in 6 bytes, the lower bound
    """
    _check(buffers, capacity, seconds, alignment)
    deadline = time.monotonic() + seconds
    boxes = [
        Box(number, buffer.lower, buffer.upper, -(-buffer.size // alignment))
        for number, buffer in enumerate(buffers)
        if buffer.size
    ]
    bound = most_at_once(boxes)
    roof = None if capacity is None else capacity // alignment
    if roof is not None and bound > roof:
        raise ValueError(f"capacity must be at least {bound * alignment:,}, the bytes that live at once; got {capacity:,}")
    offsets = _offsets(boxes, bound, roof, deadline)
    top = greedy.height(boxes, offsets)
    if roof is not None and top > roof:
        raise ValueError(
            f"capacity {capacity:,} was not reached in {seconds} seconds; the least height found is {top * alignment:,}, "
            f"the lower bound {bound * alignment:,}. Give a larger capacity or more seconds"
        )
    return Placement(
        tuple(offsets.get(number, 0) * alignment for number in range(len(buffers))), top * alignment, bound * alignment, alignment
    )


def _offsets(boxes: Sequence[Box], bound: int, roof: int | None, deadline: float) -> greedy.Offsets:
    """The offset of every box by its number, in units."""
    # A height that any part reaches costs the others nothing up to it: only the highest part counts.
    enough = bound if roof is None else roof
    open_parts, offsets = parts(boxes)
    placed = [greedy.place(part, enough, deadline) for part in open_parts]
    for each in placed:
        offsets.update(each)
    hard = [(part, each) for part, each in zip(open_parts, placed, strict=True) if greedy.height(part.boxes, each) > enough]
    for turn, (part, each) in enumerate(hard):
        now = time.monotonic()
        if now >= deadline:
            break
        until = now + (deadline - now) / (len(hard) - turn)
        # A placement at the bound, if there is one, is found sooner by a search that looks for nothing else.
        found = exact.fit(part, enough, until if roof is not None else (now + until) / 2)
        if found is None and roof is None:
            found = exact.lower(part, each, enough, until)
            enough = max(enough, greedy.height(part.boxes, found))
        if found is None:
            break
        offsets.update(found)
    return offsets


def _check(buffers: Sequence[Buffer], capacity: int | None, seconds: float, alignment: int) -> None:
    for number, buffer in enumerate(arguments.sequence("buffers", buffers, "arena.Buffer")):
        arguments.kind(f"buffers[{number}]", buffer, Buffer, "Write Buffer(lower, upper, size)")
    for name, value, least in (("capacity", capacity, 0), ("alignment", alignment, 1)):
        if name == "capacity" and value is None:
            continue
        arguments.whole(name, value, least)
    arguments.rate("seconds", seconds, zero=True)
