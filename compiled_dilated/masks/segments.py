"""Segments of equal length that see only themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import arguments
from ..regions import IntArray, Regions, Verdicts, verdicts
from .core import Data, Mask, Positions
from .ranges import NOTHING, clip


@dataclass(frozen=True, repr=False)
class Segments(Mask):
    """q and kv in the same segment of `length` tokens."""

    length: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return q // self.length == kv // self.length

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return same_group(
            q.first // self.length,
            q.last // self.length,
            kv.first // self.length,
            kv.last // self.length,
        )

    @property
    def period(self) -> int | None:
        return self.length

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        start = q // self.length * self.length
        return (range(start, min(start + self.length, kv_len)),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        # The segments that the queries touch, then those that the remaining keys touch.
        kv = clip(kv, *self._reach(q))
        if not kv:
            return NOTHING
        return clip(q, *self._reach(kv)), kv

    def _reach(self, span: range) -> tuple[int, int]:
        """Start and stop of the segments that a range of tokens touches."""
        return span[0] // self.length * self.length, (span[-1] // self.length + 1) * self.length

    def pairs(self, q: range, kv: range) -> int | None:
        length = self.length
        first, last = max(q.start, kv.start) // length, (min(q.stop, kv.stop) - 1) // length
        total = max(0, last - first - 1) * length**2
        # The first and the last common segment may be cut; all between are complete.
        for segment in {first, last}:
            if first <= last:
                span = segment * length, (segment + 1) * length
                total += _overlap(q, *span) * _overlap(kv, *span)
        return total

    def __repr__(self) -> str:
        return f"segments({self.length})"


def same_group(
    q_first: IntArray,
    q_last: IntArray,
    kv_first: IntArray,
    kv_last: IntArray,
) -> Verdicts:
    """Verdicts of equal group numbers, from their bounds per region."""
    empty = (q_last < kv_first) | (kv_last < q_first)
    return verdicts((q_first == q_last) & (kv_first == kv_last) & (q_first == kv_first), empty)


def _overlap(a: range, start: int, stop: int) -> int:
    return max(0, min(a.stop, stop) - max(a.start, start))


def segments(length: int) -> Mask:
    """Segments of `length` tokens that see only themselves.

    The last may be short.
    """
    return Segments(arguments.integer("length", length, 1))
