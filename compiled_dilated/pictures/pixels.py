"""How many allowed pairs each pixel of a picture holds: single pairs for few tokens, counted blocks of them for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import counting
from ..masks import Mask
from ..orders import Order
from ..regions import IntArray, Regions, Verdicts

# Pixels a side; up to so many tokens each is one token wide.
MOST_PIXELS = 256
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pixels:
    """What one head sees.

    counts: (rows, columns), allowed pairs in each pixel; a pair counts as often as branches link it.
    q_cuts, kv_cuts: the first query of each row, and of each column the first key, with the end as a last entry; places of an
    order where the picture is drawn in one.
    pairs: the sum of counts; None where some are estimated from a sample.
    """

    counts: Counts
    q_cuts: IntArray
    kv_cuts: IntArray
    pairs: int | None

    @property
    def areas(self) -> IntArray:
        """Pairs that each pixel stands for, allowed or not."""
        return np.multiply.outer(np.diff(self.q_cuts), np.diff(self.kv_cuts))

    @property
    def means(self) -> Counts:
        """The mean number of branches that link a pair of each pixel."""
        return np.asarray(self.counts / self.areas, dtype=np.float64)

    @property
    def size(self) -> tuple[int, int]:
        """Tokens a pixel is high and wide; those at the end may be smaller."""
        return tuple(int(np.diff(cuts).max(initial=1)) for cuts in (self.q_cuts, self.kv_cuts))  # type: ignore[return-value]

    @property
    def is_single(self) -> bool:
        """Whether each pixel is one pair."""
        return self.size == (1, 1)

    def merged(self, rows: int, columns: int) -> Pixels:
        """The same in at most so many rows and columns."""
        factors = [
            -(-size // most) for size, most in zip(self.counts.shape, (rows, columns), strict=True)
        ]
        if self.size[0] == self.size[1]:  # square cells stay square
            factors = [max(factors)] * 2
        q_at, kv_at = (
            np.arange(0, size, factor)
            for size, factor in zip(self.counts.shape, factors, strict=True)
        )
        counts = np.add.reduceat(np.add.reduceat(self.counts, q_at, axis=0), kv_at, axis=1)
        q_cuts, kv_cuts = (
            np.append(cuts[at], cuts[-1])
            for cuts, at in ((self.q_cuts, q_at), (self.kv_cuts, kv_at))
        )
        return Pixels(counts, q_cuts, kv_cuts, self.pairs)


def cuts(tokens: int, first: int = 0) -> IntArray:
    """Borders of at most MOST_PIXELS pixels, a power of two of tokens each."""
    size = 1
    while size * MOST_PIXELS < tokens:
        size *= 2
    return first + np.append(np.arange(0, tokens, size), tokens)


def pixels(masks: Sequence[Mask], q_len: int, kv_len: int, q_offset: int, order: Order) -> Pixels:
    """Of a head that takes part in branches of these masks; drawn in the places of an order."""
    q_cuts, kv_cuts = cuts(q_len, q_offset), cuts(kv_len)
    permutation = order.permutation(kv_len)
    places = None if permutation is None else torch.from_numpy(permutation.astype(np.int64))
    total: Any = np.zeros((len(q_cuts) - 1, len(kv_cuts) - 1), dtype=object)
    exact = True
    for mask in masks:
        drawn = mask if places is None else _Placed(mask, order, places)
        counted = counting.cells(drawn, q_cuts, kv_cuts)
        total += counted.pairs
        exact = exact and counted.exact
    return Pixels(total.astype(np.float64), q_cuts, kv_cuts, int(total.sum()) if exact else None)


@dataclass(frozen=True, eq=False)
class _Placed(Mask):
    """A mask over the places of an order instead of positions."""

    mask: Mask
    order: Order
    permutation: torch.Tensor

    def allows(self, b: Any, h: Any, q: Any, kv: Any, data: Any = None) -> Any:
        return self.mask.allows(b, h, self.permutation[q], self.permutation[kv], data)

    def on(self, device: Any) -> Mask:
        return replace(self, mask=self.mask.on(device))

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return self.mask.classify(self._positions(q), self._positions(kv))

    def _positions(self, places: Regions) -> Regions:
        """The positions at runs of places, each different run looked up once."""
        ends = np.stack([places.first, places.last + 1], axis=1)
        distinct, which = np.unique(ends, axis=0, return_inverse=True)
        return self.order.regions(distinct[:, 0], distinct[:, 1], len(self.permutation))[
            which.reshape(-1)
        ]

    @property
    def period(self) -> int | None:
        return None
