"""What our operators hold and do inside, told to the estimates: footprint counts their workspace, costs their work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import costs, footprint
from .chunk import chunked, chunked_backward
from .costs import Work
from .rows.recipes import Recipe


def rehearse(body: Callable[..., Any], *args: Any) -> int:
    """Most bytes that body(*args) holds at once beyond its operands and results, on tensors of those sizes without data."""
    with _disable_current_modes():
        given = pytree.tree_map_only(Tensor, _without_data, args)
        with _Counter() as counter:
            results = body(*given)
        made = [each for each in pytree.tree_leaves(results) if isinstance(each, Tensor)]
        return int(counter.most - sum(each.untyped_storage().nbytes() for each in made))


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Counter(TorchDispatchMode):
    """Counts the bytes of storages made under it while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.most, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage()._cdata for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in pytree.tree_leaves(result):
            if isinstance(each, Tensor) and (storage := each.untyped_storage())._cdata not in known | self.seen:
                self.seen.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.held)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.held -= size


def _forward_bytes(rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int) -> int:
    return rehearse(chunked._init_fn, _some(rows, chunk_rows), list(shared), recipe, chunk_rows)


def _backward_bytes(
    grad: Tensor, rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int, wanted: Sequence[bool]
) -> int:
    (some,) = _some([grad], chunk_rows)
    return rehearse(chunked_backward._init_fn, some, _some(rows, chunk_rows), list(shared), recipe, chunk_rows, wanted)


def _some(rows: Sequence[Tensor], chunk_rows: int) -> list[Tensor]:
    """Two chunks: later ones hold no more than the second."""
    return [each.flatten(0, -2)[: 2 * chunk_rows] for each in rows]


def _work(rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str) -> Work:
    """Of a forward: all rows by all weights, and every value, which lies in a cache."""
    count = rows[0].numel() // rows[0].shape[-1]
    made = sum(each.nbytes for each in Recipe.parse(recipe).kinds(rows, shared).values() if len(each) == 1)
    return Work(2.0 * count * sum(each.numel() for each in shared if each.dim() == 2), 0.5 * count * made)


def _backward_work(grad: Tensor, rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, *rest: Any, out: Any) -> Work:
    """The forward again, and a gradient for either side of every product."""
    work = _work(rows, shared, recipe)
    return work + work + work


footprint.workspace(torch.ops.passes.chunked.default, _forward_bytes)
footprint.workspace(torch.ops.passes.chunked_backward.default, _backward_bytes)
costs.register(torch.ops.passes.chunked.default, lambda rows, shared, recipe, *_, out: _work(rows, shared, recipe))
costs.register(torch.ops.passes.chunked_backward.default, _backward_work)
