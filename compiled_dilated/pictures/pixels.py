"""Allowed pairs of each pixel of a picture, by counting."""

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

# Pixels per side. Up to this many tokens a pixel is one token wide.
MOST_PIXELS = 256
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pixels:
    """Allowed pairs of one head.

    counts: (rows, columns), allowed pairs of each pixel; a pair counts once per branch that allows
        it.
    q_cuts: the first query of each row, and the end (positions, or places of an order).
    kv_cuts: the first key of each column, and the end.
    pairs: the sum of counts; None if some are estimated from a sample.
    """

    counts: Counts
    q_cuts: IntArray
    kv_cuts: IntArray
    pairs: int | None

    @property
    def areas(self) -> IntArray:
        """Pairs of each pixel, allowed or not."""
        return np.multiply.outer(np.diff(self.q_cuts), np.diff(self.kv_cuts))

    @property
    def means(self) -> Counts:
        """Branches that allow a pair, mean over each pixel."""
        return np.asarray(self.counts / self.areas, dtype=np.float64)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of all but the last pixels, in tokens."""
        height = int(np.diff(self.q_cuts).max(initial=1))
        width = int(np.diff(self.kv_cuts).max(initial=1))
        return height, width

    @property
    def is_single(self) -> bool:
        """Whether each pixel is one pair."""
        return self.size == (1, 1)

    def merged(self, rows: int, columns: int) -> Pixels:
        """Merge neighbouring pixels to at most this many rows and columns."""
        height, width = self.counts.shape
        q_factor, kv_factor = -(-height // rows), -(-width // columns)
        if self.size[0] == self.size[1]:  # square cells stay square
            q_factor = kv_factor = max(q_factor, kv_factor)
        q_at, kv_at = np.arange(0, height, q_factor), np.arange(0, width, kv_factor)
        counts = np.add.reduceat(np.add.reduceat(self.counts, q_at, axis=0), kv_at, axis=1)
        q_cuts = np.append(self.q_cuts[q_at], self.q_cuts[-1])
        kv_cuts = np.append(self.kv_cuts[kv_at], self.kv_cuts[-1])
        return Pixels(counts, q_cuts, kv_cuts, self.pairs)


def cuts(tokens: int, first: int = 0) -> IntArray:
    """Borders of at most MOST_PIXELS pixels, powers of two wide."""
    size = 1
    while size * MOST_PIXELS < tokens:
        size *= 2
    return first + np.append(np.arange(0, tokens, size), tokens)


def pixels(masks: Sequence[Mask], q_len: int, kv_len: int, q_offset: int, order: Order) -> Pixels:
    """Count the pixels of a head.

    masks: the head's masks, one per branch, with their data bound.
    order: the order in whose places the pixels are drawn.
    """
    # 1. Masks over the places of the order.
    permutation = order.permutation(kv_len)
    if permutation is not None:
        positions = torch.from_numpy(permutation.astype(np.int64))
        masks = [_Placed(mask, order, positions) for mask in masks]
    # 2. Counts, summed over branches.
    q_cuts, kv_cuts = cuts(q_len, q_offset), cuts(kv_len)
    total: Any = np.zeros((len(q_cuts) - 1, len(kv_cuts) - 1), dtype=object)
    exact = True
    for mask in masks:
        cells = counting.cells(mask, q_cuts, kv_cuts)
        total += cells.pairs
        exact = exact and cells.exact
    pairs = None
    if exact:
        pairs = int(total.sum())
    return Pixels(total.astype(np.float64), q_cuts, kv_cuts, pairs)


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
        """The positions at runs of places; equal runs are looked up once."""
        ends = np.stack([places.first, places.last + 1], axis=1)
        distinct, inverse = np.unique(ends, axis=0, return_inverse=True)
        regions = self.order.regions(distinct[:, 0], distinct[:, 1], len(self.permutation))
        return regions[inverse.reshape(-1)]

    @property
    def period(self) -> int | None:
        return None
