"""Sizes that may be symbolic, as in a graph of varying lengths."""

from __future__ import annotations

from typing import Any


def example_size(size: Any) -> int:
    """A size, or the value that a symbolic size was traced with."""
    if isinstance(size, int):
        return size
    return int(size.node.hint)


def greatest(size: Any) -> int | None:
    """A size, or the upper bound of a symbolic one, if any."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).upper
    if not bound.is_Integer:
        return None
    return int(bound)
