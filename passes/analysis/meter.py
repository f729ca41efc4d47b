"""A dispatch mode that counts the bytes of tensors allocated under it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .workspaces import workspace_bytes


class Meter(TorchDispatchMode):
    """Counts the bytes of storages from their allocation until they are freed.

    Enter it inside a FakeTensorMode: tensors without data have sizes and lifetimes, and no memory.

    live_bytes: of all storages that live now
    peak_bytes: the most at one time, workspaces of operators included
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: set[int] = set()

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors from outside the mode and their views."""
        self._storages.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        during = self.live_bytes + workspace_bytes(func, args, kwargs or {})
        self.peak_bytes = max(self.peak_bytes, during)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        # The address may be reused once the storage is freed. Not at exit, when nothing is counted.
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= size
