"""A check of placements that shares no code with the solver."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from .. import arguments
from .placements import Buffer, Placement


def validate(buffers: Sequence[Buffer], placement: Placement) -> None:
    """Raise ValueError for the first fault of a placement.

    Faults: two buffers that are live together and overlap; a buffer misaligned, below the arena or
    beyond its height; a wrong number of offsets; a wrong lower bound.
    """
    _check(buffers, placement)
    # 1. Each buffer by itself.
    offsets, alignment = placement.offsets, placement.alignment
    if len(offsets) != len(buffers):
        raise ValueError(
            f"placement must have one offset for each of {len(buffers)} buffers; got {len(offsets)}"
        )
    for number, (buffer, offset) in enumerate(zip(buffers, offsets, strict=True)):
        if offset < 0:
            raise ValueError(f"buffer {number}, {buffer!r}, is at the negative offset {offset}")
        if offset % alignment:
            raise ValueError(
                f"buffer {number}, {buffer!r}, is at offset {offset}, "
                f"not a multiple of the alignment {alignment}"
            )
        end = offset + buffer.size
        if end > placement.height:
            raise ValueError(
                f"buffer {number}, {buffer!r}, at offset {offset} ends at {end}, "
                f"beyond the height {placement.height}"
            )
    # 2. Buffers against each other.
    _sweep(buffers, placement)


def _check(buffers: Sequence[Buffer], placement: Placement) -> None:
    """Raise TypeError or ValueError unless these are buffers and a placement."""
    for number, buffer in enumerate(arguments.sequence("buffers", buffers, "arena.Buffer")):
        arguments.kind(f"buffers[{number}]", buffer, Buffer, "Write Buffer(lower, upper, size)")
    arguments.kind("placement", placement, Placement, "Take it from arena.solve")
    offsets = arguments.sequence("placement.offsets", placement.offsets, "whole numbers")
    numbers = {f"placement.offsets[{number}]": offset for number, offset in enumerate(offsets)}
    for field in ("height", "lower_bound", "alignment"):
        numbers[f"placement.{field}"] = getattr(placement, field)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"{name} must be a whole number; "
                f"got {type(value).__name__} {arguments.shown(value)}"
            )
    if placement.alignment < 1:
        raise ValueError(f"placement.alignment must be at least 1; got {placement.alignment}")


def _sweep(buffers: Sequence[Buffer], placement: Placement) -> None:
    """Raise ValueError for overlapping buffers and a wrong lower bound.

    Buffers begin and end in the order of time. The live ones are kept sorted by offset, where a new
    one can only overlap its two neighbours.
    """
    # At one step buffers end before others begin: [0, 4) and [4, 8) are never live together.
    events = [(buffer.upper, 0, number) for number, buffer in enumerate(buffers) if buffer.size]
    events += [(buffer.lower, 1, number) for number, buffer in enumerate(buffers) if buffer.size]
    live: list[tuple[int, int]] = []
    live_bytes = most = 0
    for _, begins, number in sorted(events):
        rounded = -(-buffers[number].size // placement.alignment) * placement.alignment
        entry = (placement.offsets[number], number)
        if not begins:
            live.remove(entry)
            live_bytes -= rounded
            continue
        place = bisect_left(live, entry)
        start, end = entry[0], entry[0] + buffers[number].size
        for offset, neighbour in live[max(0, place - 1) : place + 1]:
            if offset < end and start < offset + buffers[neighbour].size:
                first, second = sorted((number, neighbour))
                raise ValueError(
                    f"buffers {first} and {second} live together and overlap: "
                    f"{_described(buffers, placement, first)} and "
                    f"{_described(buffers, placement, second)}"
                )
        insort(live, entry)
        live_bytes += rounded
        most = max(most, live_bytes)
    if most != placement.lower_bound:
        raise ValueError(
            f"lower_bound must be {most}, the most bytes that live at once; "
            f"got {placement.lower_bound}"
        )


def _described(buffers: Sequence[Buffer], placement: Placement, number: int) -> str:
    offset = placement.offsets[number]
    return f"{buffers[number]!r} at [{offset}, {offset + buffers[number].size})"
