"""Tensors of a call under torch.vmap, folded into the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .execution import Options


def operands_vary(options: Options, dims: Sequence[int | None]) -> bool:
    """Whether torch.vmap maps over operands.

    Every entry then has its own rule.
    """
    return any(dim is not None for dim in dims[options.data :])


def one_by_one(function: Any, size: int, dims: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """Call the function per entry of the vmapped dimension; stack the results."""
    results = []
    for entry in range(size):
        arguments = []
        for x, dim in zip(inputs, dims, strict=True):
            arguments.append(x if dim is None else x.select(dim, entry))
        results.append(function.apply(*arguments))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def batch_size(x: Tensor, dim: int | None) -> int:
    """The batch size of x, its vmapped dimension left out."""
    return x.shape[1 if dim == 0 else 0]


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x (..., size, ...) with the vmapped dimension in the batch."""
    return _vmapped_first(x, dim, size).flatten(0, 1)


def _vmapped_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x (size, ...): the vmapped dimension first, expanded if there is none."""
    if dim is None:
        return x.unsqueeze(0).expand(size, *x.shape)
    return x.movedim(dim, 0)


def fold_data(
    options: Options, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, batch: int
) -> list[Tensor]:
    """Data folded like q, k and v, and operands unchanged.

    size: of the vmapped dimension.
    batch: of q. Data of batch 1 are expanded to it.
    """
    folded = []
    for x, dim in zip(tensors[: options.data], dims, strict=False):
        x = _vmapped_first(x, dim, size)
        folded.append(x.expand(size, batch, *x.shape[2:]).flatten(0, 1))
    return [*folded, *tensors[options.data :]]
