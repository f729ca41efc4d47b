"""Binary search written as a fixed number of gathers, so that it is pointwise: fit for FlexAttention's kernels and for numpy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np


def rank(table: tuple[int, ...], x: Any) -> Any:
    """How many entries of the ascending `table` are <= x, for each element of a numpy array or torch tensor."""
    if isinstance(x, np.ndarray):
        return np.searchsorted(_array(table), x, side="right")
    import torch

    entries = _tensor(table, x.device) if isinstance(x, torch.Tensor) else _tensor(table, torch.device("cpu"))
    low = x - x
    for width in _widths(len(table)):
        # Invariant: the answer lies in [low, low + 2 * width - 1].
        probe = (low + width - 1).clamp(max=len(table) - 1)
        low = low + width * ((low + width <= len(table)) & (entries[probe] <= x))
    return low


def _widths(size: int) -> list[int]:
    return [1 << bit for bit in reversed(range(size.bit_length()))]


@lru_cache(maxsize=64)
def _array(table: tuple[int, ...]) -> Any:
    return np.asarray(table, dtype=np.int64)


@lru_cache(maxsize=64)
def _tensor(table: tuple[int, ...], device: Any) -> Any:
    import torch

    return torch.tensor(table, dtype=torch.int64, device=device)
