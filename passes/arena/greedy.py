"""First fit in several orders.

On most graphs that reaches the lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .parts import Box, Part

Offsets = dict[int, int]
IntArray = npt.NDArray[np.int64]

# Largest first: by area, size, lifetime; then earliest or latest first. Area is best most often.
_ORDERS: tuple[Callable[[Box], tuple[int, ...]], ...] = (
    lambda box: (-box.size * (box.upper - box.lower), box.lower),
    lambda box: (-box.size, box.lower),
    lambda box: (box.lower - box.upper, -box.size),
    lambda box: (box.lower, -box.size),
    lambda box: (-box.upper, -box.size),
)


def place(part: Part, enough: int, deadline: float) -> Offsets:
    """Offsets of a part's boxes by number: the lowest of all orders.

    enough: a height in units at which to stop
    deadline: a time of time.monotonic() at which to stop; the first order is always tried
    """
    best: Offsets = {}
    for order in (*_ORDERS, _crowding(part.boxes)):
        offsets = _first_fit(sorted(part.boxes, key=order), part.floor)
        if not best or height(part.boxes, offsets) < height(part.boxes, best):
            best = offsets
        if height(part.boxes, best) <= enough or time.monotonic() > deadline:
            break
    return best


def height(boxes: Sequence[Box], offsets: Offsets) -> int:
    """The top of the highest box."""
    return max((offsets[box.number] + box.size for box in boxes), default=0)


def _crowding(boxes: Sequence[Box]) -> Callable[[Box], tuple[int, ...]]:
    """Boxes that overlap most units in time first."""
    lower, upper, size = _columns(boxes)
    crowd: dict[int, int] = {}
    for box in boxes:
        overlaps = (lower < box.upper) & (box.lower < upper)
        crowd[box.number] = int(size[overlaps].sum())
    return lambda box: (-crowd[box.number], -box.size)


def _first_fit(ordered: Sequence[Box], floor: int) -> Offsets:
    """Place each box at the lowest offset free of those before it."""
    lower, upper, size = _columns(ordered)
    offset = np.zeros(len(ordered), dtype=np.int64)
    for i, box in enumerate(ordered):
        # The placed boxes that are live at the same time, from below.
        live = np.flatnonzero((lower[:i] < box.upper) & (box.lower < upper[:i]))
        live = live[np.argsort(offset[live], kind="stable")]
        # The gap below a box is above the highest top of the boxes before it.
        tops = np.maximum.accumulate(np.concatenate([[floor], offset[live] + size[live]]))
        gaps = np.flatnonzero(offset[live] - tops[:-1] >= box.size)
        # The lowest gap that is large enough, else the top of all.
        offset[i] = tops[gaps[0]] if len(gaps) else tops[-1]
    return {box.number: int(start) for box, start in zip(ordered, offset, strict=True)}


def _columns(boxes: Sequence[Box]) -> tuple[IntArray, IntArray, IntArray]:
    """Lower, upper and size of all boxes, (boxes,) each."""
    lower = np.array([box.lower for box in boxes], dtype=np.int64)
    upper = np.array([box.upper for box in boxes], dtype=np.int64)
    size = np.array([box.size for box in boxes], dtype=np.int64)
    return lower, upper, size
