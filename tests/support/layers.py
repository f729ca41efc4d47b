"""Transformer blocks whose heads are packed and split in several ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graphs import Block, Gelu, Swiglu

WIDTH, HEADS = 16, 4
Heads = tuple[Tensor, Tensor, Tensor]


class Rotary(nn.Module):
    """Llama's rotary embedding.

    It rotates the halves of a head by the angles of its position.
    """

    def forward(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = heads[..., : heads.shape[-1] // 2], heads[..., heads.shape[-1] // 2 :]
        return heads * cos + torch.cat((-right, left), dim=-1) * sin


class Layer(nn.Module):
    """A transformer block.

    split: computes query, key and value heads from normed rows
    options: of F.scaled_dot_product_attention
    """

    def __init__(
        self,
        split: Callable[[nn.Module, Tensor], Heads],
        mlp: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        kv_heads = 2 if options.get("enable_gqa") else HEADS
        self.packed = nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.k, self.v = (
            nn.Linear(WIDTH, heads * WIDTH // HEADS, bias=False)
            for heads in (HEADS, kv_heads, kv_heads)
        )
        self.out, self.rotary = nn.Linear(WIDTH, WIDTH), Rotary()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.split, self.options = split, options
        self.mlp = Swiglu(WIDTH) if mlp is None else mlp

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        if angles:
            q, k = self.rotary(q, *angles), self.rotary(k, *angles)
        attended = F.scaled_dot_product_attention(q, k, v, **self.options)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.between(x))


def apart(layer: Any, h: Tensor) -> Heads:
    """A linear for each of q, k and v."""
    q, k, v = (
        linear(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
        for linear in (layer.q, layer.k, layer.v)
    )
    return q, k, v


def as_llama(layer: Any, h: Tensor) -> Heads:
    batch, tokens, _ = h.shape
    q, k, v = (
        linear(h).view(batch, tokens, -1, WIDTH // HEADS).transpose(1, 2)
        for linear in (layer.q, layer.k, layer.v)
    )
    return q, k, v


def as_gpt(layer: Any, h: Tensor) -> Heads:
    q, k, v = (
        part.view(*h.shape[:2], HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)
        for part in layer.packed(h).split(WIDTH, dim=2)
    )
    return q, k, v


def as_timm(layer: Any, h: Tensor) -> Heads:
    packed = layer.packed(h).reshape(*h.shape[:2], 3, HEADS, WIDTH // HEADS)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def unbound(layer: Any, h: Tensor) -> Heads:
    packed = layer.packed(h).unflatten(-1, (3, HEADS, -1))
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    return q, k, v


def interleaved(layer: Any, h: Tensor) -> Heads:
    """The q, k and v of a head are adjacent.

    The queries are no range of features.
    """
    q, k, v = layer.packed(h).unflatten(-1, (HEADS, 3, -1)).transpose(1, 2).unbind(3)
    return q, k, v


def angles(tokens: int, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """The cosines and sines of a rotary embedding, (*shape, tokens, 4)."""
    turns = torch.arange(tokens)[:, None] * torch.rand(2, dtype=torch.float64).repeat(2)
    return turns.cos().view(*shape, tokens, 4), turns.sin().view(*shape, tokens, 4)


def two_blocks() -> nn.Module:
    blocks = Block(Gelu(WIDTH), WIDTH), Block(Swiglu(WIDTH), WIDTH)
    return nn.Sequential(*blocks, nn.LayerNorm(WIDTH))


def after_an_embedding() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), Layer(apart))


# Models, and how many blocks of each are rewritten.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gelu": (lambda: Block(Gelu(WIDTH), WIDTH), 1),
    "two": (two_blocks, 2),
    "apart": (lambda: Layer(apart, is_causal=True), 1),
    "as llama": (lambda: Layer(as_llama, is_causal=True, enable_gqa=True), 1),
    "as gpt": (lambda: Layer(as_gpt, Gelu(WIDTH), is_causal=True, scale=0.3), 1),
    "as timm": (lambda: Layer(as_timm), 1),
    "unbound": (lambda: Layer(unbound, is_causal=True), 1),
    "after an embedding": (after_an_embedding, 1),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double().eval()


def batch(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64)
