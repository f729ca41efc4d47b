"""Rules for views, copies, conversions and lookups: entries of an operand at other indices.

See creation.py for what a rule is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .expressions import Expression, constant
from .reader import Call, is_one
from .scopes import example_of
from .simplify import apply

At = tuple[Expression, ...]
_ZERO = constant(0, torch.int64)


def copied(call: Call, at: At, x: Any, **options: Any) -> Expression:
    """The same entry."""
    return call.at(x, at)


def converted(call: Call, at: At, x: Any, *arguments: Any, **options: Any) -> Expression:
    """The entry in the dtype of the result."""
    return apply("to", (call.at(x, at),), call.dtype)


def expand(call: Call, at: At, x: Any, *shape: Any, **options: Any) -> Expression:
    """The entry at the last indices; `Call.at` gives dimensions of size 1 the index 0."""
    return call.at(x, at)


def unsqueeze(call: Call, at: At, x: Any, dim: int) -> Expression:
    """The entry without the index along the new dimension."""
    new = dim % len(at)
    return call.at(x, at[:new] + at[new + 1 :])


def squeeze(call: Call, at: At, x: Any, dim: int) -> Expression:
    """The entry with index 0 along the dimension that was left out, if any was."""
    dims = len(example_of(x).shape)
    if dims != len(at):
        at = (*at[: dim % dims], _ZERO, *at[dim % dims :])
    return call.at(x, at)


def transpose(call: Call, at: At, x: Any, dim0: int, dim1: int) -> Expression:
    """Two indices exchanged."""
    places = list(at)
    places[dim0], places[dim1] = places[dim1], places[dim0]
    return call.at(x, tuple(places))


def t(call: Call, at: At, x: Any) -> Expression:
    """The indices reversed."""
    return call.at(x, at[::-1])


def permute(call: Call, at: At, x: Any, *dims: Any) -> Expression:
    """The indices in the operand's order."""
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    places = list(at)
    for place, dim in zip(at, order, strict=True):
        places[dim] = place
    return call.at(x, tuple(places))


def reshape(call: Call, at: At, x: Any, *shape: Any) -> Expression | None:
    """Dimensions of size 1 added or removed; None for any other reshape."""
    old, new = list(example_of(x).shape), list(call.shape)
    if [size for size in old if not is_one(size)] != [size for size in new if not is_one(size)]:
        return None
    indices = (index for index, size in zip(at, new, strict=True) if not is_one(size))
    places = tuple(_ZERO if is_one(size) else next(indices) for size in old)
    return call.at(x, places)


def getitem(call: Call, at: At, x: Any, index: Any) -> Expression | None:
    """x[...] of None, slices, integers, or tensors of indices for the first dimensions."""
    items = list(index) if isinstance(index, tuple) else [index]
    value = example_of(x)
    if not isinstance(value, Tensor):
        return None
    if any(isinstance(item, Node) and isinstance(example_of(item), Tensor) for item in items):
        return _looked_up(call, at, x, items)
    # `...`, or the end, stands for all dimensions without an item.
    missing = value.dim() - sum(item is not None and item is not ... for item in items)
    place = items.index(...) if ... in items else len(items)
    items[place : place + 1] = [slice(None)] * missing
    indices = iter(at)
    places: list[Expression] = []
    for item in items:
        if item is None:
            next(indices)
            continue
        part = _part(item, value.shape[len(places)], indices)
        if part is None:
            return None
        places.append(part)
    return call.at(x, tuple(places))


def _part(item: Any, size: Any, indices: Iterator[Expression]) -> Expression | None:
    """The index along one dimension, by its item of x[...].

    size: of the dimension. indices: those of the result that are not used yet.
    """
    if isinstance(item, int):
        if item < 0 and not isinstance(size, int):
            return None
        return constant(item if item >= 0 else size + item, torch.int64)
    if not isinstance(item, slice):
        return None
    start = item.start or 0
    step = 1 if item.step is None else item.step
    if not isinstance(start, int) or not isinstance(step, int) or start < 0:
        return None
    place = next(indices)
    if step != 1:
        place = apply("mul", (place, constant(step, torch.int64)), torch.int64)
    if start:
        place = apply("add", (place, constant(start, torch.int64)), torch.int64)
    return place


def _looked_up(call: Call, at: At, x: Node, items: Sequence[Any]) -> Expression | None:
    """table[i, j] with tensors of indices that broadcast; whole dimensions may follow."""
    # Tensors beside slices or numbers: not read.
    examples = [example_of(item) if isinstance(item, Node) else item for item in items]
    if not all(isinstance(example, Tensor) for example in examples):
        return None
    # A tensor of bool selects entries: their number depends on data.
    if any(example.dtype.is_floating_point or example.dtype == torch.bool for example in examples):
        return None
    dims = max(example.dim() for example in examples)
    return call.at(x, (*(call.at(item, at[:dims]) for item in items), *at[dims:]))


def embedding(
    call: Call, at: At, x: Any, weight: Any, *arguments: Any, **options: Any
) -> Expression | None:
    """The entry of a table, by F.embedding without options."""
    # Options scale gradients and weights; torch.embedding takes the operands in another order.
    if call.node.target is not F.embedding or any(arguments) or any(options.values()):
        return None
    return call.at(weight, (call.at(x, at[:-1]), at[-1]))
