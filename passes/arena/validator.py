"""Whether a placement keeps its promises. Shares no code with what makes placements: a sweep over the steps, in plain Python."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from .. import arguments
from .placements import Buffer, Placement


def validate(buffers: Sequence[Buffer], placement: Placement) -> None:
    """Raises ValueError that names the first pair of buffers that live together and overlap, or the buffer that is wrong alone:
    misaligned, below the arena or beyond its height; also for another number of offsets, and for a lower bound that is not one.
    """
    _check(buffers, placement)
    offsets, alignment = placement.offsets, placement.alignment
    if len(offsets) != len(buffers):
        raise ValueError(f"placement must have one offset for each of {len(buffers)} buffers; got {len(offsets)}")
    for number, (buffer, offset) in enumerate(zip(buffers, offsets, strict=True)):
        if offset < 0:
            raise ValueError(f"buffer {number}, {buffer!r}, is at the negative offset {offset}")
        if offset % alignment:
            raise ValueError(f"buffer {number}, {buffer!r}, is at offset {offset}, not a multiple of the alignment {alignment}")
        if offset + buffer.size > placement.height:
            end = offset + buffer.size
            raise ValueError(
                f"buffer {number}, {buffer!r}, at offset {offset} ends at {end}, beyond the height {placement.height}"
            )
    _sweep(buffers, placement)


def _check(buffers: Sequence[Buffer], placement: Placement) -> None:
    """Raises TypeError or ValueError where these are no buffers and no placement at all."""
    for number, buffer in enumerate(arguments.sequence("buffers", buffers, "arena.Buffer")):
        arguments.kind(f"buffers[{number}]", buffer, Buffer, "Write Buffer(lower, upper, size)")
    arguments.kind("placement", placement, Placement, "Take it from arena.solve")
    offsets = arguments.sequence("placement.offsets", placement.offsets, "whole numbers")
    numbers = {f"placement.offsets[{number}]": offset for number, offset in enumerate(offsets)}
    numbers |= {f"placement.{name}": getattr(placement, name) for name in ("height", "lower_bound", "alignment")}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be a whole number; got {type(value).__name__} {arguments.shown(value)}")
    if placement.alignment < 1:
        raise ValueError(f"placement.alignment must be at least 1; got {placement.alignment}")


def _sweep(buffers: Sequence[Buffer], placement: Placement) -> None:
    """Buffers come and go; those that live lie in `live` by offset, where a newcomer can only touch its two neighbours."""
    # At one step the dead go before the new come: [0, 4) and [4, 8) never meet.
    events = [(buffer.upper, 0, number) for number, buffer in enumerate(buffers) if buffer.size]
    events += [(buffer.lower, 1, number) for number, buffer in enumerate(buffers) if buffer.size]
    live: list[tuple[int, int]] = []
    held, most = 0, 0
    for _, comes, number in sorted(events):
        rounded = -(-buffers[number].size // placement.alignment) * placement.alignment
        entry = (placement.offsets[number], number)
        if not comes:
            live.remove(entry)
            held -= rounded
            continue
        place = bisect_left(live, entry)
        for offset, other in live[max(0, place - 1) : place + 1]:
            if offset < entry[0] + buffers[number].size and entry[0] < offset + buffers[other].size:
                first, second = sorted((number, other))
                raise ValueError(
                    f"buffers {first} and {second} live together and overlap: {_told(buffers, placement, first)} and "
                    f"{_told(buffers, placement, second)}"
                )
        insort(live, entry)
        held += rounded
        most = max(most, held)
    if most != placement.lower_bound:
        raise ValueError(f"lower_bound must be {most}, the most bytes that live at once; got {placement.lower_bound}")


def _told(buffers: Sequence[Buffer], placement: Placement, number: int) -> str:
    offset = placement.offsets[number]
    return f"{buffers[number]!r} at [{offset}, {offset + buffers[number].size})"
