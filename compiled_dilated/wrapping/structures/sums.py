"""Whole numbers as weighted sums of indices, blocks and distances.

3 * (q - kv) - 2        Sum({q: 3, kv: -3}, -2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..reading.expressions import Apply, Expression, Index, Number

Q, KV = Index("q"), Index("kv")


@dataclass(frozen=True, eq=False)
class Sum:
    """Terms times factors, plus a number; no factor is 0."""

    terms: Mapping[Expression, int]
    number: int

    def times(self, factor: int) -> Sum:
        """The sum times a number."""
        if factor == 0:
            return Sum({}, 0)
        terms = {term: times * factor for term, times in self.terms.items()}
        return Sum(terms, self.number * factor)

    def plus(self, addend: Sum) -> Sum:
        """The sum of two sums."""
        terms = dict(self.terms)
        for term, factor in addend.terms.items():
            terms[term] = terms.get(term, 0) + factor
        nonzero = {term: factor for term, factor in terms.items() if factor}
        return Sum(nonzero, self.number + addend.number)


def difference(x: Expression, y: Expression) -> Sum | None:
    """x - y; None unless both are sums."""
    first, second = sum_of(x), sum_of(y)
    if first is None or second is None:
        return None
    return first.plus(second.times(-1))


def sum_of(x: Expression) -> Sum | None:
    """An expression as a sum; None if it is none."""
    if isinstance(x, Number):
        return Sum({}, int(x.value))
    if isinstance(x, Index):
        return Sum({x: 1}, 0)
    # Narrower numbers may overflow.
    if not isinstance(x, Apply) or x.dtype not in (torch.int32, torch.int64):
        return None
    inner = x.operands[0]
    if x.operator == "to":
        if inner.dtype.is_floating_point:
            return None
        return sum_of(inner)
    size = block_of(x)
    if size == 1:
        return Sum({inner: 1}, 0)
    if size is not None:
        # One term for a block, whatever its dtype.
        return Sum({block(inner, size): 1}, 0)
    if x.operator == "abs":
        if sum_of(inner) is None:
            return None
        return Sum({x: 1}, 0)
    return _arithmetic(x)


def _arithmetic(x: Apply) -> Sum | None:
    """A sum of sums, or a product with a number."""
    if x.operator not in ("add", "sub", "neg", "mul"):
        return None
    sums = [sum_of(operand) for operand in x.operands]
    first, last = sums[0], sums[-1]
    if first is None or last is None:
        return None
    if x.operator == "neg":
        return first.times(-1)
    if x.operator == "sub":
        return first.plus(last.times(-1))
    if x.operator == "add":
        return first.plus(last)
    # A product, of which one factor must be a number.
    if not last.terms:
        return first.times(last.number)
    if not first.terms:
        return last.times(first.number)
    return None


def block(index: Expression, size: int) -> Expression:
    """index // size."""
    return Apply("floordiv", (index, Number(size, torch.int64)), torch.int64)


def block_of(term: Expression) -> int | None:
    """The block size of index // size; None for other terms."""
    if not isinstance(term, Apply) or term.operator != "floordiv":
        return None
    index, size = term.operands
    if not isinstance(index, Index) or not isinstance(size, Number) or size.value < 1:
        return None
    return int(size.value)
