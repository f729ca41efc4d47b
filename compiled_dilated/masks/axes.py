"""One axis of a neighborhood: which key coordinates a query coordinate sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..regions import IntArray, Verdicts, both, verdicts
from .core import Positions
from .differences import classify_difference, pairs_up_to

# The least and the greatest of some coordinates, per region.
_Bounds = tuple[IntArray, IntArray]


@dataclass(frozen=True, eq=False)
class Span:
    """Coordinates low .. high on one axis, congruent to low modulo step.

    step is 0 for a single coordinate.
    """

    low: IntArray
    high: IntArray
    step: IntArray


@dataclass(frozen=True)
class Axis:
    """One axis of a neighborhood.

    size: coordinates on the axis.
    radius: in steps of `dilation`.
    shift: move windows inwards at the border instead of cutting them.
    """

    size: int
    radius: int
    dilation: int
    causal: bool
    shift: bool

    def reach(self, c: Positions) -> tuple[Positions, Positions]:
        """The least and the greatest key coordinate visible from coordinate c.

        Keys between them are `dilation` apart.
        """
        if self.causal:
            return c - self.radius * self.dilation, c
        if not self.shift:
            return c - self.radius * self.dilation, c + self.radius * self.dilation
        # Count in steps of the dilation: `lane` is the residue class, `rank` the index within it.
        lane, rank = c % self.dilation, c // self.dilation
        members = (self.size - lane + self.dilation - 1) // self.dilation
        latest = _greatest(members - (2 * self.radius + 1), 0)
        start = least(_greatest(rank - self.radius, 0), latest)
        return start * self.dilation + lane, (start + 2 * self.radius) * self.dilation + lane

    def keys_of(self, c: int) -> range:
        """The key coordinates visible from query coordinate c."""
        low, high = self.reach(c)
        # The first key of the residue class that is not negative.
        low += max(0, -(low // self.dilation)) * self.dilation
        return range(low, min(high, self.size - 1) + 1, self.dilation)

    @property
    def is_whole(self) -> bool:
        """Whether every coordinate sees every other."""
        return self.radius >= self.size - 1 and self.dilation == 1 and not self.causal

    def pairs(self) -> int:
        """Number of visible pairs of coordinates."""
        # The first `longer` residue classes have one member more.
        shorter, longer = divmod(self.size, self.dilation)
        pairs = longer * self._pairs_of_lane(shorter + 1)
        return pairs + (self.dilation - longer) * self._pairs_of_lane(shorter)

    def _pairs_of_lane(self, members: int) -> int:
        """Number of visible pairs within one residue class."""
        if self.shift and not self.causal:
            return members * min(members, 2 * self.radius + 1)
        lane = range(members)
        ahead = self.radius
        if self.causal:
            ahead = 0
        return pairs_up_to(ahead, lane, lane) - pairs_up_to(-self.radius - 1, lane, lane)

    def allows(self, q: Positions, kv: Positions) -> Any:
        """True where query coordinate q sees key coordinate kv."""
        low, high = self.reach(q)
        near = (kv >= low) & (kv <= high)
        if self.dilation == 1:
            return near
        return near & ((kv - q) % self.dilation == 0)

    def classify(self, q: Span, kv: Span) -> Verdicts:
        """EMPTY, PARTIAL or FULL for pairs of spans of coordinates."""
        low, high, step = kv.low - q.high, kv.high - q.low, np.gcd(q.step, kv.step)
        back = self.radius * self.dilation
        if not self.shift or self.causal:
            ahead = back
            if self.causal:
                ahead = 0
            return classify_difference(low, high, step, self.dilation, back, ahead)
        # Shifted windows: residues from the difference, bounds from the reach of the queries.
        residues = classify_difference(low, high, step, self.dilation, None, self.size)
        lows, highs = self._reach_over(q.low, q.high)
        inside = (lows[1] <= kv.low) & (kv.high <= highs[0])
        outside = (kv.high < lows[0]) | (kv.low > highs[1])
        return both(residues, verdicts(inside, outside))

    def _reach_over(self, low: IntArray, high: IntArray) -> tuple[_Bounds, _Bounds]:
        """Bounds of both results of `reach` over low <= c <= high.

        Returns (least, greatest) of the first result, then of the second. Both grow with c inside a
        residue class, so the first and the last member of each class bound them.
        """
        lows, highs = [], []
        for lane in range(min(self.dilation, self.size)):
            # The first and the last member of the class; of an absent class, the bounds themselves.
            first = low + (lane - low) % self.dilation
            last = high - (high - lane) % self.dilation
            present = first <= high
            first, last = np.where(present, first, low), np.where(present, last, high)
            (a, b), (c, d) = self.reach(first), self.reach(last)
            lows += [a, c]
            highs += [b, d]
        of_lows = np.minimum.reduce(lows), np.maximum.reduce(lows)
        of_highs = np.minimum.reduce(highs), np.maximum.reduce(highs)
        return of_lows, of_highs


def least(a: Positions, b: Positions) -> Positions:
    """Elementwise minimum, written with operators only."""
    return a - (a - b) * (a > b)


def _greatest(a: Positions, b: Positions | int) -> Positions:
    return a - (a - b) * (a < b)
