"""Rules for functions of entries at the same indices.

Rules are defined in creation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .expressions import At, Expression, constant
from .reader import Call, Rule
from .simplify import apply

_LOGICAL = ("logical_not", "logical_and", "logical_or", "logical_xor")


def _as_conditions(call: Call, operands: Sequence[Expression]) -> Sequence[Expression]:
    """Operands of a logical operator, which reads numbers as conditions."""
    target = call.node.target
    name = target if isinstance(target, str) else target.__name__
    if name.rstrip("_") not in _LOGICAL:
        return operands
    return [apply("to", (x,), torch.bool) for x in operands]


def unary(name: str) -> Rule:
    """The rule of an operator of OPERATORS for one tensor."""

    def rule(call: Call, at: At, x: Any) -> Expression:
        return call.apply(name, *_as_conditions(call, [call.at(x, at)]))

    return rule


def binary(name: str) -> Rule:
    """The rule of an operator of OPERATORS for two tensors or numbers."""

    def rule(call: Call, at: At, x: Any, y: Any) -> Expression:
        return call.apply(name, *_as_conditions(call, [call.at(x, at), call.at(y, at)]))

    return rule


def rsub(call: Call, at: At, x: Any, y: Any) -> Expression:
    """y - x."""
    return call.apply("sub", call.at(y, at), call.at(x, at))


def div(call: Call, at: At, x: Any, y: Any, rounding_mode: str | None = None) -> Expression | None:
    """x / y, or rounded down; None for rounding towards zero."""
    names = {None: "truediv", "floor": "floordiv"}
    if rounding_mode not in names:
        return None
    return call.apply(names[rounding_mode], call.at(x, at), call.at(y, at))


def clamp(call: Call, at: At, x: Any, min: Any = None, max: Any = None) -> Expression:
    """x between two bounds."""
    entry = call.at(x, at)
    if min is not None:
        entry = call.apply("maximum", entry, call.at(min, at))
    if max is not None:
        entry = call.apply("minimum", entry, call.at(max, at))
    return entry


def where(call: Call, at: At, condition: Any, x: Any, y: Any) -> Expression | None:
    """where(condition, x, y); the method is x.where(condition, y)."""
    if call.node.op == "call_method":
        condition, x = x, condition
    sides = [apply("to", (call.at(side, at),), call.dtype) for side in (x, y)]
    return call.apply("where", call.at(condition, at), *sides)


def masked_fill(call: Call, at: At, x: Any, mask: Any, value: Any) -> Expression:
    """value where the mask is True, x elsewhere."""
    fill = apply("to", (call.at(value, ()),), call.dtype)
    return call.apply("where", call.at(mask, at), fill, call.at(x, at))


def _triangle(call: Call, at: At, x: Any, diagonal: Any, comparison: str) -> Expression:
    """x where column - row compares with the diagonal, 0 elsewhere."""
    row, column = at[-2:]
    difference = apply("sub", (column, row), torch.int64)
    inside = apply(comparison, (difference, call.at(diagonal, ())), torch.bool)
    return call.apply("where", inside, call.at(x, at), constant(False, call.dtype))


def tril(call: Call, at: At, x: Any, diagonal: Any = 0) -> Expression:
    """x up to a diagonal, 0 above."""
    return _triangle(call, at, x, diagonal, "le")


def triu(call: Call, at: At, x: Any, diagonal: Any = 0) -> Expression:
    """x from a diagonal on, 0 below."""
    return _triangle(call, at, x, diagonal, "ge")
