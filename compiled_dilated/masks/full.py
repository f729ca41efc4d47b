"""The mask of every pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..regions import FULL, Regions, Verdicts
from .core import Data, Mask, Positions


@dataclass(frozen=True, repr=False)
class Full(Mask):
    """Every pair."""

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return q - q == kv - kv

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return np.full(len(q), FULL)

    @property
    def period(self) -> int | None:
        return 1

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return 1, 1

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(kv_len),)

    def pairs(self, q: range, kv: range) -> int | None:
        return (q.stop - q.start) * (kv.stop - kv.start)

    def __repr__(self) -> str:
        return "full()"


def full() -> Mask:
    """Every query sees every key."""
    return Full()
