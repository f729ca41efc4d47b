"""How graphs spell the making of masks: the entry of each call's result, as an expression of entries of its operands.

A rule is called with the call, the indices of the entry, and the arguments of the node. A node whose arguments do not bind, or
whose rule returns None, is captured as a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .expressions import OPERATORS, Expression, Number, apply, constant
from .reading import RULES, Call, Rule, example_of, is_one

At = tuple[Expression, ...]


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for functions of torch and methods of tensors of these names, in place too (name_)."""

    def register(rule: Rule) -> Rule:
        for name in names:
            targets = [
                name,
                f"{name}_",
                *(getattr(space, name, None) for space in (torch, torch.Tensor, F, operator)),
            ]
            RULES.update({target: rule for target in targets if target is not None})
        return rule

    return register


# Numbers ----------------------------------------------------------------------------------------------------------------------


@_rule("arange")
def _arange(call: Call, at: At, *bounds: Any, **options: Any) -> Expression | None:
    start = call.at(bounds[0] if len(bounds) > 1 else options.get("start", 0), ())
    step = call.at(bounds[2] if len(bounds) > 2 else options.get("step", 1), ())
    if "out" in options or start.dtype != torch.int64 or step.dtype != torch.int64:
        return None
    scaled = at[0] if step == Number(1, torch.int64) else apply("mul", (step, at[0]), step.dtype)
    moved = scaled if start == Number(0, torch.int64) else apply("add", (start, scaled), step.dtype)
    return apply("to", (moved,), call.dtype) if call.dtype.is_floating_point else moved


def _filled(fill: bool) -> Rule:
    return lambda call, at, *sizes, **options: constant(fill, call.dtype)


_rule("ones", "ones_like", "new_ones")(_filled(True))
_rule("zeros", "zeros_like", "new_zeros")(_filled(False))


@_rule("full", "full_like", "new_full")
def _full(call: Call, at: At, shape: Any, fill_value: Any, **options: Any) -> Expression:
    return apply("to", (call.at(fill_value, ()),), call.dtype)


@_rule("tensor", "scalar_tensor")
def _tensor(call: Call, at: At, data: Any, **options: Any) -> Expression | None:
    return constant(data, call.dtype) if isinstance(data, (bool, int, float)) else None


# Views ------------------------------------------------------------------------------------------------------------------------


@_rule("contiguous", "clone", "detach")
def _same(call: Call, at: At, x: Any, **options: Any) -> Expression:
    return call.at(x, at)


@_rule("to", "long", "int", "bool", "float", "double", "half", "bfloat16", "type", "type_as")
def _converted(call: Call, at: At, x: Any, *arguments: Any, **options: Any) -> Expression:
    return apply("to", (call.at(x, at),), call.dtype)


@_rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call, at: At, x: Any, *shape: Any, **options: Any) -> Expression:
    return call.at(x, at)


@_rule("unsqueeze")
def _unsqueeze(call: Call, at: At, x: Any, dim: int) -> Expression:
    new = dim % len(at)
    return call.at(x, at[:new] + at[new + 1 :])


@_rule("squeeze")
def _squeeze(call: Call, at: At, x: Any, dim: int) -> Expression:
    dims = len(example_of(x).shape)
    at = at if dims == len(at) else (*at[: dim % dims], constant(0, torch.int64), *at[dim % dims :])
    return call.at(x, at)


@_rule("transpose", "swapaxes", "swapdims")
def _transpose(call: Call, at: At, x: Any, dim0: int, dim1: int) -> Expression:
    places = list(at)
    places[dim0], places[dim1] = places[dim1], places[dim0]
    return call.at(x, tuple(places))


@_rule("t")
def _t(call: Call, at: At, x: Any) -> Expression:
    return call.at(x, at[::-1])


@_rule("permute")
def _permute(call: Call, at: At, x: Any, *dims: Any) -> Expression:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    places = list(at)
    for place, dim in zip(at, order, strict=True):
        places[dim] = place
    return call.at(x, tuple(places))


@_rule("view", "reshape")
def _reshape(call: Call, at: At, x: Any, *shape: Any) -> Expression | None:
    """Dimensions of one entry added or taken away."""
    own, new = list(example_of(x).shape), list(call.shape)
    indices = [i for i, size in zip(at, new, strict=True) if not is_one(size)]
    if [size for size in own if not is_one(size)] != [size for size in new if not is_one(size)]:
        return None
    places = iter(indices)
    return call.at(
        x, tuple(constant(0, torch.int64) if is_one(size) else next(places) for size in own)
    )


@_rule("getitem")
def _getitem(call: Call, at: At, x: Any, index: Any) -> Expression | None:
    """New dimensions, whole ones and parts of them, numbers, and tensors of indices for the first dimensions."""
    items = list(index) if isinstance(index, tuple) else [index]
    value = example_of(x)
    if not isinstance(value, Tensor):
        return None
    if any(isinstance(item, Node) and isinstance(example_of(item), Tensor) for item in items):
        return _looked_up(call, at, x, items)
    missing = value.dim() - sum(item is not None and item is not ... for item in items)
    place = items.index(...) if ... in items else len(items)
    items[place : place + 1] = [slice(None)] * missing
    rest = iter(at)
    places: list[Expression] = []
    for item in items:
        if item is None:
            next(rest)
            continue
        size = value.shape[len(places)]
        found = _part(call, item, size, rest)
        if found is None:
            return None
        places.append(found)
    return call.at(x, tuple(places))


def _part(call: Call, item: Any, size: Any, rest: Any) -> Expression | None:
    """The index along one dimension that an item of an index keeps, or takes away."""
    if isinstance(item, int):
        known = item >= 0 or isinstance(size, int)
        return constant(item if item >= 0 else size + item, torch.int64) if known else None
    if not isinstance(item, slice):
        return None
    start, step = item.start or 0, 1 if item.step is None else item.step
    if not isinstance(start, int) or not isinstance(step, int) or start < 0:
        return None
    scaled = (
        apply("mul", (next(rest), constant(step, torch.int64)), torch.int64)
        if step != 1
        else next(rest)
    )
    return apply("add", (scaled, constant(start, torch.int64)), torch.int64) if start else scaled


def _looked_up(call: Call, at: At, x: Node, items: Sequence[Any]) -> Expression | None:
    """table[i, j] with tensors of indices that broadcast; whole dimensions may follow."""
    tensors = [item for item in items if isinstance(item, Node)]
    if len(tensors) < len(items) or any(
        example_of(item).dtype.is_floating_point for item in tensors
    ):
        return None
    if any(example_of(item).dtype == torch.bool for item in tensors):
        return None
    dims = max(example_of(item).dim() for item in tensors)
    return call.at(x, (*(call.at(item, at[:dims]) for item in tensors), *at[dims:]))


@_rule("embedding")
def _embedding(
    call: Call, at: At, x: Any, weight: Any, *arguments: Any, **options: Any
) -> Expression | None:
    # Options scale gradients and weights; F.embedding and torch.embedding take the operands in different orders.
    if call.node.target is not F.embedding or any(arguments) or any(options.values()):
        return None
    return call.at(weight, (call.at(x, at[:-1]), at[-1]))


# Elementwise ------------------------------------------------------------------------------------------------------------------

# By the name in OPERATORS those in torch, of methods and in operator.
_UNARY = {
    "neg": ("neg", "negative"),
    "abs": ("abs", "absolute"),
    "not": ("logical_not", "bitwise_not", "invert", "inv"),
}
_UNARY |= {
    name: (name,) for name in ("log", "exp", "sqrt", "square", "sign", "floor", "ceil", "tanh")
}
_BINARY = {
    "add": ("add",),
    "sub": ("sub", "subtract"),
    "mul": ("mul", "multiply"),
    "truediv": ("truediv", "div", "divide", "true_divide"),
    "floordiv": ("floordiv", "floor_divide"),
    "mod": ("mod", "remainder"),
    "minimum": ("minimum", "min"),
    "maximum": ("maximum", "max"),
    "pow": ("pow",),
    "and": ("logical_and", "bitwise_and", "and_", "__and__"),
    "or": ("logical_or", "bitwise_or", "or_", "__or__"),
    "xor": ("logical_xor", "bitwise_xor", "xor", "__xor__"),
    "eq": ("eq",),
    "ne": ("ne", "not_equal"),
    "lt": ("lt", "less"),
    "le": ("le", "less_equal"),
    "gt": ("gt", "greater"),
    "ge": ("ge", "greater_equal"),
}
_LOGICAL = ("logical_not", "logical_and", "logical_or", "logical_xor")


def _as_conditions(call: Call, operands: Sequence[Expression]) -> list[Expression]:
    """Operands of a logical operator, which takes numbers for conditions."""
    name = call.node.target if isinstance(call.node.target, str) else call.node.target.__name__
    logical = name.rstrip("_") in _LOGICAL
    return [apply("to", (x,), torch.bool) if logical else x for x in operands]


def _elementwise(name: str, count: int) -> Rule:
    if count == 1:

        def unary(call: Call, at: At, x: Any) -> Expression:
            return call.apply(name, *_as_conditions(call, [call.at(x, at)]))

        return unary

    def binary(call: Call, at: At, x: Any, y: Any) -> Expression:
        return call.apply(name, *_as_conditions(call, [call.at(x, at), call.at(y, at)]))

    return binary


for _name, _spellings in _UNARY.items():
    _rule(*_spellings)(_elementwise(_name, 1))
for _name, _spellings in _BINARY.items():
    _rule(*_spellings)(_elementwise(_name, 2))
for _augmented in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor"):
    RULES[getattr(operator, f"i{_augmented}")] = _elementwise(_augmented, 2)
assert {*_UNARY, *_BINARY} <= OPERATORS.keys()


@_rule("rsub")
def _rsub(call: Call, at: At, x: Any, y: Any) -> Expression:
    return call.apply("sub", call.at(y, at), call.at(x, at))


@_rule("div", "divide")
def _div(call: Call, at: At, x: Any, y: Any, rounding_mode: str | None = None) -> Expression | None:
    names = {None: "truediv", "floor": "floordiv"}
    return (
        call.apply(names[rounding_mode], call.at(x, at), call.at(y, at))
        if rounding_mode in names
        else None
    )


@_rule("clamp", "clip")
def _clamp(call: Call, at: At, x: Any, min: Any = None, max: Any = None) -> Expression:
    found = call.at(x, at)
    if min is not None:
        found = call.apply("maximum", found, call.at(min, at))
    return found if max is None else call.apply("minimum", found, call.at(max, at))


@_rule("where")
def _where(call: Call, at: At, condition: Any, x: Any, y: Any) -> Expression | None:
    # The method is x.where(condition, y).
    if call.node.op == "call_method":
        condition, x = x, condition
    sides = (call.at(x, at), call.at(y, at))
    return call.apply(
        "where", call.at(condition, at), *(apply("to", (side,), call.dtype) for side in sides)
    )


@_rule("masked_fill")
def _masked_fill(call: Call, at: At, x: Any, mask: Any, value: Any) -> Expression:
    fill = apply("to", (call.at(value, ()),), call.dtype)
    return call.apply("where", call.at(mask, at), fill, call.at(x, at))


def _triangle(call: Call, at: At, x: Any, diagonal: Any, comparison: str) -> Expression:
    """The entries at which column - row and the diagonal compare; 0 elsewhere."""
    row, column = at[-2:]
    difference = apply("sub", (column, row), torch.int64)
    inside = apply(comparison, (difference, call.at(diagonal, ())), torch.bool)
    return call.apply("where", inside, call.at(x, at), constant(False, call.dtype))


@_rule("tril")
def _tril(call: Call, at: At, x: Any, diagonal: Any = 0) -> Expression:
    return _triangle(call, at, x, diagonal, "le")


@_rule("triu")
def _triu(call: Call, at: At, x: Any, diagonal: Any = 0) -> Expression:
    return _triangle(call, at, x, diagonal, "ge")
