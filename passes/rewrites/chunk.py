"""MLPs and wide heads some rows at a time: what is wider than their input and output is never whole, in backward neither.

Each becomes one operator with an autograd of its own. Forward keeps its operands alone; backward computes a chunk's values again
(its last linear excepted), adds to the sums of weight gradients in place, and goes on to the next chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from .rows import regions
from .rows.chunks import InChunks, parts, put
from .rows.readers import needs_gradient
from .rows.recipes import Recipe, zero_sum

# What all values of a chunk take together where nobody says: they stay in a last-level cache, and products stay large.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Chunk(InChunks):
    """Rewrites the parts of a graph that work on rows through something wide (rows/regions.py) to run in chunks of rows.

    rows: how many at a time. chunk_bytes: instead, as many as fit in (at least one): where no gradient is wanted, with what of a
    chunk is held at once, else with all its values; backward takes at most twice that. What kernels hold comes on top. Left
    alone: what mixes rows or is used elsewhere too, dropout in training, what autocast converts. Raises ValueError where one of
    them is less than 1, or both are given.
    """

    def __call__(self, graph: Graph) -> list[str]:
        return [self._replace(graph, region) for region in regions.find(graph)]

    def _replace(self, graph: Graph, region: regions.Region) -> str:
        rows = self.rows_of(region.row_bytes(at_once=not any(map(needs_gradient, region.nodes))), _CHUNK_BYTES)
        with graph.inserting_before(region.result):
            node = graph.call_function(
                torch.ops.passes.chunked.default, ([*region.rows], [*region.shared], str(region.recipe), rows)
            )
        source = put(graph, node, region.nodes, region.result)
        does = ", ".join(step.primitive for step in region.recipe.steps)
        return f"{region.result.name} in chunks of {rows} rows: {does}  {source}".rstrip()


@torch.library.custom_op("passes::chunked", mutates_args=())
def chunked(rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int) -> Tensor:
    """What a recipe makes of `rows`, each (..., features) with the same leading dims, `chunk_rows` of them at a time.

    Rows whose leading dims cannot be flattened as a view are copied whole.
    """
    plan, flat = Recipe.parse(recipe), _flat(rows)
    out = _result(plan, flat, shared)
    for part in parts(len(flat[0]), chunk_rows, flat[0].device):
        out[part] = plan.run([each[part] for each in flat], shared)
    return out.view(*rows[0].shape[:-1], *out.shape[1:])


@torch.library.custom_op("passes::chunked_backward", mutates_args=())
def chunked_backward(
    grad: Tensor, rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int, wanted: Sequence[bool]
) -> list[Tensor]:
    """The gradients of those of (*rows, *shared) that are wanted. The sums of 16-bit weights' gradients are held in float32."""
    plan, flat, lead = Recipe.parse(recipe), _flat(rows), rows[0].shape[:-1]
    by_rows, by_shared = _wanted("x", flat, wanted[: len(rows)]), _wanted("w", shared, wanted[len(rows) :])
    found = [each.new_empty(each.shape) for each in by_rows.values()]
    sums = {name: zero_sum(each) for name, each in by_shared.items()}
    flat_grad, names = grad.flatten(0, len(lead) - 1), frozenset([*by_rows, *by_shared])
    for part in parts(len(flat[0]), chunk_rows, flat[0].device):
        pieces = plan.backward(flat_grad[part], [each[part] for each in flat], shared, sums, names)
        for whole, piece in zip(found, pieces, strict=True):
            whole[part] = piece
    return [each.unflatten(0, lead) for each in found] + [sums[name].to(each.dtype) for name, each in by_shared.items()]


@chunked.register_fake
def _(rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int) -> Tensor:
    kind = Recipe.parse(recipe).kind(rows, shared)
    return rows[0].new_empty((*rows[0].shape[:-1], *kind.shape[1:]), dtype=kind.dtype)


@chunked_backward.register_fake
def _(
    grad: Tensor, rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int, wanted: Sequence[bool]
) -> list[Tensor]:
    return [each.new_empty(each.shape) for each, is_wanted in zip((*rows, *shared), wanted, strict=True) if is_wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, shared, ctx.recipe, ctx.chunk_rows = inputs
    ctx.many = len(rows)
    ctx.save_for_backward(*rows, *shared)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, shared = ctx.saved_tensors[: ctx.many], ctx.saved_tensors[ctx.many :]
    wanted = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    found = iter(chunked_backward(grad, rows, shared, ctx.recipe, ctx.chunk_rows, wanted))
    grads = [next(found) if is_wanted else None for is_wanted in wanted]
    return grads[: ctx.many], grads[ctx.many :], None, None


chunked.register_autograd(_differentiate, setup_context=_keep)


def _flat(rows: Sequence[Tensor]) -> list[Tensor]:
    return [each.flatten(0, -2) for each in rows]


def _wanted(kind: str, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> dict[str, Tensor]:
    """Those that are wanted, by the names that a recipe gives them."""
    return {f"{kind}{i}": each for i, (each, is_wanted) in enumerate(zip(tensors, wanted, strict=True)) if is_wanted}


def _result(plan: Recipe, flat: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    kind = plan.kind(flat, shared)
    return flat[0].new_empty((len(flat[0]), *kind.shape[1:]), dtype=kind.dtype)
