"""Memory for copies, kept from one kernel call to the next: touching fresh pages takes longer than the copy itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A copy of a tensor, from memory of somebody's choice and in a dtype of theirs.
Copy = Callable[[Tensor], Tensor]


def fresh(x: Tensor) -> Tensor:
    """A copy in memory that nobody else has."""
    return x.clone(memory_format=torch.contiguous_format)


class Workspace:
    """One buffer per use, as large as the largest copy so far. A copy is valid until the next one for the same use."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def room(self, use: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor on the device of `like`, for one use, as "key" or "value"."""
        size = math.prod(shape)
        buffer = self._buffers.get(use)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            del buffer  # with the next line: freed before its successor is made
            self._buffers.pop(use, None)
            buffer = self._buffers[use] = like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def copy(self, use: str, dtype: torch.dtype) -> Copy:
        """Copies into the room for one use."""
        return lambda x: self.room(use, x, x.shape, dtype).copy_(x)
