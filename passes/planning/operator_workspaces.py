"""What our operators hold and do inside, told to the estimates: footprint counts their workspace, costs their work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..analysis import costs, footprint
from ..analysis.costs import Work
from ..analysis.workspaces import workspace_bytes
from ..rewrites.chunk import chunked, chunked_backward
from ..rewrites.rows import attentions, losses
from ..rewrites.rows.recipes import Recipe
from ..rewrites.stream_qkv import streamed
from ..versions import HAS_LINEAR_CROSS_ENTROPY


def rehearse(body: Callable[..., Any], *args: Any) -> int:
    """Most bytes that body(*args) holds at once beyond its operands and results, on tensors of those sizes without data."""
    leaves, spec = pytree.tree_flatten(args)
    kinds = (_Kind(each.shape, each.stride(), each.dtype, each.device) if isinstance(each, Tensor) else each for each in leaves)
    return _rehearsed(body, tuple(kinds), spec, torch.get_num_threads())


@dataclass(frozen=True)
class _Kind:
    """All of a tensor but its data."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@lru_cache(maxsize=256)  # the layers of a model are alike, and planned several times
def _rehearsed(body: Callable[..., Any], leaves: tuple[Any, ...], spec: pytree.TreeSpec, threads: int) -> int:
    assert threads == torch.get_num_threads()  # kernels hold something for each
    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
        given = pytree.tree_unflatten([each.made() if isinstance(each, _Kind) else each for each in leaves], spec)
        with _Counter() as counter:
            results = body(*given)
        made = [each for each in pytree.tree_leaves(results) if isinstance(each, Tensor)]
        return int(counter.most - sum(each.untyped_storage().nbytes() for each in made))


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
        self.most = max(self.most, self.held + workspace_bytes(func, args, kwargs or {}))
        return result

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.held -= size


def told(op: CustomOpDef, work: Callable[..., Work]) -> None:
    """Has the estimates know a custom operator written in Python: its workspace by a rehearsal of its body, its work."""
    footprint.workspace(op._opoverload, lambda *args, **kwargs: rehearse(op._init_fn, *args, *kwargs.values()))
    costs.register(op._opoverload, work)


def _work(rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str) -> Work:
    """Of a forward: all rows by all weights, and every value, which lies in a cache."""
    count = rows[0].numel() // rows[0].shape[-1]
    made = sum(each.nbytes for each in Recipe.parse(recipe).kinds(rows, shared).values() if len(each) == 1)
    return Work(2.0 * count * sum(each.numel() for each in shared if each.dim() == 2), 0.5 * count * made)


def _backward_work(grad: Tensor, rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, *rest: Any, out: Any) -> Work:
    """The forward again, and a gradient for either side of every product."""
    work = _work(rows, shared, recipe)
    return work + work + work


def _streamed_work(
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    query: str,
    key: str,
    value: str,
    result: str,
    attention: str,
    chunk_rows: int,
    *,
    out: Tensor,
) -> Work:
    """All tokens by all weights, the attention, and every value, which lies in a cache."""
    (batch, tokens, _), weights = rows[0].shape, sum(each.numel() for each in shared if each.dim() == 2)
    attend, options = attentions.parse(attention)
    recipes = [Recipe.parse(each) for each in (query, key, value)]
    kinds = [recipe.kind(rows, shared) for recipe in recipes]
    heads = [rows[0].new_empty((batch, kind.shape[0], tokens, kind.shape[2]), dtype=kind.dtype) for kind in kinds]
    attended = rows[0].new_empty((batch, tokens, kinds[0].shape[0] * kinds[2].shape[2]), dtype=kinds[2].dtype)
    made = sum(recipe.row_bytes(rows, shared) for recipe in recipes)
    made += Recipe.parse(result).row_bytes([*rows, attended], shared) + attended[0, 0].nbytes
    flops = 2.0 * batch * tokens * weights + attend.flops(*heads, **options)
    return Work(flops, 0.5 * batch * tokens * made)


def _loss_work(products: int) -> Callable[..., Work]:
    """Of so many products of tokens, features and classes."""

    def work(*args: Any, out: Any, **kwargs: Any) -> Work:
        x, weight = [each for each in args if isinstance(each, Tensor) and each.dim() == 2][:2]
        return Work(2.0 * products * x.numel() * len(weight), 4.0 * len(x) * len(weight))

    return work


def tell_all() -> None:
    """Has the estimates know every operator of this package."""
    told(chunked, lambda rows, shared, recipe, *_, out: _work(rows, shared, recipe))
    told(chunked_backward, _backward_work)
    told(streamed, _streamed_work)
    told(losses.linear_cross_entropy, _loss_work(1))
    told(losses.linear_cross_entropy_backward, _loss_work(3))
    if HAS_LINEAR_CROSS_ENTROPY:
        from torch.nn.modules.linear_cross_entropy import _linear_cross_entropy_batch_chunked

        # It computes its gradients in forward.
        told(_linear_cross_entropy_batch_chunked, _loss_work(3))
