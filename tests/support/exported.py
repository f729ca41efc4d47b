"""Models to export, with their inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.masks import Mask
from tests.functions import Parameters

HEADS, N = 4, 48


def same(results: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


def tensors(
    n: int = N, kv_heads: int = HEADS, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """q (2, HEADS, n, 8), k and v (2, kv_heads, n, 8)."""
    generator = torch.Generator().manual_seed(n)
    return tuple(
        torch.randn(2, h, n, 8, generator=generator, dtype=torch.float64).to(dtype)
        for h in (HEADS, kv_heads, kv_heads)
    )


class Plain(nn.Module):
    """One compiled program."""

    def __init__(self, program: Program | Mask, **options: Any) -> None:
        super().__init__()
        self.attend = cd.compile(program, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, return_lse=True)


class WithData(nn.Module):
    """A program that reads data tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal() & masks.documents(ids="ids") & masks.padding())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, padding: Tensor) -> Any:
        return self.attend(q, k, v, data={"ids": ids, "padding": padding})


class Learned(nn.Module):
    """A score_mod and a mask_mod as methods that read parameters and buffers."""

    kind: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.slopes = nn.Parameter(torch.rand(HEADS, generator=generator, dtype=torch.float64))
        self.rows = nn.Parameter(torch.randn(64, 3, generator=generator, dtype=torch.float64))
        self.register_buffer("kind", torch.randint(0, 3, (64,), generator=generator))
        self.attend = cd.compile(masks.from_mod(self.mask_mod, within=masks.causal()))

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (self.kind[i] == self.kind[j]) | (i - j < 3)

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - self.slopes[h] * (i - j) + (self.rows[i] * self.rows[j]).sum()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, score_mod=self.score_mod)


class Closures(nn.Module):
    """Functions that capture a number and a tensor outside of the model."""

    def __init__(self) -> None:
        super().__init__()
        parameters = Parameters.of(HEADS, 64)
        table, reach = parameters.table.detach(), 5
        self.mod = lambda score, b, h, i, j: 9 * torch.tanh(score / 9) + table[i, j]
        self.attend = cd.compile(masks.from_mod(lambda b, h, i, j: (i - j).abs() <= reach + h))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, score_mod=self.mod)


def many_tiles() -> Mask:
    """3,600 tiles of one token."""
    pairs = itertools.product(range(120), repeat=2)
    return masks.tiles([(i, j) for i, j in pairs if (i * 7 + j) % 4 == 0 or i == j], block=1)


def many_documents() -> Mask:
    """Hundreds of documents, some of them empty."""
    return masks.documents(lengths=tuple(number % 4 for number in range(400))) & masks.causal()


@dataclass(frozen=True)
class Model:
    """A model to export, and a function that makes its inputs.

    The inputs depend on a length.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]] = tensors


def with_data(n: int) -> tuple[Tensor, ...]:
    """q, k, v, documents' ids and padding (2, n)."""
    places = torch.arange(n)
    ids = torch.stack([places // 7, places // 11])
    return (*tensors(n), ids, torch.stack([places > n - 4, places % 5 == 1]))


def tokens_first(n: int) -> tuple[Tensor, ...]:
    """q, k and v in float32 as (batch, tokens, heads, head_dim)."""
    return tuple(x.transpose(1, 2).float().contiguous() for x in tensors(n))


MODELS: dict[str, Model] = {
    "longnet": Model(lambda: Plain(cd.longnet((8, 24), (1, 3), causal=True))),
    "hilbert": Model(lambda: Plain(cd.hilbert_window((6, 8), 2))),
    "ring": Model(lambda: Plain(masks.causal() | masks.sinks(2), ranks=2)),
    "tiled": Model(lambda: Plain(masks.window(5) | masks.sinks(2), lowering="tiled")),
    "data": Model(WithData, with_data),
    "many tiles": Model(lambda: Plain(many_tiles())),
    "many documents": Model(lambda: Plain(many_documents())),
    "grouped heads": Model(
        lambda: Plain(cd.longnet((8, 24), (2, 4))), lambda n: tensors(n, kv_heads=2)
    ),
    "parameters": Model(Learned),
    "closures": Model(Closures),
    "variant": Model(lambda: cd.variant("BlockSparse_LocalWindow_0.95"), tokens_first),
}


def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score + (i - j) / 8
