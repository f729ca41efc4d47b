"""A transformer block in inference with keys, values and its result whole, and nothing else.

    for each chunk of tokens:    key[chunk], value[chunk] = of x[chunk]
    for each chunk of tokens:    result[chunk] = of x[chunk] and the attention of x[chunk]'s queries to the keys within reach

The attention is F.scaled_dot_product_attention, or one that says how it works on queries in parts: see `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph

from .rows import attentions, blocks
from .rows.attentions import attention
from .rows.chunks import InChunks, parts, put
from .rows.readers import needs_gradient
from .rows.recipes import Recipe

__all__ = ["StreamQKV", "attention", "streamed"]

# What all values of a chunk take together where nobody says.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StreamQKV(InChunks):
    """Rewrites the transformer blocks of a graph that needs no gradient (rows/blocks.py) to run in chunks of tokens.

    rows: how many tokens of each sequence at a time. chunk_bytes: instead, as many as fit in with what of a chunk of one sequence
    is held at once (at least one). Left alone: graphs with a gradient, cross-attention, masks given as tensors, dropout in
    training, what autocast converts. Raises ValueError where one of them is less than 1, or both are given.
    """

    def __call__(self, graph: Graph) -> list[str]:
        if any(map(needs_gradient, graph.nodes)):
            return []
        return [self._replace(graph, block) for block in blocks.find(graph)]

    def _replace(self, graph: Graph, block: blocks.Block) -> str:
        end = block.nodes[-1]
        rows = self.rows_of(block.row_bytes, _CHUNK_BYTES)
        attention, _ = attentions.parse(block.attention)
        recipes = map(str, (block.query, block.key, block.value, block.result))
        with graph.inserting_before(end):
            node = graph.call_function(
                torch.ops.passes.streamed.default, ([*block.rows], [*block.shared], *recipes, block.attention, rows)
            )
        source = put(graph, node, block.nodes, end)
        return f"{end.name} in chunks of {rows} tokens, with keys and values whole: {attention.name}  {source}".rstrip()


@torch.library.custom_op("passes::streamed", mutates_args=())
def streamed(
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    query: str,
    key: str,
    value: str,
    result: str,
    attention: str,
    chunk_rows: int,
) -> Tensor:
    """A block as recipes (rows/blocks.py): rows[0] is (batch, tokens, features), the others are (..., tokens, features)."""
    by_query, by_result = Recipe.parse(query), Recipe.parse(result)
    attend, options = attentions.parse(attention)
    tokens = rows[0].shape[1]
    keys, values = (_whole(Recipe.parse(each), rows, shared, chunk_rows) for each in (key, value))
    out = _like_result(rows, shared, query, value, by_result)
    for part in parts(tokens, chunk_rows, out.device):
        given = [each[..., part, :] for each in rows]
        first, last = attend.reach(part.start, part.stop, tokens, **options)
        within = [each[..., first:last, :] for each in (keys, values)]
        attended = attend.part(by_query.run(given, shared), *within, part.start, first, **options)
        out[:, part] = by_result.run([*given, attended.transpose(1, 2).flatten(2)], shared)
    return out


@streamed.register_fake
def _(
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    query: str,
    key: str,
    value: str,
    result: str,
    attention: str,
    chunk_rows: int,
) -> Tensor:
    return _like_result(rows, shared, query, value, Recipe.parse(result))


def _whole(recipe: Recipe, rows: Sequence[Tensor], shared: Sequence[Tensor], chunk_rows: int) -> Tensor:
    """Heads of all tokens: (batch, heads, tokens, features)."""
    kind, (batch, tokens, _) = recipe.kind(rows, shared), rows[0].shape
    made = rows[0].new_empty((batch, kind.shape[0], tokens, kind.shape[2]), dtype=kind.dtype)
    for part in parts(tokens, chunk_rows, made.device):
        made[..., part, :] = recipe.run([each[..., part, :] for each in rows], shared)
    return made


def _like_result(rows: Sequence[Tensor], shared: Sequence[Tensor], query: str, value: str, result: Recipe) -> Tensor:
    of_query, of_value = (Recipe.parse(each).kind(rows, shared) for each in (query, value))
    joined = torch.empty((1, of_query.shape[0] * of_value.shape[2]), dtype=of_value.dtype, device="meta")
    kind = result.kind([*rows, joined], shared)
    return rows[0].new_empty((*rows[0].shape[:2], kind.shape[-1]), dtype=kind.dtype)
