"""Ranges of whole numbers, by interval arithmetic: dtypes and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch


@dataclass(frozen=True)
class Range:
    """Whole numbers low .. high."""

    low: int
    high: int

    def contains(self, part: Range) -> bool:
        """Whether the range contains another one."""
        return self.low <= part.low and part.high <= self.high


def range_of(dtype: torch.dtype) -> Range:
    """The range of an integer dtype or bool."""
    if dtype == torch.bool:
        return Range(0, 1)
    info = torch.iinfo(dtype)
    return Range(info.min, info.max)


OF_32_BITS, OF_64_BITS = range_of(torch.int32), range_of(torch.int64)


def range_after(op: str, a: Range, b: Range | None = None) -> Range:
    """The range of an operation's exact results; 64 bits if unknown."""
    return _unary_range(op, a) if b is None else _binary_range(op, a, b)


def _unary_range(op: str, a: Range) -> Range:
    match op:
        case "negate":
            return Range(-a.high, -a.low)
        case "absolute":
            low, high = sorted((abs(a.low), abs(a.high)))
            return Range(0 if a.low <= 0 <= a.high else low, high)
        case "sign":
            return Range(-1, 1)
        case "complement":
            return Range(~a.high, ~a.low)
    return OF_64_BITS


def _binary_range(op: str, a: Range, b: Range) -> Range:
    match op:
        case "add":
            return Range(a.low + b.low, a.high + b.high)
        case "subtract":
            return Range(a.low - b.high, a.high - b.low)
        case "multiply":
            return _hull([x * y for x, y in product(_ends(a), _ends(b))])
        case "minimum":
            return Range(min(a.low, b.low), min(a.high, b.high))
        case "maximum":
            return Range(max(a.low, b.low), max(a.high, b.high))
        case "floor_divide" if b.low > 0:
            return _hull([x // y for x, y in product(_ends(a), _ends(b))])
        case "remainder" if b.low > 0:
            return Range(0, b.high - 1)
        case "fmod" if b.low > 0:
            return Range(0 if a.low >= 0 else -(b.high - 1), b.high - 1)
        case "both" | "either" | "exclusive" if OF_32_BITS.contains(a) and OF_32_BITS.contains(b):
            return OF_32_BITS
    return OF_64_BITS


def _ends(limits: Range) -> tuple[int, int]:
    return limits.low, limits.high


def _hull(corners: Sequence[int]) -> Range:
    return Range(min(corners), max(corners))
