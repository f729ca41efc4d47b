"""Workspace of operators: bytes that kernels allocate and free while running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments

Operator = torch._ops.OpOverload
aten = torch.ops.aten


def workspace(op: Operator, bytes_of: Callable[..., int]) -> None:
    """Register the workspace of an operator, in place of an earlier registration.

    bytes_of: called with the arguments of a call, tensors without data; returns bytes
    """
    if not isinstance(op, Operator):
        raise TypeError(
            f"op must be an operator's overload, as torch.ops.aten.mm.default; got {op!r}"
        )
    arguments.function("bytes_of", bytes_of)
    _REGISTERED[op] = bytes_of


def workspace_default(op: Operator, bytes_of: Callable[..., int]) -> None:
    """Register the workspace of an operator unless it has one.

    bytes_of: as for `workspace`
    """
    _REGISTERED.setdefault(op, bytes_of)


def registered() -> list[Callable[..., int]]:
    """List the registered functions."""
    return list(_REGISTERED.values())


def workspace_bytes(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The workspace of a call in bytes, 0 if not registered."""
    if op not in _REGISTERED:
        return 0
    return _REGISTERED[op](*args, **kwargs)


def _flash(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """The workspace of a forward of aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.

    Per thread: a tile of scores, two statistics a row, a tile of the result. In 16 bits also the
    rounded scores and, for AMX, packed keys and values.
    """
    threads = torch.get_num_threads()
    rows, columns, statistic_bytes = _tile(query, key)
    # Scores, the maximum and the sum of each row, and the result, all in the statistics' dtype.
    numbers = rows * columns + 2 * rows + rows * query.shape[-1]
    size = threads * numbers * statistic_bytes
    if query.element_size() == 2:
        if _packs(query, key, rows):
            size += 2 * _packed_numbers(key, rows, columns)
        else:
            size += 2 * threads * rows * columns
    return size


def _flash_backward(grad_out: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """The workspace of a backward of the same file.

    Per thread two tiles of scores; a row of sums; a copy of the gradient unless its memory is
    contiguous by token. Excludes what oneDNN allocates for products of 16-bit tiles, at most
    1 MiB a thread: that depends on the CPU.
    """
    rows, columns, statistic_bytes = _tile(query, key)
    # Scores and their gradient, and both rounded to 16 bits for the products.
    tile_bytes = 2 * rows * columns * statistic_bytes
    if query.element_size() == 2:
        tile_bytes += 2 * rows * columns * query.element_size()
    size = torch.get_num_threads() * tile_bytes + rows * statistic_bytes
    if not grad_out.transpose(1, 2).is_contiguous():
        size += grad_out.numel() * grad_out.element_size()
    return size


def _tile(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a score tile, and bytes of one statistic."""
    tokens = query.shape[2]
    if tokens >= 768:
        rows = 256
    elif tokens >= 192:
        rows = 64
    else:
        rows = 32
    return min(rows, tokens), min(512, key.shape[2]), max(4, query.element_size())


def _packs(query: Tensor, key: Tensor, rows: int) -> bool:
    """Whether a forward packs keys and values for AMX.

    That pays if they are read often enough.
    """
    is_bfloat16 = query.dtype == torch.bfloat16
    if is_bfloat16:
        has_amx = torch.cpu._is_amx_tile_supported()
        least_tokens, least_reads = 64, 4
    else:
        has_amx = torch.cpu._is_amx_fp16_supported()
        least_tokens, least_reads = 16, 1
    if not has_amx or not torch._C._get_mkldnn_enabled():
        return False
    if min(query.shape[2], key.shape[2]) < least_tokens:
        return False
    # How many rows of queries each thread computes for one head of keys.
    tiles = query.shape[0] * query.shape[1] * -(-query.shape[2] // rows)
    tiles_per_thread = -(-tiles // torch.get_num_threads())
    return tiles_per_thread * rows / (key.shape[0] * key.shape[1]) >= least_reads


def _packed_numbers(key: Tensor, rows: int, columns: int) -> int:
    """Elements that a packing forward allocates.

    Odd head dims and odd blocks are padded by one.
    """
    batch, heads, tokens, head_dim = key.shape
    full_blocks, last = (tokens - 1) // columns, (tokens - 1) % columns + 1
    padded_tokens = full_blocks * _even(columns) + _even(last)
    # Keys are packed once for both products, values by blocks.
    packed = batch * heads * (_even(head_dim) * tokens + padded_tokens * head_dim)
    per_thread = rows * _even(columns) + columns * head_dim
    if head_dim % 2:
        per_thread += rows * _even(head_dim)
    return packed + torch.get_num_threads() * per_thread


def _even(count: int) -> int:
    """Round up to an even number."""
    return count + count % 2


# The operators with a workspace. `workspace` adds to them.
_REGISTERED: dict[Operator, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
}
