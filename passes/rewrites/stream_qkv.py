"""Transformer blocks in inference, in chunks of tokens.

Only keys, values and the result exist for all tokens.

    for each chunk of tokens:    key[chunk], value[chunk] = f(x[chunk])
    for each chunk of tokens:    result[chunk] = g(x[chunk], attention(h(x[chunk]), key, value))

The attention is F.scaled_dot_product_attention, or a registered one: see `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph

from .rows import attentions, blocks
from .rows.attentions import attention
from .rows.chunks import InChunks, chunks, replace
from .rows.readers import needs_gradient
from .rows.recipes import Recipe

__all__ = ["StreamQKV", "attention", "streamed"]

# Bytes of all values of a chunk by default.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StreamQKV(InChunks):
    """Runs the transformer blocks (rows/blocks.py) of a graph without gradients in chunks.

    rows: tokens of a chunk, of each sequence
    chunk_bytes: instead, bytes of a chunk of one sequence, which has at least one token: the most
        that is live at one time

    Leaves alone graphs with a gradient, cross-attention, masks given as tensors, dropout in
    training, what autocast converts. Raises ValueError if one of the two is less than 1, or both
    are given.
    """

    def __call__(self, graph: Graph) -> list[str]:
        if any(map(needs_gradient, graph.nodes)):
            return []
        return [self._replace(graph, block) for block in blocks.find(graph)]

    def _replace(self, graph: Graph, block: blocks.Block) -> str:
        result = block.nodes[-1]
        rows = self.rows_of(block.row_bytes, _CHUNK_BYTES)
        attention, _ = attentions.parse(block.attention)
        operands = (
            [*block.rows],
            [*block.shared],
            str(block.query_recipe),
            str(block.key_recipe),
            str(block.value_recipe),
            str(block.result_recipe),
            block.attention,
            rows,
        )
        with graph.inserting_before(result):
            node = graph.call_function(torch.ops.passes.streamed.default, operands)
        source = replace(graph, node, block.nodes, result)
        return (
            f"{result.name} in chunks of {rows} tokens, with keys and values whole: "
            f"{attention.name}  {source}"
        ).rstrip()


@torch.library.custom_op("passes::streamed", mutates_args=())
def streamed(
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    query_recipe: str,
    key_recipe: str,
    value_recipe: str,
    result_recipe: str,
    attention: str,
    chunk_rows: int,
) -> Tensor:
    """Run a block (rows/blocks.py) in chunks of tokens.

    rows: the first is (batch, tokens, features), the others are (..., tokens, features)
    shared: operands that all tokens share
    attention: text for attentions.parse
    """
    queries, results = Recipe.parse(query_recipe), Recipe.parse(result_recipe)
    attend, options = attentions.parse(attention)
    tokens = rows[0].shape[1]
    key = _heads(Recipe.parse(key_recipe), rows, shared, chunk_rows)
    value = _heads(Recipe.parse(value_recipe), rows, shared, chunk_rows)
    out = _empty_result(rows, shared, query_recipe, value_recipe, results)
    for chunk in chunks(tokens, chunk_rows, out.device):
        operands = [operand[..., chunk, :] for operand in rows]
        first, last = attend.reach(chunk.start, chunk.stop, tokens, **options)
        attended = attend.part(
            queries.run(operands, shared),
            key[..., first:last, :],
            value[..., first:last, :],
            chunk.start,
            first,
            **options,
        )
        # The joined heads have no name of their own: they are free before the next chunk.
        out[:, chunk] = results.run([*operands, attended.transpose(1, 2).flatten(2)], shared)
    return out


@streamed.register_fake
def _(
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    query_recipe: str,
    key_recipe: str,
    value_recipe: str,
    result_recipe: str,
    attention: str,
    chunk_rows: int,
) -> Tensor:
    return _empty_result(rows, shared, query_recipe, value_recipe, Recipe.parse(result_recipe))


def _heads(
    recipe: Recipe, rows: Sequence[Tensor], shared: Sequence[Tensor], chunk_rows: int
) -> Tensor:
    """Run a recipe on all tokens: (batch, heads, tokens, features)."""
    kind, (batch, tokens, _) = recipe.kind(rows, shared), rows[0].shape
    heads = rows[0].new_empty((batch, kind.shape[0], tokens, kind.shape[2]), dtype=kind.dtype)
    for chunk in chunks(tokens, chunk_rows, heads.device):
        heads[..., chunk, :] = recipe.run([operand[..., chunk, :] for operand in rows], shared)
    return heads


def _empty_result(
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    query_recipe: str,
    value_recipe: str,
    results: Recipe,
) -> Tensor:
    """The block's result, (batch, tokens, features), not written yet."""
    query = Recipe.parse(query_recipe).kind(rows, shared)
    value = Recipe.parse(value_recipe).kind(rows, shared)
    width = query.shape[0] * value.shape[2]
    joined = torch.empty((1, width), dtype=value.dtype, device="meta")
    kind = results.kind([*rows, joined], shared)
    return rows[0].new_empty((*rows[0].shape[:2], kind.shape[-1]), dtype=kind.dtype)
