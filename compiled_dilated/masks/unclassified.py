"""Masks evaluated pair by pair: functions, and data of one batch entry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..regions import EMPTY, PARTIAL, Regions, Verdicts
from .core import Data, Mask, Positions


@dataclass(frozen=True, eq=False)
class Unclassified(Mask):
    """A mask whose tiles are classified without evaluating its pairs.

    within: a mask that contains all allowed pairs, if there is one.
    data: the call's data tensors by name.
    batch: the entry of the batch.
    """

    mask: Mask
    within: Mask | None = None
    data: Data | None = None
    batch: int = 0

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Positions:
        return self.mask.allows(b * 0 + self.batch, h, q, kv, self.data)

    def on(self, device: Any) -> Mask:
        return replace(self, mask=self.mask.on(device))

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        if self.within is None:
            return np.full(len(q), PARTIAL)
        return np.where(self.within.classify(q, kv) == EMPTY, EMPTY, PARTIAL)

    @property
    def period(self) -> int | None:
        return None

    def __repr__(self) -> str:
        return repr(self.mask)
