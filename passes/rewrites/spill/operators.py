"""The operators that a graph calls, and the handle that stands for a tensor in a store.

    handle = write(x, directory)        begins; x must stay as it is
    handle = written(handle, x)         it is there: x may be freed or overwritten
    x      = fetch(handle, next, ...)   back in new memory, once; meanwhile the one for `next` is sought

A handle is a tensor of one number, whose memory owns the store. When the last tensor of that memory goes, as when an autograd
graph is dropped without a backward, the store goes with it.
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

from ...analysis import costs
from ...analysis.costs import Work
from .stores import FileStore, HostStore, Store

HOST = ":host:"


class _Number(np.ndarray[Any, np.dtype[np.int64]]):
    """The memory of a handle."""

    owner: _Place


class _Place:
    """What the handles of one tensor have in common. store: None once it was fetched."""

    def __init__(self, store: Store) -> None:
        self.store: Store | None = store


_numbers = itertools.count()
_places: weakref.WeakValueDictionary[int, _Place] = weakref.WeakValueDictionary()


@torch.library.custom_op("passes::write", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def write(x: Tensor, directory: str) -> Tensor:
    """Begins to write x to a file in `directory` ("": tempfile's own), or to HOST. Returns its handle."""
    store = HostStore(x) if directory == HOST else FileStore(x, directory or tempfile.gettempdir())
    number = next(_numbers)
    _places[number] = place = _Place(store)
    return _handle(number, place)


@torch.library.custom_op("passes::written", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def written(handle: Tensor, x: Tensor) -> Tensor:
    """Waits until x is written. It takes x so that the compiler leaves its memory alone until then."""
    number = int(handle)
    place = _places[number]
    assert place.store is not None
    place.store.finish()
    return _handle(number, place)


@torch.library.custom_op("passes::fetch", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def fetch(
    handle: Tensor, next: Tensor | None, after: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor of a handle, contiguous, and its store given up.

    next: a handle that will be fetched soon. after: what must be computed before; its values do not matter.
    Raises RuntimeError where it was fetched before.
    """
    place = _places.get(int(handle))
    if place is None or place.store is None:
        raise RuntimeError(
            f"a spilled activation {tuple(shape)} was fetched by an earlier backward, and is gone. Spilled graphs take one "
            "backward: run the forward again, or compile without Spill for retain_graph=True"
        )
    store, place.store = place.store, None
    if next is not None and (sought := _places.get(int(next))) is not None and sought.store is not None:
        sought.store.prefetch()
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    store.take(made)
    return made


@write.register_fake
def _(x: Tensor, directory: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@written.register_fake
def _(handle: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(handle)


@fetch.register_fake
def _(
    handle: Tensor, next: Tensor | None, after: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


WRITE, WRITTEN, FETCH = torch.ops.passes.write.default, torch.ops.passes.written.default, torch.ops.passes.fetch.default

costs.register(WRITE, lambda x, directory, out: Work(file_bytes=x.nbytes))
costs.register(WRITTEN, lambda handle, x, out: Work())
costs.register(FETCH, lambda *args, out: Work(file_bytes=out.nbytes))


def _handle(number: int, place: _Place) -> Tensor:
    memory: npt.NDArray[np.int64] = np.array([number], dtype=np.int64)
    owned = memory.view(_Number)
    owned.owner = place
    return torch.from_numpy(owned)
