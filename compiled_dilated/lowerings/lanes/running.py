"""The kernels of lanes as operators that torch.compile and AOTInductor see through. Imported where a kernel runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...partials import empty_out
from . import kernels

_LOG2_E = 1 / math.log(2)
_LISTS = "Tensor tiles, Tensor runs, Tensor classes"
_NUMBERS = "float scale, SymInt q_offset"


@dataclass(frozen=True)
class Blocks:
    """Rows of a tile, columns of a block, and how a program of the GPU works on them."""

    rows: int
    columns: int
    warps: int
    stages: int


def forward_blocks(width: int, itemsize: int) -> Blocks:
    """Blocks of the forward for heads of a width, a power of two: what fits 227 KiB without spills."""
    if itemsize == 4:
        return (
            Blocks(32, 32, 4, 2)
            if width <= 64
            else Blocks(32, 16, 4, 2)
            if width <= 128
            else Blocks(16, 16, 4, 1)
        )
    return Blocks(128, 64, 4, 3) if width <= 64 else Blocks(128, 64, 8, 2)


def backward_blocks(width: int, itemsize: int) -> Blocks:
    """Blocks of both kernels of the backward."""
    if itemsize == 4:
        return Blocks(32, 16, 4, 1) if width <= 64 else Blocks(16, 16, 4, 1)
    return (
        Blocks(64, 64, 4, 2)
        if width <= 64
        else Blocks(64, 64, 8, 2)
        if width <= 128
        else Blocks(64, 32, 8, 1)
    )


def padded(width: int) -> int:
    """The width that a kernel computes with: the next power of two, of at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, visibly to whoever traces the call. Triton's interpreter has functions of its own."""
    is_compiled = isinstance(kernel, triton.runtime.JITFunction)
    (torch.library.wrap_triton(kernel) if is_compiled else kernel)[grid](*arguments, **options)


def _options(q: Tensor, v: Tensor, blocks: Blocks) -> dict[str, int]:
    return {
        "D": q.shape[3],
        "DV": v.shape[3],
        "BLOCK_D": padded(q.shape[3]),
        "BLOCK_V": padded(v.shape[3]),
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _width(q: Tensor, v: Tensor) -> int:
    return max(padded(q.shape[3]), padded(v.shape[3]))


@torch.library.triton_op(
    "compiled_dilated::lanes_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LISTS}, {_NUMBERS}, bool by_token) -> (Tensor, Tensor)",
)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    runs: Tensor,
    classes: Tensor,
    scale: float,
    q_offset: int,
    by_token: bool,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N) of lists over queries."""
    batch, heads = q.shape[:2]
    out = empty_out(q, v, by_token)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    blocks = forward_blocks(_width(q, v), q.element_size())
    _launch(
        kernels.forward, (tiles.shape[1], batch * heads),
        q, k, v, out, lse, tiles, runs, classes, scale * _LOG2_E, q_offset, heads, heads // k.shape[1], tiles.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2], **_options(q, v, blocks),
    )  # fmt: skip
    return out, lse


@torch.library.triton_op(
    "compiled_dilated::lanes_grad_queries",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor grad_out, Tensor lse, Tensor delta, {_LISTS}, {_NUMBERS}) -> Tensor",
)
def grad_queries(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor,
    tiles: Tensor, runs: Tensor, classes: Tensor, scale: float, q_offset: int,
) -> Tensor:  # fmt: skip
    """The gradient of q (B, Hq, N, D) of lists over queries. lse, delta: (B, Hq, N), contiguous, +inf and 0 in dead rows."""
    batch, heads = q.shape[:2]
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = backward_blocks(_width(q, v), q.element_size())
    _launch(
        kernels.grad_queries, (tiles.shape[1], batch * heads),
        q, k, v, grad_out, lse, delta, grad_q, tiles, runs, classes,
        scale * _LOG2_E, scale, q_offset, heads, heads // k.shape[1], tiles.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *lse.stride()[:2], *grad_q.stride()[:3],
        **_options(q, v, blocks),
    )  # fmt: skip
    return grad_q


@torch.library.triton_op(
    "compiled_dilated::lanes_grad_keys",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor grad_out, Tensor lse, Tensor delta, {_LISTS}, {_NUMBERS}) -> (Tensor, Tensor)",
)
def grad_keys(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor,
    tiles: Tensor, runs: Tensor, classes: Tensor, scale: float, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v, of lists over keys."""
    batch, kv_heads = k.shape[:2]
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    blocks = backward_blocks(_width(q, v), q.element_size())
    _launch(
        kernels.grad_keys, (tiles.shape[1], batch * kv_heads),
        q, k, v, grad_out, lse, delta, grad_k, grad_v, tiles, runs, classes,
        scale * _LOG2_E, scale, q_offset, kv_heads, q.shape[1] // kv_heads, tiles.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *lse.stride()[:2],
        *grad_k.stride()[:3], *grad_v.stride()[:3], **_options(q, v, blocks),
    )  # fmt: skip
    return grad_k, grad_v
