"""The kernels of lanes as operators that torch.compile and AOTInductor trace into.

Imported where a kernel runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...partials import empty_out
from . import kernels
from .blocks import Blocks, backward_blocks, forward_blocks, padded, widest
from .lists import Tiling

_LOG2_E = 1 / math.log(2)
_QKV = "Tensor q, Tensor k, Tensor v"
_SAVED = "Tensor grad_out, Tensor lse, Tensor delta"
_LISTS = "Tensor tiles, Tensor runs, Tensor classes, Tensor bad"
_NUMBERS = "float scale, SymInt q_offset"
_OF_BACKWARD = f"{_QKV}, {_SAVED}, {_LISTS}, {_NUMBERS}"


def has_bad(*tensors: Tensor) -> Tensor:
    """1 if a tensor contains NaN or infinity, else 0; int32, (1,).

    Computed on the GPU without waiting for it. A sum that overflows gives 1 too, which costs time
    and changes no result.
    """
    total = torch.stack([x.sum(dtype=torch.float32) for x in tensors]).sum()
    return (~total.isfinite()).to(torch.int32).reshape(1)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, or record the launch in a traced graph."""
    torch.library.wrap_triton(kernel)[grid](*arguments, **options)


def _options(q: Tensor, v: Tensor, blocks: Blocks) -> dict[str, int]:
    """The constants of a launch."""
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


@torch.library.triton_op(
    "compiled_dilated::lanes_forward",
    mutates_args=(),
    schema=f"({_QKV}, {_LISTS}, {_NUMBERS}, int step, bool by_token) -> (Tensor, Tensor)",
)
def forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, runs: Tensor, classes: Tensor, bad: Tensor,
    scale: float, q_offset: int, step: int, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, Hq, N, Dv) and lse (B, Hq, N).

    tiles, runs, classes: lists over queries.
    bad: of k and v, as `has_bad`.
    step: 0 for lists of this call alone. Else that of the lists' tiling, which reaches from
        position 0 past this call (`lists.Tiling.reach`).
    by_token: memory format of out, as of `partials.empty_out`.
    """
    batch, heads = q.shape[:2]
    out = empty_out(q, v, by_token)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    blocks = forward_blocks(widest(q, v), q.element_size())
    first_tile, count = 0, tiles.shape[1]
    if step:
        tiling = Tiling(blocks.rows, blocks.columns, step)
        first_tile, count = tiling.span(q_offset, q.shape[2])
    _launch(
        kernels.forward, (count, batch * heads),
        q, k, v, out, lse, tiles, runs, classes, bad,
        scale * _LOG2_E, q_offset, heads, heads // k.shape[1], tiles.shape[1],
        first_tile, q.shape[2], k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        **_options(q, v, blocks), CUT=step > 0,
    )  # fmt: skip
    return out, lse


@torch.library.triton_op(
    "compiled_dilated::lanes_grad_queries",
    mutates_args=(),
    schema=f"({_OF_BACKWARD}) -> Tensor",
)
def grad_queries(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor,
    tiles: Tensor, runs: Tensor, classes: Tensor, bad: Tensor, scale: float, q_offset: int,
) -> Tensor:  # fmt: skip
    """The gradient of q (B, Hq, N, D).

    lse, delta: (B, Hq, N), contiguous; +inf and 0 in rows that see nothing.
    tiles, runs, classes: lists over queries.
    bad: of q, k, v and delta, as `has_bad`.
    """
    batch, heads = q.shape[:2]
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = backward_blocks(widest(q, v), q.element_size())
    _launch(
        kernels.grad_queries, (tiles.shape[1], batch * heads),
        q, k, v, grad_out, lse, delta, grad_q, tiles, runs, classes, bad,
        scale * _LOG2_E, scale, q_offset, heads, heads // k.shape[1], tiles.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
        *lse.stride()[:2], *grad_q.stride()[:3], **_options(q, v, blocks),
    )  # fmt: skip
    return grad_q


@torch.library.triton_op(
    "compiled_dilated::lanes_grad_keys",
    mutates_args=(),
    schema=f"({_OF_BACKWARD}) -> (Tensor, Tensor)",
)
def grad_keys(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor,
    tiles: Tensor, runs: Tensor, classes: Tensor, bad: Tensor, scale: float, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v.

    Returns tensors (B, Hkv, M, D) and (B, Hkv, M, Dv).

    tiles, runs, classes: lists over keys. Other arguments as of `grad_queries`.
    """
    batch, kv_heads = k.shape[:2]
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    blocks = backward_blocks(widest(q, v), q.element_size())
    _launch(
        kernels.grad_keys, (tiles.shape[1], batch * kv_heads),
        q, k, v, grad_out, lse, delta, grad_k, grad_v, tiles, runs, classes, bad,
        scale * _LOG2_E, scale, q_offset, kv_heads, q.shape[1] // kv_heads, tiles.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
        *lse.stride()[:2], *grad_k.stride()[:3], *grad_v.stride()[:3], **_options(q, v, blocks),
    )  # fmt: skip
    return grad_k, grad_v
