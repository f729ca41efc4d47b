"""A case: a program, its inputs and its data, at ragged lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.masks import Mask

# One token, two, around a power of two, and a prime that is more than one tile of every lowering
# and divisible by no segment or rate.
LENGTHS = (1, 2, 127, 128, 129, 331)
BATCH, HEAD_DIM = 2, 8
# On a CPU auto is the native kernel; with COMPILED_DILATED_NATIVE=off it is that of a machine
# without a compiler.
LOWERINGS = ("auto", "dense", "strided", "tiled")

ProgramOf = Callable[[int], Program | Mask]
DataOf = Callable[[int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, and the incoming gradients.

    q: (B, Hq, N, D), a leaf, as k (B, Hkv, M, D) and v (B, Hkv, M, Dv).
    data: the tensors that masks read, by name.
    grad_out: (B, Hq, N, Dv).
    grad_lse: (B, Hq, N).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    data: dict[str, Tensor]
    grad_out: Tensor
    grad_lse: Tensor


@dataclass(frozen=True)
class Case:
    """A program and the shapes that it is tested at.

    program: the program for a number of positions.
    refused: a part of the strided lowering's refusal; None if it computes the case.
    data: the data tensors for (batch, positions).
    crossed: whether queries and keys may be different tokens, which an order does not allow.
    """

    name: str
    program: ProgramOf
    refused: str | None = "is not made of regular blocks"
    heads: int = 4
    kv_heads: int = 2
    value_dim: int = HEAD_DIM
    lengths: tuple[int, ...] = LENGTHS
    data: DataOf | None = field(default=None, repr=False)
    crossed: bool = True

    def inputs(
        self, n: int, dtype: torch.dtype, q_len: int | None = None, kv_len: int | None = None
    ) -> Inputs:
        """Random inputs, the same at every call.

        n: number of positions.
        q_len, kv_len: number of queries and of keys; default n.
        """
        q_len, kv_len = n if q_len is None else q_len, n if kv_len is None else kv_len
        generator = torch.Generator().manual_seed(n)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        q = normal(BATCH, self.heads, q_len, HEAD_DIM)
        k = normal(BATCH, self.kv_heads, kv_len, HEAD_DIM)
        v = normal(BATCH, self.kv_heads, kv_len, self.value_dim)
        grad_out = normal(BATCH, self.heads, q_len, self.value_dim).to(dtype)
        grad_lse = normal(BATCH, self.heads, q_len)
        grad_lse = grad_lse.to(torch.promote_types(dtype, torch.float32))
        q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
        data = {} if self.data is None else self.data(BATCH, n)
        return Inputs(q, k, v, data, grad_out, grad_lse)

    def __str__(self) -> str:
        return self.name


def grid_of(n: int, axes: int = 2) -> tuple[int, ...]:
    """The grid of n cells nearest to a square or cube.

    A prime gives a line.
    """
    if axes == 1:
        return (n,)
    size = max(size for size in range(1, n + 1) if n % size == 0 and size**axes <= n)
    return (size, *grid_of(n // size, axes - 1))


def document_ids(batch: int, n: int) -> dict[str, Tensor]:
    """Documents of about 40 tokens.

    The second batch entry has other documents, whose ids come back.
    """
    at = torch.arange(n)
    return {"documents": torch.stack([at // 40, (at + 13) // 37 % 3][:batch])}


def some_padding(batch: int, n: int) -> dict[str, Tensor]:
    """A padded end in the first batch entry, holes in the second.

    The first token is among the holes.
    """
    at = torch.arange(n)
    return {"padding": torch.stack([at >= max(1, n - n // 3), at % 3 == 0][:batch])}


def all_padding(batch: int, n: int) -> dict[str, Tensor]:
    """All of the first batch entry, and half of the second.

    The half is the second half.
    """
    all_tokens, second_half = torch.ones(n, dtype=torch.bool), torch.arange(n) > n // 2
    return {"padding": torch.stack([all_tokens, second_half][:batch])}


def both_data(batch: int, n: int) -> dict[str, Tensor]:
    return document_ids(batch, n) | some_padding(batch, n)


def some_global(batch: int, n: int) -> dict[str, Tensor]:
    """Scattered global tokens, others in the second batch entry."""
    at = torch.arange(n)
    return {"is_global": torch.stack([at % 61 == 5, (at == 0) | (at == n - 1)][:batch])}


def odd_keys(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return ((q + kv) % 3 == 0) | (q == kv)


def head_distance(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return abs(q - kv) <= h * 3


def batch_distance(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return abs(q - kv) <= b * 5 + 1


def checkered(n: int, block: int) -> Mask:
    """Tiles on a diagonal, scattered ones, and half of the first column.

    The last row of tiles sees nothing.
    """
    size = max(1, n // block)
    tiles = []
    for i in range(size):
        for j in range(size):
            if j in (i, (i * 5) % size) or (j == 0 and i % 2):
                tiles.append((i, j))
    return masks.tiles(tiles, block)


def random_blocks(n: int, block: int) -> Mask:
    """Three random blocks per row, if there are as many."""
    return masks.random_blocks(block, min(3, -(-n // block)), n, seed=7)


def grid_within(n: int, axes: int = 2) -> tuple[tuple[int, ...], int]:
    """A grid and its start within n tokens.

    Two tokens come before it and one after it if n is large enough.
    """
    cells = max(1, n - 3)
    return grid_of(cells, axes), min(2, n - cells)


def window_within(n: int) -> Program:
    """A neighborhood on `grid_within` in Hilbert order.

    The tokens before the grid are global.
    """
    grid, offset = grid_within(n)
    mask = masks.neighborhood(grid, 3, offset=offset) | masks.global_tokens(offset)
    return in_order(mask, orders.hilbert(*grid, offset=offset))


def in_order(mask: Mask, order: orders.Order) -> Program:
    return Program((Branch(mask, order=order),))


def regular(name: str, program: ProgramOf, **options: Any) -> Case:
    """A case that the strided lowering computes."""
    return Case(name, program, None, **options)
