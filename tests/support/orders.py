"""A model of the tests of orders."""

from __future__ import annotations

import torch

from compiled_dilated.orders import Order


class RoundTrip(torch.nn.Module):
    """Permutes q and k, computes, and inverts the permutation."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.order.invert(self.order.permute(q) * self.order.permute(k).sin())
