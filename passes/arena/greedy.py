"""First fit in several orders: milliseconds, and at the lower bound on most graphs of models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from .parts import Box, Part

Offsets = dict[int, int]

# By what the first in line is largest. Wide and long ones first wins most often; ties go to the earlier step.
_ORDERS: tuple[Callable[[Box], tuple[int, ...]], ...] = (
    lambda box: (-box.size * (box.upper - box.lower), box.lower),
    lambda box: (-box.size, box.lower),
    lambda box: (box.lower - box.upper, -box.size),
    lambda box: (box.lower, -box.size),
    lambda box: (-box.upper, -box.size),
)


def place(part: Part, enough: int, deadline: float) -> Offsets:
    """Offsets of the part's boxes by number: the lowest of all orders, or the first that is no higher than `enough`.

    The first order is carried out whatever the deadline, a time of time.monotonic().
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
    """Where the highest box ends."""
    return max((offsets[box.number] + box.size for box in boxes), default=0)


def _crowding(boxes: Sequence[Box]) -> Callable[[Box], tuple[int, ...]]:
    """Those first that live in the fullest steps."""
    sizes, lower, upper = (np.array([getattr(box, name) for box in boxes]) for name in ("size", "lower", "upper"))
    crowd = {box.number: int(sizes[(lower < box.upper) & (box.lower < upper)].sum()) for box in boxes}
    return lambda box: (-crowd[box.number], -box.size)


def _first_fit(line: Sequence[Box], floor: int) -> Offsets:
    """Each box in turn at the lowest offset where it overlaps none before it."""
    lower, upper, size = (np.array([getattr(box, name) for box in line], dtype=np.int64) for name in ("lower", "upper", "size"))
    offset = np.zeros(len(line), dtype=np.int64)
    for i, box in enumerate(line):
        met = np.flatnonzero((lower[:i] < box.upper) & (box.lower < upper[:i]))
        met = met[np.argsort(offset[met], kind="stable")]
        # Up to each of those in its way, the highest end of the ones below it: the gaps lie between.
        ends = np.maximum.accumulate(np.concatenate([[floor], offset[met] + size[met]]))
        fits = np.flatnonzero(offset[met] - ends[:-1] >= box.size)
        offset[i] = ends[fits[0]] if len(fits) else ends[-1]
    return {box.number: int(at) for box, at in zip(line, offset, strict=True)}
