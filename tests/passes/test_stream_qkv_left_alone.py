"""Graphs that StreamQKV does not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.rewrites.stream_qkv import StreamQKV
from tests.hooked import captured
from tests.support.layers import Layer, apart, batch, interleaved, model_of


def test_graphs_with_gradients_are_left_alone() -> None:
    model, x = model_of("apart"), batch(7)
    step, lines = captured(model, StreamQKV(rows=3))
    torch.testing.assert_close(step(x), model(x), rtol=0, atol=0)
    assert step(x).requires_grad
    assert lines == []
    model.requires_grad_(False)
    step, lines = captured(model, StreamQKV(rows=3))
    torch.testing.assert_close(step(x), model(x))
    assert len(lines) >= 1


class Masked(Layer):
    """A mask given as a tensor."""

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Crossed(Layer):
    """Keys of fewer tokens than the queries."""

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        attended = F.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2])
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Reversed(Layer):
    """Keys in another order."""

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        attended = F.scaled_dot_product_attention(q, k.flip(2), v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Cached(Layer):
    """Keys and values that the caller keeps."""

    def forward(self, x: Tensor, *angles: Tensor) -> Any:
        q, k, v = self.split(self, self.before(x))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2)), k, v


class Unswapped(Layer):
    """Heads and tokens are not swapped before heads are joined."""

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).reshape(x.shape))


LEFT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "masked": lambda: Masked(apart),
    "crossed": lambda: Crossed(apart),
    "reversed": lambda: Reversed(apart),
    "cached": lambda: Cached(apart),
    "unswapped": lambda: Unswapped(apart),
    "interleaved": lambda: Layer(interleaved),
    "dropout": lambda: Layer(apart, dropout_p=0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_blocks_are_left_alone(name: str) -> None:
    model, x = LEFT_ALONE[name]().double(), batch(7)
    step, lines = captured(model, StreamQKV(rows=3))
    torch.manual_seed(1)
    out = step(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, model(x), rtol=0, atol=0)
    assert lines == []
