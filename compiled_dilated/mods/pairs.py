"""Functions of scalars over all pairs of a tile, by vmap.

As in FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def over_pairs(fn: Callable[..., Any], *arguments: Tensor) -> Any:
    """Call fn with scalars, under vmap over all dimensions of its arguments.

    arguments: tensors that broadcast, all of one number of dimensions.

    Returns a tensor that broadcasts with them.
    """
    with _IndexByTensor():
        return _mapped(fn, *arguments)


def _mapped(fn: Callable[..., Any], *arguments: Tensor) -> Any:
    """One vmap per dimension of the arguments, the first outermost."""
    if arguments[0].dim() == 0:
        return fn(*arguments)
    # One vmap for the first dimension, over the arguments that vary along it.
    in_dims: list[int | None] = []
    inner = []
    for x in arguments:
        if x.shape[0] == 1:
            in_dims.append(None)
            inner.append(x.squeeze(0))
        else:
            in_dims.append(0)
            inner.append(x)
    if 0 not in in_dims:
        return _mapped(fn, *inner).unsqueeze(0)
    return torch.vmap(lambda *slices: _mapped(fn, *slices), in_dims=tuple(in_dims))(*inner)


class _IndexByTensor(TorchFunctionMode):
    """Evaluates table[i] of a scalar tensor i as a gather.

    torch would read the value of i.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and has_scalar_tensor(args[1]):
            return gathered(args[0], args[1])
        return func(*args, **(kwargs or {}))


def has_scalar_tensor(index: Any) -> bool:
    """Whether an index contains a scalar tensor, whose value torch would read."""
    for entry in _entries(index):
        if isinstance(entry, Tensor) and entry.dim() == 0 and entry.dtype != torch.bool:
            return True
    return False


def gathered(x: Tensor, index: Any) -> Tensor:
    """x[index] with scalar tensors as gathers.

    Numbers, slices, None and ... are as in torch.
    """
    entries = _without_ellipsis(_entries(index), x.dim())
    # 1. Numbers, slices and new dimensions: `plain` selects the whole of a tensor's dimension.
    # 2. The gather: a number's dimension is gone by then.
    plain: list[Any] = []
    tensors: list[Tensor | None] = []
    for entry in entries:
        if isinstance(entry, Tensor):
            plain.append(slice(None))
            tensors.append(entry)
            continue
        plain.append(entry)
        if isinstance(entry, slice | None):
            tensors.append(None)
    if any(entry != slice(None) for entry in plain):
        x = x[tuple(plain)]
    out: Tensor = torch.ops.aten.index(x, tensors)
    return out


def _entries(index: Any) -> list[Any]:
    """The entries of an index: several in x[i, j], one in x[i]."""
    if isinstance(index, tuple):
        return list(index)
    return [index]


def _without_ellipsis(entries: list[Any], dims: int) -> list[Any]:
    """The entries with `...` written out as slices.

    dims: of the indexed tensor.
    """
    # Compared by identity: a tensor == ... is no bool.
    for place, entry in enumerate(entries):
        if entry is Ellipsis:
            indexed = sum(index is not None and index is not Ellipsis for index in entries)
            slices = [slice(None)] * (dims - indexed)
            return [*entries[:place], *slices, *entries[place + 1 :]]
    return entries
