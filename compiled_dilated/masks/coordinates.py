"""Coordinates of token positions on grids in row-major order."""

from __future__ import annotations

import math

import numpy as np

from ..regions import Regions
from .axes import Span
from .core import Positions


def strides_of(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Distance in row-major order between neighbors on each axis."""
    return tuple(math.prod(grid[axis + 1 :]) for axis in range(len(grid)))


def coordinates(grid: tuple[int, ...], positions: Positions) -> list[Positions]:
    """The coordinate of row-major positions on each axis."""
    out = []
    for axis, (size, stride) in enumerate(zip(grid, strides_of(grid), strict=True)):
        lines = positions // stride
        # No modulus on the first axis: positions outside the grid are on further lines.
        if axis > 0:
            lines = lines % size
        out.append(lines)
    return out


def spans(grid: tuple[int, ...], regions: Regions) -> list[Span]:
    """A box of the grid that contains each region.

    The region itself if it is a box, its hull otherwise.
    """
    first, last = coordinates(grid, regions.first), coordinates(grid, regions.last)
    # 1. Assign each lattice axis of a region to the slowest grid axis that its stride moves along.
    lengths = [np.zeros(len(regions), dtype=np.int64) for _ in grid]
    steps = [np.zeros(len(regions), dtype=np.int64) for _ in grid]
    assigned = np.zeros(len(regions), dtype=bool)
    for extent, stride in zip(regions.extent.T, regions.stride.T, strict=True):
        unassigned = extent > 1
        for axis, unit in enumerate(strides_of(grid)):
            along = unassigned & (stride % unit == 0) & (stride >= unit)
            lengths[axis] += np.where(along, (extent - 1) * (stride // unit), 0)
            steps[axis] = np.where(along, np.gcd(steps[axis], stride // unit), steps[axis])
            unassigned &= ~along
        assigned |= unassigned
    # 2. A box: every lattice axis was assigned, and none runs over the end of a line.
    box = ~assigned
    for axis, size in enumerate(grid):
        box &= (first[axis] + lengths[axis] < size) | (axis == 0)
    out, same = [], np.ones(len(regions), dtype=bool)
    for axis, size in enumerate(grid):
        # 3. Otherwise the hull of first .. last: an axis spans its size once a slower one moves.
        low = np.where(box | same, first[axis], 0)
        high = np.where(box, first[axis] + lengths[axis], np.where(same, last[axis], size - 1))
        step = np.where(box, steps[axis], np.where(low == high, 0, 1))
        out.append(Span(low, high, step))
        same &= first[axis] == last[axis]
    return out
