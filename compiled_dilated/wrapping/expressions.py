"""Entries of a mask as expressions: arithmetic of a pair's indices, and entries of tensors.

    Index("q") >= Index("kv")        Apply("ge", (Index("q"), Index("kv")), torch.bool)

An expression is evaluated on scalars, as a score_mod is called, or on indices that broadcast.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Distinct numbers that a mask may hold and still count as conditions: 0, -inf, and what they are made of.
_MOST_VALUES = 6


@dataclass(frozen=True)
class Index:
    """An index of a pair: "b", "h", "q" or "kv"."""

    name: str
    dtype = torch.int64


@dataclass(frozen=True)
class Number:
    """A constant of a dtype."""

    value: bool | int | float
    dtype: torch.dtype


@dataclass(frozen=True)
class Entry:
    """An entry of a captured tensor; without indices a captured number. slot: of the tensor among those captured."""

    slot: int
    indices: tuple[Expression, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Apply:
    """An operator of OPERATORS on other expressions."""

    operator: str
    operands: tuple[Expression, ...]
    dtype: torch.dtype


Expression = Index | Number | Entry | Apply
TRUE, FALSE = Number(True, torch.bool), Number(False, torch.bool)


def _inverse(x: Any) -> Any:
    return ~x if isinstance(x, Tensor) else not x


def _pairwise(of_tensors: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """An operator of two tensors for numbers too."""

    def operate(x: Any, y: Any) -> Any:
        like = x if isinstance(x, Tensor) else y
        x, y = (z if isinstance(z, Tensor) else torch.full_like(like, z) for z in (x, y))
        return of_tensors(x, y)

    return operate


def _where(condition: Tensor, x: Any, y: Any) -> Tensor:
    return torch.where(condition, x, y)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs", "pow")
    },
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: getattr(operator, f"{name}_") for name in ("and", "or")},
    **{
        name: getattr(torch, name)
        for name in ("log", "exp", "sqrt", "square", "sign", "floor", "ceil", "tanh")
    },
    "xor": operator.xor,
    "not": _inverse,
    "minimum": _pairwise(torch.minimum),
    "maximum": _pairwise(torch.maximum),
    "where": _where,
    "to": lambda x: x,
}
# A comparison with its operands exchanged.
_MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
# Arithmetic of conditions.
_OF_CONDITIONS = {"mul": "and", "add": "or", "minimum": "and", "maximum": "or", "ne": "xor"}


def evaluate(expression: Expression, indices: Mapping[str, Tensor], tensors: Sequence[Any]) -> Any:
    """The value at some indices. tensors: the captured ones, in the order of their slots."""
    if isinstance(expression, Index):
        return indices[expression.name]
    if isinstance(expression, Number):
        return expression.value
    if isinstance(expression, Entry):
        if not expression.indices:
            return tensors[expression.slot]
        places = tuple(evaluate(index, indices, tensors) for index in expression.indices)
        return tensors[expression.slot][places]
    operands = [evaluate(operand, indices, tensors) for operand in expression.operands]
    out = OPERATORS[expression.operator](*operands)
    # Scalars promote otherwise than tensors of more dimensions: the dtype is that of the model's graph.
    return out.to(expression.dtype) if isinstance(out, Tensor) else _number(out, expression.dtype)


def _number(value: Any, dtype: torch.dtype) -> Any:
    """A number as one of a dtype."""
    if not isinstance(value, (bool, int, float)):
        return value  # symbolic
    if dtype == torch.bool:
        return bool(value)
    with _disable_current_modes():
        return torch.tensor(value).to(dtype).item()


def constant(value: bool | int | float, dtype: torch.dtype) -> Number:
    """A number rounded to a dtype."""
    return Number(_number(value, dtype), dtype)


def apply(name: str, operands: Sequence[Expression], dtype: torch.dtype) -> Expression:
    """An operator on expressions, simplified where that is exact."""
    operands = tuple(operands)
    if all(isinstance(operand, Number) for operand in operands):
        return _folded(name, operands, dtype)
    if name == "to":
        return _converted(operands[0], dtype)
    if name in _MIRRORED and isinstance(operands[0], Number):
        return apply(_MIRRORED[name], operands[::-1], dtype)
    if (
        dtype == torch.bool
        and name in _OF_CONDITIONS
        and all(x.dtype == torch.bool for x in operands)
    ):
        name = _OF_CONDITIONS[name]
    if name in ("and", "or") and dtype == torch.bool:
        return _joined(name, *operands)
    if name == "not" and dtype == torch.bool and isinstance(operands[0], Apply):
        return _opposite(operands[0])
    if name == "where":
        condition, x, y = operands
        if isinstance(condition, Number):
            return apply("to", (x if condition.value else y,), dtype)
        if dtype == torch.bool:
            return _joined(
                "or", _joined("and", condition, x), _joined("and", negated(condition), y)
            )
    if name in _MIRRORED and isinstance(operands[1], Number):
        compared = _compared(name, operands[0], operands[1])
        if compared is not None:
            return compared
    return Apply(name, operands, dtype)


def _folded(name: str, operands: Sequence[Expression], dtype: torch.dtype) -> Number:
    with _disable_current_modes():
        values = [
            torch.tensor(operand.value, dtype=operand.dtype)
            for operand in operands
            if isinstance(operand, Number)
        ]
        return Number(OPERATORS[name](*values).to(dtype).item(), dtype)


def _converted(x: Expression, dtype: torch.dtype) -> Expression:
    if x.dtype == dtype:
        return x
    if dtype == torch.bool:
        found = values_of(x)
        if found is not None:
            return _any(condition for value, condition in found.items() if value != 0)
        return Apply("ne", (x, Number(0, x.dtype)), torch.bool)
    return Apply("to", (x,), dtype)


def _joined(name: str, x: Expression, y: Expression) -> Expression:
    """`x and y`, `x or y` of conditions."""
    neutral = TRUE if name == "and" else FALSE
    for one, other in ((x, y), (y, x)):
        if isinstance(one, Number):
            return other if one == neutral else one
    return x if x == y else Apply(name, (x, y), torch.bool)


def negated(condition: Expression) -> Expression:
    """`not condition`."""
    return apply("not", (condition,), torch.bool)


def _opposite(condition: Apply) -> Expression:
    """`not condition`: of a comparison of whole numbers the opposite one, as NaN is none of them."""
    if condition.operator == "not":
        return condition.operands[0]
    if condition.operator in _OPPOSITE and not any(
        x.dtype.is_floating_point for x in condition.operands
    ):
        return Apply(_OPPOSITE[condition.operator], condition.operands, torch.bool)
    return Apply("not", (condition,), torch.bool)


def _any(conditions: Iterator[Expression]) -> Expression:
    result: Expression = FALSE
    for condition in conditions:
        result = _joined("or", result, condition)
    return result


def _compared(name: str, x: Expression, y: Number) -> Expression | None:
    """A comparison of what is one of a few numbers, as a condition."""
    found = values_of(x)
    if found is None:
        return None
    return _any(condition for value, condition in found.items() if OPERATORS[name](value, y.value))


def values_of(expression: Expression) -> dict[float, Expression] | None:
    """Conditions under which an expression is each of a few numbers; None where it is other things."""
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
    for value, under in cases:
        if value != value:  # NaN is no number that a condition could be read of
            return None
        result[value] = _joined("or", result.get(value, FALSE), under)
    result = {value: under for value, under in result.items() if under != FALSE}
    return result if len(result) <= _MOST_VALUES else None


def _cases(expression: Apply) -> list[tuple[float, Expression]] | None:
    """Values that an operator may have, each with a condition for it; None where there are too many to list."""
    is_choice = expression.operator == "where"
    sides = expression.operands[is_choice:]
    choices = []
    for side in sides:
        found = values_of(side)
        if found is None:
            return None
        choices.append(found.items())
    if not is_choice:
        return [_case(expression, sides, case) for case in itertools.product(*choices)]
    condition = expression.operands[0]
    return [
        (value, _joined("and", guard, under))
        for guard, choice in zip((condition, negated(condition)), choices, strict=True)
        for value, under in choice
    ]


def _case(
    expression: Apply, sides: Sequence[Expression], case: Sequence[tuple[float, Expression]]
) -> tuple[float, Expression]:
    """One combination of values of the operands: the value of the expression, and when that is."""
    under: Expression = TRUE
    for _, condition in case:
        under = _joined("and", under, condition)
    numbers = [constant(value, side.dtype) for (value, _), side in zip(case, sides, strict=True)]
    return float(_folded(expression.operator, numbers, expression.dtype).value), under


def indices_of(expression: Expression) -> frozenset[str]:
    """The indices that an expression depends on."""
    return frozenset(part.name for part in _parts(expression) if isinstance(part, Index))


def slots_of(expression: Expression) -> frozenset[int]:
    """The captured tensors that an expression reads."""
    return frozenset(part.slot for part in _parts(expression) if isinstance(part, Entry))


def renumbered(expression: Expression, slots: Mapping[int, int]) -> Expression:
    """The same expression with other numbers of slots."""
    if isinstance(expression, Entry):
        return Entry(
            slots[expression.slot],
            tuple(renumbered(x, slots) for x in expression.indices),
            expression.dtype,
        )
    if isinstance(expression, Apply):
        return Apply(
            expression.operator,
            tuple(renumbered(x, slots) for x in expression.operands),
            expression.dtype,
        )
    return expression


def size_of(expression: Expression) -> int:
    """How many operators and operands an expression has."""
    return sum(1 for _ in _parts(expression))


def _parts(expression: Expression) -> Iterator[Expression]:
    yield expression
    inner: Sequence[Expression] = ()
    if isinstance(expression, Apply):
        inner = expression.operands
    elif isinstance(expression, Entry):
        inner = expression.indices
    for part in inner:
        yield from _parts(part)
