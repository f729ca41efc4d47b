"""neighborhood(): keys near the query on a grid of tokens.

NATTEN, arXiv 2204.07143.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import arguments
from .core import Mask
from .neighborhoods import Neighborhood, PlacedNeighborhood

EDGES = ("cut", "shift")


def neighborhood(
    grid: tuple[int, ...],
    radius: int | Sequence[int],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    edges: str = "cut",
    offset: int | None = None,
) -> Mask:
    """Keys within `radius` steps of `dilation` on every axis of a grid.

    grid: sizes of 1 to 3 axes; tokens in row-major order.
    radius, dilation: one number, or one per axis.
    causal: one bool, or one per axis: only keys at or before the query's coordinate.
    edges: "cut": fewer keys at the border; "shift": windows move inwards, so that every query has
        2 * radius + 1 keys per axis (NATTEN, arXiv 2204.07143). A causal axis is always cut.
    offset: None if the sequence is the grid (a longer sequence is an error), else the position of
        the grid's first token, in a sequence of any length. Tokens outside the grid, such as a CLS
        token or registers, see nothing through this mask, and no query sees them: join a mask for
        them with `|`.

    >>> neighborhood((64, 64), 7, offset=1) | global_tokens(1)
    neighborhood((64, 64), 7, offset=1) | global_tokens(1)
    """
    grid = arguments.integers("grid", grid, 1)
    if len(grid) > 3:
        raise ValueError(f"grid must have 1 to 3 axes; got {grid!r}")
    arguments.integer("the number of cells of the grid", math.prod(grid))

    # One bool applies to all axes.
    flags: tuple[Any, ...] = (causal,) * len(grid)
    if isinstance(causal, Sequence):
        flags = tuple(causal)
    if len(flags) != len(grid) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(
            f"causal must be a bool or one bool per axis of the grid {grid!r}; got {causal!r}"
        )
    arguments.choice("edges", edges, EDGES)
    radii = _per_axis("radius", radius, grid, 0)
    mask = Neighborhood(grid, radii, _per_axis("dilation", dilation, grid, 1), flags, edges)
    if offset is None:
        return mask
    offset = arguments.integer("offset", offset, 0)
    arguments.integer("the last position of the grid", offset + math.prod(grid) - 1)
    return PlacedNeighborhood(mask, offset)


def _per_axis(name: str, value: Any, grid: tuple[int, ...], minimum: int) -> tuple[int, ...]:
    """Check one integer or one per axis; returns one per axis."""
    if arguments.is_iterable(value):
        numbers = arguments.integers(name, value, minimum)
    else:
        numbers = arguments.integers(name, (value,) * len(grid), minimum)
    if len(numbers) != len(grid):
        raise ValueError(
            f"{name} must be one number or one per axis of the grid {grid!r}; got {value!r}"
        )
    return numbers
