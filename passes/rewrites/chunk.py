"""MLPs and wide heads in chunks of rows.

What is wider than input and output never exists for all rows. Each becomes one operator with its
own autograd. Forward saves its operands only; backward computes a chunk's values again (not its
last linear), adds weight gradients to their sums in-place, and goes on to the next chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from .rows import regions
from .rows.chunks import InChunks, chunks, replace
from .rows.gradients import aligned, zero_sum
from .rows.readers import needs_gradient
from .rows.recipes import Recipe

# Bytes of all values of a chunk by default: they fit in a last-level cache, and products are large.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Chunk(InChunks):
    """Runs regions of row-wise work (rows/regions.py) in chunks of rows.

    rows: rows of a chunk
    chunk_bytes: instead, bytes of a chunk, which has at least one row. Without a gradient that is
        the most that is live at one time, else all values of the chunk; backward takes at most
        twice that. Workspaces of kernels come on top.

    Leaves alone what mixes rows, what other nodes use, dropout in training, what autocast converts.
    Raises ValueError if one of the two is less than 1, or both are given.
    """

    def __call__(self, graph: Graph) -> list[str]:
        return [self._replace(graph, region) for region in regions.find(graph)]

    def _replace(self, graph: Graph, region: regions.Region) -> str:
        has_backward = any(map(needs_gradient, region.nodes))
        rows = self.rows_of(region.row_bytes(at_once=not has_backward), _CHUNK_BYTES)
        operands = ([*region.rows], [*region.shared], str(region.recipe), rows)
        with graph.inserting_before(region.result):
            node = graph.call_function(torch.ops.passes.chunked.default, operands)
        source = replace(graph, node, region.nodes, region.result)
        primitives = ", ".join(step.primitive for step in region.recipe.steps)
        return f"{region.result.name} in chunks of {rows} rows: {primitives}  {source}".rstrip()


@torch.library.custom_op("passes::chunked", mutates_args=())
def chunked(
    rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int
) -> Tensor:
    """Run a recipe on `chunk_rows` rows at a time.

    rows: (..., features) with the same leading dims; copied if these cannot be flattened as a view
    shared: operands that all rows share
    """
    plan, flat = Recipe.parse(recipe), _flat(rows)
    kind = plan.kind(flat, shared)
    out = flat[0].new_empty((len(flat[0]), *kind.shape[1:]), dtype=kind.dtype)
    for chunk in chunks(len(flat[0]), chunk_rows, flat[0].device):
        out[chunk] = plan.run([operand[chunk] for operand in flat], shared)
    return out.view(*rows[0].shape[:-1], *out.shape[1:])


@torch.library.custom_op("passes::chunked_backward", mutates_args=())
def chunked_backward(
    grad: Tensor,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    recipe: str,
    chunk_rows: int,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """The gradients of those of (*rows, *shared) that need one.

    Gradients of shared operands are summed over chunks in float32 at least.

    grad: of the result
    """
    plan, flat, lead = Recipe.parse(recipe), _flat(rows), rows[0].shape[:-1]
    needed_rows = _needed("x", flat, needs_grad[: len(rows)])
    needed_shared = _needed("w", shared, needs_grad[len(rows) :])
    # Gradients of rows are written chunk by chunk; those of shared operands are sums over chunks.
    row_grads = [operand.new_empty(operand.shape) for operand in needed_rows.values()]
    sums = {name: zero_sum(operand) for name, operand in needed_shared.items()}
    names = frozenset([*needed_rows, *needed_shared])
    flat_grad = grad.flatten(0, len(lead) - 1)
    for chunk in chunks(len(flat[0]), chunk_rows, flat[0].device):
        operands = [operand[chunk] for operand in flat]
        pieces = plan.backward(flat_grad[chunk], operands, shared, sums, names)
        for row_grad, piece in zip(row_grads, pieces, strict=True):
            row_grad[chunk] = piece
    shared_grads = [sums[name].to(operand.dtype) for name, operand in needed_shared.items()]
    return [row_grad.unflatten(0, lead) for row_grad in row_grads] + shared_grads


@chunked.register_fake
def _(rows: Sequence[Tensor], shared: Sequence[Tensor], recipe: str, chunk_rows: int) -> Tensor:
    kind = Recipe.parse(recipe).kind(rows, shared)
    return rows[0].new_empty((*rows[0].shape[:-1], *kind.shape[1:]), dtype=kind.dtype)


@chunked_backward.register_fake
def _(
    grad: Tensor,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    recipe: str,
    chunk_rows: int,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    return [
        operand.new_empty(operand.shape)
        for operand, is_needed in zip((*rows, *shared), needs_grad, strict=True)
        if is_needed
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, shared, ctx.recipe, ctx.chunk_rows = inputs
    ctx.row_operands = len(rows)
    ctx.save_for_backward(*rows, *shared)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    count = ctx.row_operands
    rows, shared = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    needs_grad = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    computed = chunked_backward(grad, rows, shared, ctx.recipe, ctx.chunk_rows, needs_grad)
    grads = aligned(computed, needs_grad)
    return grads[:count], grads[count:], None, None


chunked.register_autograd(_differentiate, setup_context=_save)


def _flat(rows: Sequence[Tensor]) -> list[Tensor]:
    """Operands as (rows, features)."""
    return [operand.flatten(0, -2) for operand in rows]


def _needed(
    letter: str, operands: Sequence[Tensor], needs_grad: Sequence[bool]
) -> dict[str, Tensor]:
    """The operands that need a gradient, by their names in a recipe.

    letter: of the names, before a number
    """
    needed: dict[str, Tensor] = {}
    for i, (operand, is_needed) in enumerate(zip(operands, needs_grad, strict=True)):
        if is_needed:
            needed[f"{letter}{i}"] = operand
    return needed
