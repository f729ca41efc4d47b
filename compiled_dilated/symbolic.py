"""Sizes that may be symbolic, as in a graph of varying lengths."""

from __future__ import annotations

from typing import Any


def example_size(size: Any) -> int:
    """A size, or the value that a symbolic size was traced with."""
    if isinstance(size, int):
        return size
    return int(size.node.hint)
