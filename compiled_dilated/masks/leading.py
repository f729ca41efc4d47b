"""Masks of the first `count` tokens: sinks, prefixes and global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import arguments
from ..regions import EMPTY, FULL, PARTIAL, Regions, Verdicts, verdicts
from .core import Data, Mask, Positions
from .ranges import clip


@dataclass(frozen=True, repr=False)
class Sinks(Mask):
    """kv < count."""

    count: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return (kv < self.count) & (q == q)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return verdicts(kv.last < self.count, kv.first >= self.count)

    @property
    def period(self) -> int | None:
        return None

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return 1, None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(min(self.count, kv_len)),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return q, clip(kv, kv.start, self.count)

    def pairs(self, q: range, kv: range) -> int | None:
        return (q.stop - q.start) * max(0, min(kv.stop, self.count) - kv.start)

    def __repr__(self) -> str:
        return f"sinks({self.count})"


def sinks(count: int) -> Mask:
    """The first `count` keys, visible to every query (arXiv 2309.17453).

    Join `causal()` if the future must stay hidden.
    """
    return Sinks(arguments.integer("count", count, 0))


@dataclass(frozen=True, repr=False)
class LeadingQueries(Mask):
    """q < count; a factor of `prefix` and `global_tokens`."""

    count: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return (q < self.count) & (kv == kv)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return verdicts(q.last < self.count, q.first >= self.count)

    @property
    def period(self) -> int | None:
        return None

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return None, 1

    def pairs(self, q: range, kv: range) -> int | None:
        return max(0, min(q.stop, self.count) - q.start) * (kv.stop - kv.start)

    def __repr__(self) -> str:
        return f"leading_queries({self.count})"


@dataclass(frozen=True, repr=False)
class Prefix(Mask):
    """q < count and kv < count."""

    count: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return (q < self.count) & (kv < self.count)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return verdicts(
            (q.last < self.count) & (kv.last < self.count),
            (q.first >= self.count) | (kv.first >= self.count),
        )

    @property
    def period(self) -> int | None:
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        if q < self.count:
            return (range(min(self.count, kv_len)),)
        return ()

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return clip(q, q.start, self.count), clip(kv, kv.start, self.count)

    def expanded(self) -> Mask:
        return LeadingQueries(self.count) & Sinks(self.count)

    def __repr__(self) -> str:
        return f"prefix({self.count})"


def prefix(count: int) -> Mask:
    """The first `count` tokens see each other both ways.

    `causal() | prefix(n)` is a prefix language model.
    """
    return Prefix(arguments.integer("count", count, 0))


@dataclass(frozen=True, repr=False)
class GlobalTokens(Mask):
    """q < count or kv < count."""

    count: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return (q < self.count) | (kv < self.count)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        full = (q.last < self.count) | (kv.last < self.count)
        empty = (q.first >= self.count) & (kv.first >= self.count)
        return np.where(full, FULL, np.where(empty, EMPTY, PARTIAL))

    @property
    def period(self) -> int | None:
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        if q < self.count:
            return (range(kv_len),)
        return (range(min(self.count, kv_len)),)

    def expanded(self) -> Mask:
        return LeadingQueries(self.count) | Sinks(self.count)

    def __repr__(self) -> str:
        return f"global_tokens({self.count})"
