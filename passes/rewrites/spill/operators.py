"""The operators of a spilled graph, and the handles of its tensors.

    handle = write(x, directory)        begins to write; x must not change
    handle = written(handle, x)         waits until x is stored: x may be freed or overwritten
    x      = fetch(handle, next, ...)   reads it into new memory, once, and prefetches `next`

A handle is a tensor of one number, whose memory owns the store. When the last tensor of that memory
is freed, as when an autograd graph is dropped without a backward, so is the store.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .stores import FileStore, HostStore, Store

HOST = ":host:"


class _Number(np.ndarray[Any, np.dtype[np.int64]]):
    """The memory of a handle, which keeps its entry alive."""

    owner: _Entry


class _Entry:
    """The store that a tensor's handles share; None once it was fetched."""

    def __init__(self, store: Store) -> None:
        self.store: Store | None = store


# A compiled graph passes handles on as numbers; an entry lives as long as its handles' memory.
_numbers = itertools.count()
_entries: weakref.WeakValueDictionary[int, _Entry] = weakref.WeakValueDictionary()


@torch.library.custom_op("passes::write", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def write(x: Tensor, directory: str) -> Tensor:
    """Begin to write x, and return its handle.

    directory: of the file; "" for tempfile's own, HOST for the host's memory
    """
    to_host = directory == HOST
    store = HostStore(x) if to_host else FileStore(x, directory or tempfile.gettempdir())
    number = next(_numbers)
    _entries[number] = entry = _Entry(store)
    return _handle(number, entry)


@torch.library.custom_op("passes::written", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def written(handle: Tensor, x: Tensor) -> Tensor:
    """Wait until x is written.

    As an operand, x is not freed or overwritten before.
    """
    number = int(handle)
    entry = _entries[number]
    assert entry.store is not None
    entry.store.finish()
    return _handle(number, entry)


@torch.library.custom_op("passes::fetch", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def fetch(
    handle: Tensor,
    next: Tensor | None,
    after: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Read the tensor of a handle, contiguous, and free its store.

    next: the handle that will be fetched next
    after: a value that must be computed first; its data is not read

    Raises RuntimeError if the tensor was fetched before.
    """
    entry = _entries.get(int(handle))
    if entry is None or entry.store is None:
        raise RuntimeError(
            f"a spilled activation {tuple(shape)} was fetched by an earlier backward, and is gone. "
            "Spilled graphs take one backward: run the forward again, or compile without Spill for "
            "retain_graph=True"
        )
    # Taken out first, so that a second fetch fails even if this one raises.
    store, entry.store = entry.store, None
    # The next read overlaps the computation up to it.
    if next is not None:
        next_entry = _entries.get(int(next))
        if next_entry is not None and next_entry.store is not None:
            next_entry.store.prefetch()
    x = torch.empty(tuple(shape), dtype=dtype, device=device)
    store.take(x)
    return x


@write.register_fake
def _(x: Tensor, directory: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@written.register_fake
def _(handle: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(handle)


@fetch.register_fake
def _(
    handle: Tensor,
    next: Tensor | None,
    after: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


WRITE = torch.ops.passes.write.default
WRITTEN = torch.ops.passes.written.default
FETCH = torch.ops.passes.fetch.default


def _handle(number: int, entry: _Entry) -> Tensor:
    """A tensor of one number whose memory refers to the entry."""
    memory: npt.NDArray[np.int64] = np.array([number], dtype=np.int64)
    # A view of a subclass can have attributes, and the tensor refers to it.
    owned = memory.view(_Number)
    owned.owner = entry
    return torch.from_numpy(owned)
