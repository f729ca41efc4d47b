"""Rules for views, copies, conversions and lookups.

An entry of their result is one of an operand, at other indices. Rules are defined in creation.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .expressions import ZERO, At, Expression, constant
from .reader import Call, is_one
from .scopes import example_of
from .simplify import apply


def copied(call: Call, at: At, x: Any, **options: Any) -> Expression:
    """The same entry."""
    return call.at(x, at)


def converted(call: Call, at: At, x: Any, *arguments: Any, **options: Any) -> Expression:
    """The entry in the dtype of the result."""
    return apply("to", (call.at(x, at),), call.dtype)


def expand(call: Call, at: At, x: Any, *shape: Any, **options: Any) -> Expression:
    """The entry at the last indices.

    `Call.at` replaces the index along dimensions of size 1 by 0.
    """
    return call.at(x, at)


def unsqueeze(call: Call, at: At, x: Any, dim: int) -> Expression:
    """The entry without the index along the new dimension."""
    new = dim % len(at)
    return call.at(x, at[:new] + at[new + 1 :])


def squeeze(call: Call, at: At, x: Any, dim: Any) -> Expression | None:
    """The entry with index 0 along the removed dimension, if any.

    None for several dimensions.
    """
    if not isinstance(dim, int):
        return None
    dims = len(example_of(x).shape)
    if dims != len(at):
        at = (*at[: dim % dims], ZERO, *at[dim % dims :])
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
    order: Sequence[Any] = dims
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        order = dims[0]
    places = list(at)
    for place, dim in zip(at, order, strict=True):
        places[dim] = place
    return call.at(x, tuple(places))


def reshape(call: Call, at: At, x: Any, *shape: Any) -> Expression | None:
    """Dimensions of size 1 added or removed; None for any other reshape.

    `view` of another dtype reads the bits of an entry anew: None.
    """
    if call.dtype != example_of(x).dtype:
        return None
    old, new = list(example_of(x).shape), list(call.shape)
    if [size for size in old if not is_one(size)] != [size for size in new if not is_one(size)]:
        return None
    indices = (index for index, size in zip(at, new, strict=True) if not is_one(size))
    places: list[Expression] = []
    for size in old:
        places.append(ZERO if is_one(size) else next(indices))
    return call.at(x, tuple(places))


def getitem(call: Call, at: At, x: Any, index: Any) -> Expression | None:
    """x[...] of None, slices, integers, or leading tensors of indices."""
    items = list(index) if isinstance(index, tuple) else [index]
    value = example_of(x)
    if not isinstance(value, Tensor):
        return None
    if any(isinstance(item, Node) and isinstance(example_of(item), Tensor) for item in items):
        return _looked_up(call, at, x, items)
    # `...`, or the end, is replaced by slices of all dimensions without an item.
    missing = value.dim() - sum(item is not None and item is not ... for item in items)
    if ... not in items:
        items.append(...)
    place = items.index(...)
    items[place : place + 1] = [slice(None)] * missing
    # Items consume indices of the result, and add the operand's.
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
        if item >= 0:
            return constant(item, torch.int64)
        # Counted from the end, which must be known.
        if not isinstance(size, int):
            return None
        return constant(size + item, torch.int64)
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
    dims = 0
    for item in items:
        example = example_of(item) if isinstance(item, Node) else item
        # Tensors beside slices or numbers: not read.
        if not isinstance(example, Tensor):
            return None
        # A tensor of bool selects entries: their number depends on data.
        if example.dtype.is_floating_point or example.dtype == torch.bool:
            return None
        dims = max(dims, example.dim())
    places = [call.at(item, at[:dims]) for item in items]
    return call.at(x, (*places, *at[dims:]))


def embedding(
    call: Call, at: At, x: Any, weight: Any, *arguments: Any, **options: Any
) -> Expression | None:
    """The entry of a table, by F.embedding without options."""
    # Options scale gradients and weights; torch.embedding takes the operands in another order.
    if call.node.target is not F.embedding or any(arguments) or any(options.values()):
        return None
    return call.at(weight, (call.at(x, at[:-1]), at[-1]))
