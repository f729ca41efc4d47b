"""A function of scalars over all pairs of a tile, under vmap: how FlexAttention calls a mod (arXiv 2412.05496)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def over_pairs(fn: Callable[..., Any], *arguments: Tensor) -> Any:
    """Call fn with scalars, under vmap over all dimensions of its arguments.

    arguments: tensors of one number of dimensions that broadcast. Returns a tensor that broadcasts with them.
    """
    with _IndexByTensor():
        return _mapped(fn, *arguments)


def _mapped(fn: Callable[..., Any], *arguments: Tensor) -> Any:
    if arguments[0].dim() == 0:
        return fn(*arguments)
    varies = [x.shape[0] != 1 for x in arguments]
    rest = [x if along else x.squeeze(0) for x, along in zip(arguments, varies, strict=True)]
    if not any(varies):
        return _mapped(fn, *rest).unsqueeze(0)
    in_dims = tuple(0 if along else None for along in varies)
    return torch.vmap(lambda *inner: _mapped(fn, *inner), in_dims=in_dims)(*rest)


class _IndexByTensor(TorchFunctionMode):
    """Makes table[i] of a scalar tensor i a gather, where torch would read the number i."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and has_scalar_tensor(args[1]):
            return gathered(args[0], args[1])
        return func(*args, **(kwargs or {}))


def has_scalar_tensor(index: Any) -> bool:
    """Whether an index holds a tensor of one number, which torch would read."""
    entries = index if isinstance(index, tuple) else (index,)
    return any(isinstance(entry, Tensor) and entry.dim() == 0 and entry.dtype != torch.bool for entry in entries)


def gathered(x: Tensor, index: Any) -> Tensor:
    """x[index], scalar tensors in the index as gathers; numbers, slices, None and ... as everywhere."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is Ellipsis for entry in entries):
        at = next(place for place, entry in enumerate(entries) if entry is Ellipsis)
        taken = sum(entry is not None and entry is not Ellipsis for entry in entries)
        entries[at : at + 1] = [slice(None)] * (x.dim() - taken)
    # Numbers, slices and new dimensions first; a tensor's place stays whole until the gather.
    plain = tuple(slice(None) if isinstance(entry, Tensor) else entry for entry in entries)
    tensors = [entry if isinstance(entry, Tensor) else None for entry in entries if isinstance(entry, Tensor | slice | None)]
    whole = x[plain] if any(entry != slice(None) for entry in plain) else x
    out: Tensor = torch.ops.aten.index(whole, tensors)
    return out
