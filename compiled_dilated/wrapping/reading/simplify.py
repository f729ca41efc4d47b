"""Operators on expressions, simplified where that is exact.

apply("ge", (Number(3), Index("q")))            Index("q") <= 3
apply("eq", (where(c, 0.0, -inf), 0.0))         c
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .expressions import FALSE, OPERATORS, TRUE, Apply, Expression, Number, constant

# Distinct values of an expression that still counts as a choice by conditions: 0, -inf and a few.
_MOST_VALUES = 6
# A value of an expression, and the condition of that value.
_Case = tuple[float, Expression]
# Comparisons with their operands exchanged, and negated.
_MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
# Arithmetic of conditions as logic.
_LOGIC = {"mul": "and", "add": "or", "minimum": "and", "maximum": "or", "ne": "xor"}


def apply(name: str, operands: Sequence[Expression], dtype: torch.dtype) -> Expression:
    """An operator on expressions, simplified where that is exact."""
    operands = tuple(operands)
    if all(isinstance(operand, Number) for operand in operands):
        return _folded(name, operands, dtype)
    # Constants to the right, so that rules below look at one side only.
    if name in _MIRRORED and isinstance(operands[0], Number):
        return apply(_MIRRORED[name], operands[::-1], dtype)
    if dtype == torch.bool and all(operand.dtype == torch.bool for operand in operands):
        name = _LOGIC.get(name, name)
    simple: Expression | None = None
    if name == "where":
        simple = _selected(operands, dtype)
    elif name in _SIMPLIFIED:
        simple = _SIMPLIFIED[name](operands, dtype)
    elif name in _MIRRORED and isinstance(operands[1], Number):
        simple = _compared(name, operands[0], operands[1])
    if simple is None:
        return Apply(name, operands, dtype)
    return simple


def negated(condition: Expression) -> Expression:
    """`not condition`."""
    return apply("not", (condition,), torch.bool)


def conjunction(conditions: Sequence[Expression]) -> Expression:
    """All of some conditions; TRUE without any."""
    joined: Expression = TRUE
    for condition in conditions:
        joined = apply("and", (joined, condition), torch.bool)
    return joined


def _folded(name: str, operands: Sequence[Expression], dtype: torch.dtype) -> Number:
    """An operator on numbers, computed by torch in the operands' dtypes."""
    with _disable_current_modes():
        values = [
            torch.tensor(operand.value, dtype=operand.dtype)
            for operand in operands
            if isinstance(operand, Number)
        ]
        return Number(OPERATORS[name](*values).to(dtype).item(), dtype)


# Simplifications of operators: an equal expression, or None ------------------------------------


def _converted(operands: Sequence[Expression], dtype: torch.dtype) -> Expression | None:
    """A conversion, left out if the dtype is the same.

    To bool, an expression of few values becomes a condition.
    """
    (x,) = operands
    if x.dtype == dtype:
        return x
    if dtype != torch.bool:
        return None
    values = values_of(x)
    if values is None:
        return Apply("ne", (x, Number(0, x.dtype)), torch.bool)
    return _any(condition for value, condition in values.items() if value != 0)


def _conjoined(operands: Sequence[Expression], dtype: torch.dtype) -> Expression | None:
    """`and` of conditions; None for integers, whose bits it joins."""
    if dtype != torch.bool:
        return None
    return _joined("and", *operands)


def _disjoined(operands: Sequence[Expression], dtype: torch.dtype) -> Expression | None:
    """`or` of conditions; None for integers, whose bits it joins."""
    if dtype != torch.bool:
        return None
    return _joined("or", *operands)


def _joined(name: str, x: Expression, y: Expression) -> Expression:
    """`x and y` or `x or y` of conditions."""
    neutral = TRUE if name == "and" else FALSE
    for number, operand in ((x, y), (y, x)):
        if isinstance(number, Number):
            return operand if number == neutral else number
    if x == y:
        return x
    return Apply(name, (x, y), torch.bool)


def _inverted(operands: Sequence[Expression], dtype: torch.dtype) -> Expression | None:
    """`not`: twice is nothing; a comparison of integers becomes the opposite one."""
    (x,) = operands
    if dtype != torch.bool or not isinstance(x, Apply):
        return None
    if x.operator == "not":
        return x.operands[0]
    # Not of floats: NaN compares False both ways.
    integral = not any(operand.dtype.is_floating_point for operand in x.operands)
    if x.operator in _OPPOSITE and integral:
        return Apply(_OPPOSITE[x.operator], x.operands, torch.bool)
    return None


def _selected(operands: Sequence[Expression], dtype: torch.dtype) -> Expression | None:
    """`where` with a constant condition, or of two conditions."""
    condition, x, y = operands
    if isinstance(condition, Number):
        return apply("to", (x if condition.value else y,), dtype)
    if dtype != torch.bool:
        return None
    return _joined("or", _joined("and", condition, x), _joined("and", negated(condition), y))


def _compared(name: str, x: Expression, y: Number) -> Expression | None:
    """A comparison of few values with a number, as a condition."""
    values = values_of(x)
    if values is None:
        return None
    compare = OPERATORS[name]
    return _any(condition for value, condition in values.items() if compare(value, y.value))


_Simplification = Callable[[Sequence[Expression], torch.dtype], Expression | None]
_SIMPLIFIED: Mapping[str, _Simplification] = {
    "to": _converted,
    "and": _conjoined,
    "or": _disjoined,
    "not": _inverted,
}


def _any(conditions: Iterator[Expression]) -> Expression:
    result: Expression = FALSE
    for condition in conditions:
        result = _joined("or", result, condition)
    return result


# Expressions of few values ---------------------------------------------------------------------


def values_of(expression: Expression) -> dict[float, Expression] | None:
    """The condition for each value of an expression; None for many values."""
    if isinstance(expression, Number):
        return {float(expression.value): TRUE}
    if expression.dtype == torch.bool:
        return {1.0: expression, 0.0: negated(expression)}
    if not isinstance(expression, Apply):
        return None
    cases = _cases(expression)
    if cases is None:
        return None
    result: dict[float, Expression] = {}
    for value, condition in cases:
        if value != value:  # NaN equals no number: no condition can be derived from it
            return None
        result[value] = _joined("or", result.get(value, FALSE), condition)
    result = {value: condition for value, condition in result.items() if condition != FALSE}
    if len(result) > _MOST_VALUES:
        return None
    return result


def _cases(expression: Apply) -> list[_Case] | None:
    """Values of an operator with their conditions; None for many values."""
    if expression.operator == "where":
        return _cases_of_where(expression)
    choices = _choices(expression.operands)
    if choices is None:
        return None
    return [_joint_case(expression, cases) for cases in itertools.product(*choices)]


def _cases_of_where(expression: Apply) -> list[_Case] | None:
    """Values of either side, under the condition that selects the side."""
    condition, *sides = expression.operands
    choices = _choices(sides)
    if choices is None:
        return None
    result = []
    for guard, cases in zip((condition, negated(condition)), choices, strict=True):
        for value, under in cases:
            result.append((value, _joined("and", guard, under)))
    return result


def _choices(operands: Sequence[Expression]) -> list[list[_Case]] | None:
    """The values of every operand; None if one has too many."""
    choices = []
    for operand in operands:
        values = values_of(operand)
        if values is None:
            return None
        choices.append(list(values.items()))
    return choices


def _joint_case(expression: Apply, cases: Sequence[_Case]) -> _Case:
    """The value and condition of an operator for one case per operand."""
    numbers = []
    for (value, _), operand in zip(cases, expression.operands, strict=True):
        numbers.append(constant(value, operand.dtype))
    under = conjunction([condition for _, condition in cases])
    return float(_folded(expression.operator, numbers, expression.dtype).value), under
