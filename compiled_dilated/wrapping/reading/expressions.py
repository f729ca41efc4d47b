"""Entries of a mask as expressions of a pair's indices.

Expressions are arithmetic of indices, of numbers and of entries of tensors:

    Index("q") >= Index("kv")        Apply("ge", (Index("q"), Index("kv")), torch.bool)

Expressions are evaluated on scalars, as in a score_mod, or on indices that broadcast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


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
    """An entry of a captured tensor; without indices, a captured number.

    slot: number of the tensor among the captured ones.
    """

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
# The indices of an entry, one per dimension.
At = tuple[Expression, ...]
TRUE, FALSE = Number(True, torch.bool), Number(False, torch.bool)
ZERO = Number(0, torch.int64)


def _inverse(x: Any) -> Any:
    if isinstance(x, Tensor):
        return ~x
    return not x


def _pairwise(of_tensors: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """An operator of two tensors that also accepts numbers."""

    def operate(x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor):
            x = _like(y, x)
        if not isinstance(y, Tensor):
            y = _like(x, y)
        return of_tensors(x, y)

    return operate


def _like(x: Tensor, number: Any) -> Tensor:
    """A number as a tensor beside another."""
    # No constant: it may vary from call to call, or be a fraction beside whole numbers.
    if not isinstance(number, int):
        beside: Tensor = torch.zeros_like(x) + number
        return beside
    return torch.full_like(x, number)


def _where(condition: Tensor, x: Any, y: Any) -> Tensor:
    return torch.where(condition, x, y)


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs", "pow")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_FUNCTIONS = ("log", "exp", "sqrt", "square", "sign", "floor", "ceil", "tanh")
OPERATORS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_ARITHMETIC, *_COMPARISONS)},
    **{name: getattr(torch, name) for name in _FUNCTIONS},
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": _inverse,
    "minimum": _pairwise(torch.minimum),
    "maximum": _pairwise(torch.maximum),
    "where": _where,
    "to": lambda x: x,
}


def evaluate(expression: Expression, indices: Mapping[str, Tensor], tensors: Sequence[Any]) -> Any:
    """The value at some indices.

    indices: by the names of `Index`, tensors that broadcast.
    tensors: the captured ones, in the order of their slots.
    """
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
    if not isinstance(out, Tensor):
        return _number(out, expression.dtype)
    # Scalars promote unlike tensors of more dimensions: the dtype is that of the model's graph.
    return out.to(expression.dtype)


def _number(value: Any, dtype: torch.dtype) -> Any:
    """A number rounded to a dtype; a symbolic number as it is."""
    if not isinstance(value, (bool, int, float)):
        return value
    if dtype == torch.bool:
        return bool(value)
    with _disable_current_modes():
        return torch.tensor(value).to(dtype).item()


def constant(value: bool | int | float, dtype: torch.dtype) -> Number:
    """A number rounded to a dtype."""
    return Number(_number(value, dtype), dtype)


def indices_of(expression: Expression) -> frozenset[str]:
    """Names of the indices that an expression depends on."""
    return frozenset(part.name for part in _parts(expression) if isinstance(part, Index))


def slots_of(expression: Expression) -> frozenset[int]:
    """Slots of the captured tensors that an expression reads."""
    return frozenset(part.slot for part in _parts(expression) if isinstance(part, Entry))


def renumbered(expression: Expression, slots: Mapping[int, int]) -> Expression:
    """The same expression with other numbers of slots."""
    if isinstance(expression, Entry):
        indices = tuple(renumbered(index, slots) for index in expression.indices)
        return Entry(slots[expression.slot], indices, expression.dtype)
    if isinstance(expression, Apply):
        operands = tuple(renumbered(operand, slots) for operand in expression.operands)
        return Apply(expression.operator, operands, expression.dtype)
    return expression


def size_of(expression: Expression) -> int:
    """Number of operators and operands of an expression."""
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
