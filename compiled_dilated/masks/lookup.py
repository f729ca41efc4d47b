"""Binary search as a fixed number of gathers.

Pointwise, so that it runs in FlexAttention's kernels and in numpy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..regions import IntArray


def rank(table: tuple[int, ...], x: Any, entries: Any = None) -> Any:
    """Number of entries of the ascending `table` that are <= x.

    x: a numpy array or torch tensor of any shape.
    entries: `as_tensor(table, device)`; required in compiled kernels, which cannot create it.
    """
    import torch

    if not isinstance(x, torch.Tensor):
        return np.searchsorted(_array(table), x, side="right")
    if entries is None:
        entries = _entries(table, x.device)
    low = x - x
    for width in _widths(len(table)):
        # Invariant: low <= rank < low + 2 * width.
        probe = (low + width - 1).clamp(max=len(table) - 1)
        low = low + width * ((low + width <= len(table)) & (entries[probe] <= x))
    return low


def runs(ascending: IntArray, unit: int = 1) -> list[range]:
    """Ascending distinct numbers as few ranges; each number covers `unit` positions."""
    if not len(ascending):
        return []
    # Where a number does not continue the run before it.
    cuts = np.flatnonzero(np.diff(ascending) != 1)
    firsts = ascending[np.append(0, cuts + 1)].tolist()
    lasts = ascending[np.append(cuts, len(ascending) - 1)].tolist()
    out = []
    for first, last in zip(firsts, lasts, strict=True):
        out.append(range(first * unit, (last + 1) * unit))
    return out


def as_tensor(table: tuple[int, ...], device: Any) -> Any:
    """The table for `rank`."""
    import torch

    return torch.tensor(table, dtype=torch.int64, device=device)


def _entries(table: tuple[int, ...], device: Any) -> Any:
    """The table as a tensor, cached except in a trace."""
    from ..tracing import is_traced

    if is_traced():
        # A tensor created while tracing belongs to the trace and must not be cached.
        return as_tensor(table, device)
    return _tensor(table, device)


def _widths(size: int) -> list[int]:
    return [1 << bit for bit in reversed(range(size.bit_length()))]


@lru_cache(maxsize=64)
def _array(table: tuple[int, ...]) -> Any:
    return np.asarray(table, dtype=np.int64)


@lru_cache(maxsize=64)
def _tensor(table: tuple[int, ...], device: Any) -> Any:
    return as_tensor(table, device)
