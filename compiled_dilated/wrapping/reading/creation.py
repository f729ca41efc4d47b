"""Rules for tensors of constants and of positions.

A rule's arguments are the `Call`, the indices of an entry of its result, and the arguments of the
node. It returns the entry, or None for what it does not read; the node is then captured.
"""

from __future__ import annotations

from typing import Any

import torch

from .expressions import ZERO, At, Expression, Number, constant
from .reader import Call, Rule
from .simplify import apply


def arange(call: Call, at: At, *bounds: Any, **options: Any) -> Expression | None:
    """start + step * index, of integers."""
    # A single bound is the end, which no entry depends on.
    first, increment = options.get("start", 0), options.get("step", 1)
    if len(bounds) > 1:
        first = bounds[0]
    if len(bounds) > 2:
        increment = bounds[2]
    start, step = call.at(first, ()), call.at(increment, ())
    if "out" in options or start.dtype != torch.int64 or step.dtype != torch.int64:
        return None
    entry: Expression = at[0]
    if step != Number(1, torch.int64):
        entry = apply("mul", (step, entry), step.dtype)
    if start != ZERO:
        entry = apply("add", (start, entry), step.dtype)
    if call.dtype.is_floating_point:
        return apply("to", (entry,), call.dtype)
    return entry


def _filled(fill: bool) -> Rule:
    return lambda call, at, *sizes, **options: constant(fill, call.dtype)


ones, zeros = _filled(True), _filled(False)


def full(call: Call, at: At, shape: Any, fill_value: Any, **options: Any) -> Expression:
    """fill_value everywhere."""
    return apply("to", (call.at(fill_value, ()),), call.dtype)


def tensor(call: Call, at: At, data: Any, **options: Any) -> Expression | None:
    """A tensor of one number."""
    if not isinstance(data, (bool, int, float)):
        return None
    return constant(data, call.dtype)
