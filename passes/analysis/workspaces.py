"""What kernels hold for themselves while they run, beside operands and results, as far as it is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments

Operator = torch._ops.OpOverload
_KNOWN: dict[Operator, Callable[..., int]] = {}


def workspace(op: Operator, bytes_of: Callable[..., int]) -> None:
    """Says that `op` holds bytes_of(*args, **kwargs) beside its operands and results while it runs.

    The arguments are those of the call, tensors without data. A second call for an operator replaces the first.
    """
    if not isinstance(op, Operator):
        raise TypeError(f"op must be an operator's overload, as torch.ops.aten.mm.default; got {op!r}")
    arguments.function("bytes_of", bytes_of)
    _KNOWN[op] = bytes_of


def tellers() -> list[Callable[..., int]]:
    """All functions that say what an operator holds."""
    return list(_KNOWN.values())


def workspace_bytes(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What a call holds for itself; 0 of operators of which nothing was said."""
    return _KNOWN[op](*args, **kwargs) if op in _KNOWN else 0


def _flash(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: per thread a tile of scores, two statistics and a tile of the result.

    In 16 bits also the scores rounded and, for AMX, keys and values packed.
    """
    threads, (rows, columns, statistic) = torch.get_num_threads(), _tile(query, key)
    held = threads * (rows * columns + 2 * rows + rows * query.shape[-1]) * statistic
    if query.element_size() == 2:
        held += 2 * (_packed(key, rows, columns) if _packs(query, key, rows) else threads * rows * columns)
    return held


def _flash_backward(grad_out: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """The same file: per thread two tiles of scores; one row of sums; the gradient, where it does not lie token by token.

    Not what oneDNN takes for its products of 16-bit tiles, at most 1 MiB a thread: it depends on the CPU.
    """
    rows, columns, statistic = _tile(query, key)
    rounded = 2 * rows * columns * query.element_size() if query.element_size() == 2 else 0
    copied = 0 if grad_out.transpose(1, 2).is_contiguous() else grad_out.numel() * grad_out.element_size()
    return torch.get_num_threads() * (2 * rows * columns * statistic + rounded) + rows * statistic + copied


def _tile(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a tile of scores, and the bytes of a statistic."""
    tokens = query.shape[2]
    rows = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    return min(rows, tokens), min(512, key.shape[2]), max(4, query.element_size())


def _packs(query: Tensor, key: Tensor, rows: int) -> bool:
    """Whether a forward rearranges all keys and values for AMX: where each is read often enough."""
    bfloat16 = query.dtype == torch.bfloat16
    has_unit = torch.cpu._is_amx_tile_supported() if bfloat16 else torch.cpu._is_amx_fp16_supported()
    if not (has_unit and torch._C._get_mkldnn_enabled()) or min(query.shape[2], key.shape[2]) < (64 if bfloat16 else 16):
        return False
    tiles = query.shape[0] * query.shape[1] * -(-query.shape[2] // rows)
    reads = -(-tiles // torch.get_num_threads()) * rows / (key.shape[0] * key.shape[1])
    return reads >= (4 if bfloat16 else 1)


def _packed(key: Tensor, rows: int, columns: int) -> int:
    """Numbers held by a forward that packs: odd widths and odd blocks of keys are padded by one, rounded scores with them."""
    batch, heads, keys, width = key.shape
    blocks, last = (keys - 1) // columns, (keys - 1) % columns + 1
    padded = blocks * _even(columns) + _even(last)
    per_thread = rows * _even(columns) + columns * width + (rows * _even(width) if width % 2 else 0)
    return batch * heads * (_even(width) * keys + padded * width) + torch.get_num_threads() * per_thread


def _even(count: int) -> int:
    return count + count % 2


workspace(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, _flash)
workspace(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default, _flash_backward)
