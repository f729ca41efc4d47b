"""Workspace and work of this package's own operators.

A table, registered with the estimates. The workspace of an operator written in Python is measured
by running its body on tensors without data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..analysis import costs
from ..analysis.costs import Work
from ..analysis.meter import Meter
from ..analysis.workspaces import workspace_default
from ..rewrites.chunk import chunked, chunked_backward
from ..rewrites.rows import attentions, losses
from ..rewrites.rows.recipes import Recipe
from ..rewrites.spill.operators import fetch, write, written
from ..rewrites.stream_qkv import streamed
from ..versions import HAS_LINEAR_CROSS_ENTROPY


def register_all() -> None:
    """Register every operator of the table that is not registered yet. Idempotent."""
    for op, work in _with_workspace():
        workspace_default(op._opoverload, _workspace_of(op))
        costs.register_default(op._opoverload, work)
    for op, work in _WITHOUT_WORKSPACE:
        costs.register_default(op._opoverload, work)


def _workspace_of(op: CustomOpDef) -> Callable[..., int]:
    """The workspace of an operator's calls, by its body in Python."""

    def workspace(*args: Any, **kwargs: Any) -> int:
        return body_workspace(op._init_fn, *args, *kwargs.values())

    return workspace


def body_workspace(body: Callable[..., Any], *args: Any) -> int:
    """The peak of body(*args) in bytes, beyond operands and results."""
    leaves, spec = pytree.tree_flatten(args)
    kinds: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = _Kind(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
        kinds.append(leaf)
    return _measured(body, tuple(kinds), spec, torch.get_num_threads())


@dataclass(frozen=True)
class _Kind:
    """A tensor without its data."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


# The layers of a model have the same shapes, and are planned several times.
@lru_cache(maxsize=256)
def _measured(
    body: Callable[..., Any], kinds: tuple[Any, ...], spec: pytree.TreeSpec, threads: int
) -> int:
    assert threads == torch.get_num_threads()  # part of the key: kernels have workspace per thread
    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
        leaves: list[Any] = []
        for kind in kinds:
            leaves.append(kind.empty() if isinstance(kind, _Kind) else kind)
        with Meter() as meter:
            meter.exclude(leaf for leaf in leaves if isinstance(leaf, Tensor))
            results = body(*pytree.tree_unflatten(leaves, spec))
        # The caller allocates the results in any case: they are no workspace.
        result_bytes = 0
        for leaf in pytree.tree_leaves(results):
            if isinstance(leaf, Tensor):
                result_bytes += leaf.untyped_storage().nbytes()
        return int(meter.peak_bytes - result_bytes)


def _chunked_work(
    rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, *options: Any, out: Any
) -> Work:
    """All rows by all weights, and every value once.

    Values cost half, for a chunk's are in a cache.
    """
    count = rows[0].numel() // rows[0].shape[-1]
    weights = sum(operand.numel() for operand in shared if operand.dim() == 2)
    kinds = Recipe.parse(recipe).kinds(rows, shared)
    row_bytes = sum(kind.nbytes for kind in kinds.values() if len(kind) == 1)
    return Work(flops=2.0 * count * weights, memory_bytes=0.5 * count * row_bytes)


def _chunked_backward_work(
    grad: Tensor,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    recipe: str,
    *options: Any,
    out: Any,
) -> Work:
    """The forward again, and a gradient for either operand of every product."""
    work = _chunked_work(rows, shared, recipe, out=out)
    return work + work + work


def _streamed_work(
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    query_recipe: str,
    key_recipe: str,
    value_recipe: str,
    result_recipe: str,
    attention: str,
    chunk_rows: int,
    *,
    out: Tensor,
) -> Work:
    """All tokens by all weights, and the attention; values as for _chunked_work."""
    batch, tokens, _ = rows[0].shape
    weights = sum(operand.numel() for operand in shared if operand.dim() == 2)
    # 1. Query, key and value, as tensors without data for the attention's flops.
    heads: list[Tensor] = []
    token_bytes = 0
    for text in (query_recipe, key_recipe, value_recipe):
        recipe = Recipe.parse(text)
        kind = recipe.kind(rows, shared)
        shape = (batch, kind.shape[0], tokens, kind.shape[2])
        heads.append(rows[0].new_empty(shape, dtype=kind.dtype))
        token_bytes += recipe.row_bytes(rows, shared)
    # 2. The joined heads and the result.
    query, _, value = heads
    width = query.shape[1] * value.shape[3]
    joined = rows[0].new_empty((batch, tokens, width), dtype=value.dtype)
    token_bytes += Recipe.parse(result_recipe).row_bytes([*rows, joined], shared)
    token_bytes += joined[0, 0].nbytes
    attend, options = attentions.parse(attention)
    return Work(
        flops=2.0 * batch * tokens * weights + attend.flops(*heads, **options),
        memory_bytes=0.5 * batch * tokens * token_bytes,
    )


def _loss_work(products: int) -> Callable[..., Work]:
    """The work of a loss.

    products: matrix products of tokens, features and classes
    """

    def work(*args: Any, out: Any, **kwargs: Any) -> Work:
        matrices = [value for value in args if isinstance(value, Tensor) and value.dim() == 2]
        x, weight = matrices[:2]
        logits = len(x) * len(weight)
        flops = 2.0 * products * x.numel() * len(weight)
        return Work(flops=flops, memory_bytes=4.0 * logits)

    return work


Works = tuple[tuple[CustomOpDef, Callable[..., Work]], ...]

# Operators with their work. A pass with an operator of its own adds a line.
_WITH_WORKSPACE: Works = (
    (chunked, _chunked_work),
    (chunked_backward, _chunked_backward_work),
    (streamed, _streamed_work),
    (losses.linear_cross_entropy, _loss_work(1)),
    (losses.linear_cross_entropy_backward, _loss_work(3)),
)
# Writing and reading take the file's bandwidth; waiting is overlapped.
_WITHOUT_WORKSPACE: Works = (
    (write, lambda x, directory, out: Work(file_bytes=x.nbytes)),
    (written, lambda handle, x, out: Work()),
    (fetch, lambda *args, out: Work(file_bytes=out.nbytes)),
)


def _with_workspace() -> Works:
    """The operators whose body is measured.

    Torch's own loss is among them in versions that have it.
    """
    if not HAS_LINEAR_CROSS_ENTROPY:
        return _WITH_WORKSPACE
    from torch.nn.modules.linear_cross_entropy import _linear_cross_entropy_batch_chunked

    # It computes its gradients in forward.
    return (*_WITH_WORKSPACE, (_linear_cross_entropy_batch_chunked, _loss_work(3)))
