"""Masks of numbers, which are added to scores: a condition, and a bias where it is True.

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
    if isinstance(condition, Apply) and condition.operator == "and":
        return [part for operand in condition.operands for part in conjuncts(operand)]
    if isinstance(condition, Apply) and condition.operator == "not":
        inner = condition.operands[0]
        if isinstance(inner, Apply) and inner.operator == "or":
            return [part for operand in inner.operands for part in conjuncts(negated(operand))]
    return [] if condition == TRUE else [condition]


def split(mask: Expression, square: bool) -> Split:
    """A mask of numbers as a condition, outside of which it is -inf, and a bias inside.

    square: whether a call has as many queries as keys.
    """
    condition = _visible(mask, square)
    if condition is not None:
        return condition, None
    if isinstance(mask, Apply) and mask.operator == "add":
        (first, bias), (second, second_bias) = (split(term, square) for term in mask.operands)
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


def _visible(mask: Expression, square: bool) -> Expression | None:
    """Where a mask of only 0 and -inf is 0; None of other masks."""
    values = values_of(mask)
    if values is None:
        return None
    if values.keys() <= {0.0, -math.inf}:
        return values.get(0.0, negated(TRUE))
    least = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else -math.inf
    if values.keys() <= {0.0, least}:
        # Beside a score at 0 the least number of a dtype is as good as -inf.
        condition = values.get(0.0, TRUE)
        return condition if _includes_diagonal(condition, square) else None
    return None


def _is_hidden(value: Expression) -> bool:
    return isinstance(value, Number) and value.value == -math.inf


def _includes_diagonal(condition: Expression, square: bool) -> bool:
    """Whether every query is proven to see the key of its own position."""
    if not square:
        return False
    parts = (mask_of(part, DataTensors(square)) for part in conjuncts(condition))
    return all(isinstance(part, (Causal, Window)) for part in parts)
