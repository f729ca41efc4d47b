"""Masks bound to a call's data, for counting and drawing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..regions import EMPTY, FULL, PARTIAL, IntArray, Regions, Verdicts
from .core import Data, Mask, Positions
from .data import DocumentIds, DocumentLengths, OfData, Padding
from .functions import FromMod
from .globals import GlobalData, GlobalPositions
from .traced import Traced
from .unclassified import Unclassified


@dataclass(frozen=True, eq=False)
class KeyFlags(Mask):
    """Keys whose entry in `visible` is True: `padding()` of one batch entry."""

    visible: Any = field(repr=False)
    name: str

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Positions:
        return self.visible[kv] & (q == q)

    @cached_property
    def _before(self) -> IntArray:
        """Number of visible keys before each key."""
        return np.concatenate([[0], np.cumsum(self.visible.numpy(), dtype=np.int64)])

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        span = kv.last - kv.first + 1
        count = self._before[kv.last + 1] - self._before[kv.first]
        return np.where(count == 0, EMPTY, np.where(count == span, FULL, PARTIAL))

    @property
    def period(self) -> int | None:
        return None

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return 1, None

    def pairs(self, q: range, kv: range) -> int | None:
        return (q.stop - q.start) * int(self._before[kv.stop] - self._before[kv.start])

    def __repr__(self) -> str:
        return f"padding({self.name!r})"


def with_data(mask: Mask, data: Data, batch: int) -> Mask:
    """The mask of one batch entry, with structure in place of data.

    Data without a structure remains data: documents whose ids recur, for example.

    mask: without rules over heads.
    data: tensors (batch or 1, positions) on a CPU.
    batch: the entry of the batch.
    """
    if isinstance(mask, FromMod | Traced):
        within = mask.within
        if within is not None:
            within = with_data(within, data, batch)
        return Unclassified(mask, within, data, batch)
    if not isinstance(mask, OfData):
        return mask._map(lambda part: with_data(part, data, batch))
    # One row of data serves all entries of the batch.
    x = mask.tensor(data)
    row = x[0]
    if x.shape[0] > 1:
        row = x[batch]
    if isinstance(mask, DocumentIds):
        consecutive = _documents(row.numpy())
        if consecutive is not None:
            return consecutive
    if isinstance(mask, Padding):
        return KeyFlags(~row, mask.name)
    if isinstance(mask, GlobalData):
        return GlobalPositions(tuple(np.flatnonzero(row.numpy()).tolist()))
    return Unclassified(mask, None, data, batch)


def _documents(ids: Any) -> Mask | None:
    """Documents by their lengths; None if an id recurs after another."""
    starts = np.zeros(0, dtype=np.int64)
    if len(ids):
        starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    if len(np.unique(ids[starts])) != len(starts):
        return None
    return DocumentLengths(tuple(np.diff(starts, append=len(ids)).tolist()))
