"""Masks of numbers, added to scores, as a condition and a bias.

where(kv <= q, 0.0, -inf)                kv <= q, without a bias
where(kv <= q, slope * (kv - q), -inf)   kv <= q, with the bias slope * (kv - q)
"""

from __future__ import annotations

import math

import torch

from ...masks.bands import Causal, Window
from ..reading.expressions import TRUE, Apply, Expression, Number
from ..reading.simplify import apply, conjunction, negated, values_of
from .comparisons import DataTensors, mask_of

# A condition, and what is added to scores where it is True; None for 0.
Split = tuple[Expression, Expression | None]


def conjuncts(condition: Expression) -> list[Expression]:
    """Conditions that are all True where a condition is."""
    if condition == TRUE:
        return []
    operands: list[Expression] = []
    if isinstance(condition, Apply) and condition.operator == "and":
        operands += condition.operands
    if isinstance(condition, Apply) and condition.operator == "not":
        # not (x or y) is (not x) and (not y).
        inner = condition.operands[0]
        if isinstance(inner, Apply) and inner.operator == "or":
            operands += [negated(operand) for operand in inner.operands]
    if not operands:
        return [condition]
    parts = []
    for operand in operands:
        parts += conjuncts(operand)
    return parts


def split(mask: Expression, square: bool) -> Split:
    """A mask of numbers as a condition and a bias.

    The mask is -inf outside of the condition, and the bias inside.

    square: whether a call has as many queries as keys.
    """
    condition = _visible(mask, square)
    if condition is not None:
        return condition, None
    if isinstance(mask, Apply) and mask.operator == "add":
        (first, bias), (second, second_bias) = _terms(mask, square)
        if bias is not None and second_bias is not None:
            bias = apply("add", (bias, second_bias), mask.dtype)
        elif bias is None:
            bias = second_bias
        return conjunction([first, second]), bias
    if isinstance(mask, Apply) and mask.operator == "where":
        condition, if_true, if_false = mask.operands
        if _is_hidden(if_false):
            inner, bias = split(if_true, square)
            return conjunction([condition, inner]), bias
        if _is_hidden(if_true):
            inner, bias = split(if_false, square)
            return conjunction([negated(condition), inner]), bias
    return TRUE, mask


def _terms(mask: Apply, square: bool) -> tuple[Split, ...]:
    """The split terms of a sum.

    A least number hides in one term unless another term may add one to a query's own key.
    """
    terms = tuple(split(term, square) for term in mask.operands)
    if any(bias is not None and _has_least(bias) for _, bias in terms):
        return tuple(split(term, False) for term in mask.operands)
    return terms


def _has_least(bias: Expression) -> bool:
    """Whether a bias may be the least number of its dtype."""
    values = values_of(bias)
    return values is not None and _least(bias) in values


def _least(mask: Expression) -> float:
    """The least number of a mask's dtype; -inf for integers."""
    if mask.dtype.is_floating_point:
        return torch.finfo(mask.dtype).min
    return -math.inf


def _visible(mask: Expression, square: bool) -> Expression | None:
    """The pairs at which a mask of 0 and -inf is 0.

    None for other masks.
    """
    values = values_of(mask)
    if values is None:
        return None
    if values.keys() <= {0.0, -math.inf}:
        return values.get(0.0, negated(TRUE))
    condition = values.get(0.0, TRUE)
    # Beside a score at 0 the least number of a dtype is as good as -inf.
    if values.keys() <= {0.0, _least(mask)} and _includes_diagonal(condition, square):
        return condition
    return None


def _is_hidden(value: Expression) -> bool:
    return isinstance(value, Number) and value.value == -math.inf


def _includes_diagonal(condition: Expression, square: bool) -> bool:
    """Whether every query provably sees the key of its own position."""
    if not square:
        return False
    parts = (mask_of(part, DataTensors(square)) for part in conjuncts(condition))
    return all(isinstance(part, (Causal, Window)) for part in parts)
