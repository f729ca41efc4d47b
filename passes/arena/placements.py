"""Buffers with lifetimes, and their offsets in the arena.

offset                                   lower  upper  size   offset
  6 +-------+                         a    0      4     2       0
    |       |       +-------+         b    4      8     5       0
  4 |   c   +-------+       |         c    0      2     4       2
    |       |   d   |   b   |         d    2      4     2       2
  2 +-------+-------+       |
    |       a       |       |         height 6: a and c live together, so no arena can be lower
  0 +---------------+-------+
    0       2       4       8  step
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Buffer:
    """`size` bytes, live during the steps [lower, upper)."""

    lower: int
    upper: int
    size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer; got {type(value).__name__} {value!r}")
        if self.lower >= self.upper:
            raise ValueError(
                "lower must be below upper, for lifetimes are half-open; "
                f"got [{self.lower}, {self.upper})"
            )
        if self.size < 0:
            raise ValueError(f"size must be at least 0 bytes; got {self.size}")


@dataclass(frozen=True)
class Placement:
    """Offsets of buffers in an arena.

    offsets: the first byte of each buffer, in the order of the buffers
    height: bytes of the arena
    lower_bound: the most bytes live at one time, every buffer rounded up to `alignment`; no arena
        whose buffers begin at multiples of it is lower
    """

    offsets: tuple[int, ...]
    height: int
    lower_bound: int
    alignment: int = 1

    def __str__(self) -> str:
        text = f"{len(self.offsets)} buffers in {self.height:,} bytes, "
        if self.height == self.lower_bound:
            return text + "the lower bound"
        excess = self.height / max(self.lower_bound, 1) - 1
        return text + f"{excess:.1%} above the lower bound, {self.lower_bound:,}"
