"""Masks over parts of a sequence: indices from 0, along an order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..masks.core import Data, Mask, Positions
from ..orders import Order, identity
from ..regions import PARTIAL, Regions, Verdicts


def positions(places: Positions, order: Order, tokens: int) -> Positions:
    """Positions of the tokens at some places of an order.

    places: a numpy array or torch tensor; the result is of the same kind.
    """
    permutation = order.permutation(tokens)
    if permutation is None:
        return places
    if isinstance(places, np.ndarray):
        return permutation[places]
    import torch

    return torch.from_numpy(permutation).to(places.device)[places]


@dataclass(frozen=True, repr=False)
class Moved(Mask):
    """A mask over indices of evenly spaced queries and keys.

    Query i is at place q_start + q_step * i, key j at kv_start + kv_step * j.

    order, tokens: the order that places belong to, and its length.
    """

    mask: Mask
    q_start: int
    q_step: int
    kv_start: int
    kv_step: int
    order: Order
    tokens: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        q = self._positions(q, self.q_start, self.q_step)
        kv = self._positions(kv, self.kv_start, self.kv_step)
        return self.mask.allows(b, h, q, kv, data)

    def _positions(self, indices: Positions, start: int, step: int) -> Positions:
        """Positions in the complete sequence, of indices from 0."""
        # 64 bits: tiles may have indices of 32.
        is_tensor = hasattr(indices, "long")
        wide = indices.long() if is_tensor else np.asarray(indices, dtype=np.int64)
        return positions(wide * step + start, self.order, self.tokens)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        queries = self._regions(q, self.q_start, self.q_step)
        keys = self._regions(kv, self.kv_start, self.kv_step)
        if queries is None or keys is None:
            return np.full(len(q), PARTIAL)
        return self.mask.classify(queries, keys)

    def _regions(self, regions: Regions, start: int, step: int) -> Regions | None:
        """Regions in original positions; None if the order scatters them."""
        places = Regions(regions.base * step + start, regions.extent, regions.stride * step)
        if self.order == identity():
            return places
        if places.stride.shape[1] != 1 or (places.stride != 1).any():
            return None
        return self.order.regions(places.base, places.base + places.extent[:, 0], self.tokens)

    @property
    def period(self) -> int | None:
        return None

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def check(self, queries: range, keys: int) -> None:
        """No check: masks are checked for the complete sequence."""

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        return replace(self, mask=change(self.mask))

    def __repr__(self) -> str:
        places = f"{self.q_start}, {self.q_step}, {self.kv_start}, {self.kv_step}"
        return f"Moved({self.mask!r}, {places}, {self.order!r}, {self.tokens})"
