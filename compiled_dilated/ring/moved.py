"""A mask seen from a part of the sequence: queries and keys counted from where the part starts, along an order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..masks.core import Data, Mask, Positions
from ..orders import Order, identity
from ..regions import PARTIAL, Regions, Verdicts


def positions(places: Positions, order: Order, tokens: int) -> Positions:
    """The positions of the tokens at some places of an order, numpy or torch as the places are."""
    permutation = order.permutation(tokens)
    if permutation is None:
        return places
    if isinstance(places, np.ndarray):
        return permutation[places]
    import torch

    return torch.from_numpy(permutation).to(places.device)[places]


@dataclass(frozen=True, repr=False)
class Moved(Mask):
    """Query i stands at place q_start + q_step * i of `order`, key j likewise; `mask` speaks of the positions there."""

    mask: Mask
    q_start: int
    q_step: int
    kv_start: int
    kv_step: int
    order: Order
    tokens: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        q, kv = self._positions(q, self.q_start, self.q_step), self._positions(kv, self.kv_start, self.kv_step)
        return self.mask.allows(b, h, q, kv, data)

    def _positions(self, at: Positions, start: int, step: int) -> Positions:
        wide = at.long() if hasattr(at, "long") else np.asarray(at, dtype=np.int64)
        return positions(wide * step + start, self.order, self.tokens)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        queries, keys = self._regions(q, self.q_start, self.q_step), self._regions(kv, self.kv_start, self.kv_step)
        return np.full(len(q), PARTIAL) if queries is None or keys is None else self.mask.classify(queries, keys)

    def _regions(self, regions: Regions, start: int, step: int) -> Regions | None:
        """Where the tokens stand; None where an order scatters them over no region that it knows."""
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
        pass  # the whole was checked; a part of it has no lengths of its own

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        return replace(self, mask=change(self.mask))

    def __repr__(self) -> str:
        return (
            f"Moved({self.mask!r}, {self.q_start}, {self.q_step}, {self.kv_start}, {self.kv_step}, {self.order!r}, {self.tokens})"
        )
