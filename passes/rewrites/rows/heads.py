"""Dims of an attention's values: batch, heads, tokens and features.

    rows     (batch, tokens, features)
    heads    (batch, heads, tokens, features of one head)
    by token (1, ..., tokens, features) or (batch, 1, tokens, features), the same for every head

Heads are recognized by a view's strides, however they were packed and split.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .calls import example_value
from .growing import is_contiguous, is_rows, sizes, sizes_of

aten = torch.ops.aten
_TRANSPOSES = {"transpose", "swapaxes", torch.transpose, aten.transpose.int}
_PERMUTES = {"permute", torch.permute, aten.permute.default}
RESHAPES = {
    *("view", "reshape", "flatten", "contiguous", torch.reshape, torch.flatten),
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default),
}
_SPLITS = {
    *("chunk", "split", "unbind", "unflatten", "unsqueeze"),
    *(torch.chunk, torch.split, torch.functional.split, torch.unbind, torch.unflatten),
    *(aten.chunk.default, aten.split.Tensor, aten.unbind.int, aten.unflatten.int),
    *(aten.select.int, operator.getitem, aten.slice.Tensor),
}
VIEWS = _TRANSPOSES | _PERMUTES | RESHAPES | _SPLITS


@dataclass(frozen=True)
class Dims:
    """The sizes of an attention, as numbers or as sympy expressions."""

    batch: Any
    tokens: Any

    def is_rows(self, node: Any) -> bool:
        """Whether a node's value is (batch, tokens, features)."""
        return is_rows(node, (self.batch, self.tokens))

    def is_heads(self, node: Any) -> bool:
        """Whether a node's value is (batch, heads, tokens, features)."""
        shape = sizes_of(node)
        if len(shape) != 4 or shape[::2] != (self.batch, self.tokens):
            return False
        return isinstance(shape[1], int) and isinstance(shape[3], int)

    def is_by_token(self, node: Any) -> bool:
        """Whether a value has the tokens as rows.

        It is (1, ..., tokens, features), the same for every batch entry and head, or (batch, 1,
        tokens, features), the same for every head.
        """
        shape = sizes_of(node)
        if len(shape) < 2 or shape[-2] != self.tokens or not isinstance(shape[-1], int):
            return False
        if all(size == 1 for size in shape[:-2]):
            return True
        return len(shape) == 4 and shape[:2] == (self.batch, 1)

    def base(self, node: Node) -> tuple[Node, int] | None:
        """The rows that a node views as heads, and its first feature."""
        base: Any = node
        while isinstance(base, Node) and base.target in VIEWS:
            base = viewed(base)
        # A view's strides identify its dims only if the rows are laid out as usual.
        if not self.is_rows(base) or not self.is_heads(node) or not is_contiguous(base):
            return None
        view, rows = example_value(node), example_value(base)
        if view.untyped_storage()._cdata != rows.untyped_storage()._cdata:
            return None
        features = sizes(rows.shape)[-1]
        _, heads, _, head_features = sizes(view.shape)
        (start,) = sizes([view.storage_offset() - rows.storage_offset()])
        strides = (self.tokens * features, head_features, features, 1)
        if not isinstance(start, int) or sizes(view.stride()) != strides:
            return None
        if start + heads * head_features > features:
            return None
        return base, start


def swaps_tokens_and_heads(node: Node) -> bool:
    """Whether a call swaps dims 1 and 2 of 4."""
    dims: Any = node.args[1:]
    if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = dims[0]
    if not all(isinstance(dim, int) for dim in dims):
        return False
    dims = [dim % 4 for dim in dims]
    if node.target in _TRANSPOSES:
        return sorted(dims) == [1, 2]
    return node.target in _PERMUTES and dims == [0, 2, 1, 3]


def viewed(view: Node) -> Any:
    """The operand of a view, which may be a keyword argument."""
    if view.args:
        return view.args[0]
    return view.kwargs.get("input")
