"""Growing sets of nodes that work row by row.

Regions and blocks start from a result and add the nodes that lead to it, as long as nothing else
uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...analysis.effects import writes
from .calls import example_value
from .readers import roles
from .recipes import Recipe

# They change the meaning of the nodes after them.
_MODES = {
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
}

Operands = Callable[[Node], Sequence[Node]]


def row_operands(node: Node) -> Sequence[Node]:
    """The operands of a primitive that have its rows; else ()."""
    operands = roles(node)
    if operands is None:
        return ()
    return operands.rows


def shared_operands(node: Node) -> Sequence[Node]:
    """The operands of a primitive that all rows share; else ()."""
    operands = roles(node)
    if operands is None:
        return ()
    return operands.shared


def grow_back(
    nodes: Sequence[Node],
    accepts: Callable[[Node], bool],
    claimed: Collection[Node],
    shared_of: Operands = shared_operands,
) -> list[Node]:
    """The last node, and earlier nodes that only it needs, in order.

    accepts: whether a node may be a member
    claimed: nodes that belong to something else
    """
    members = {nodes[-1]: None}
    for node in reversed(nodes[:-1]):
        if not node.users or node in claimed:
            continue
        if is_used_as_rows(node, members, shared_of) and accepts(node):
            members[node] = None
    return list(reversed(members))


def is_used_as_rows(
    node: Node, members: Collection[Node], shared_of: Operands = shared_operands
) -> bool:
    """Whether a node's users are members that take it as rows."""
    return all(user in members and node not in shared_of(user) for user in node.users)


def row_inputs(members: Sequence[Node], rows_of: Operands = row_operands) -> list[Node]:
    """The row operands that members take from outside, each once."""
    inside = set(members)
    inputs: dict[Node, None] = {}
    for node in members:
        for operand in rows_of(node):
            if operand not in inside:
                inputs[operand] = None
    return list(inputs)


def is_interrupted(nodes: Sequence[Node], members: Sequence[Node]) -> bool:
    """Whether a node among the members writes in-place or changes a mode.

    nodes: all of the graph
    """
    first, last = nodes.index(members[0]), nodes.index(members[-1])
    inside = set(members)
    for node in nodes[first:last]:
        if node not in inside and (writes(node) or node.target in _MODES):
            return True
    return False


def agrees(
    recipe: Recipe, rows: Sequence[Tensor], shared: Sequence[Tensor], names: Mapping[Node, str]
) -> bool:
    """Whether a recipe's values have the features and dtypes of the trace.

    They do not if autocast converts operands.

    names: of the recipe's values, by their nodes
    """
    try:
        kinds = recipe.kinds(rows, shared)
    except (RuntimeError, ValueError, TypeError):  # operands that a primitive does not take
        return False
    for node, name in names.items():
        value = example_value(node)
        if not isinstance(value, Tensor):
            continue
        kind = kinds[name]
        same_features = kind.ndim == 1 or kind.shape[-1] == sizes(value.shape)[-1]
        if kind.dtype != value.dtype or not same_features:
            return False
    return True


def is_rows(node: Any, lead: tuple[Any, ...] | None) -> bool:
    """Whether a node's value is (*lead, features), the features a number.

    lead: the leading dims; None for any
    """
    shape = sizes_of(node)
    if len(shape) < 2 or not isinstance(shape[-1], int):
        return False
    return lead is None or shape[:-1] == lead


def is_static(node: Any) -> bool:
    """Whether a node's value is a tensor without dynamic sizes."""
    value = example_value(node)
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in sizes(value.shape))


def is_contiguous(node: Node) -> bool:
    """Whether a value has the strides of a new tensor."""
    value, expected = example_value(node), 1
    dims = list(zip(sizes(value.shape), sizes(value.stride()), strict=True))
    for size, stride in reversed(dims):
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def sizes_of(node: Any) -> tuple[Any, ...]:
    """The sizes of a node's tensor, as by `sizes`; else ()."""
    value = example_value(node)
    if not isinstance(value, Tensor):
        return ()
    return sizes(value.shape)


def sizes(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes as numbers, dynamic ones as sympy expressions.

    Comparing expressions adds no guard.
    """
    result: list[Any] = []
    for size in shape:
        plain = size.node.expr if isinstance(size, torch.SymInt) else size
        if isinstance(plain, int) or plain.is_number:
            plain = int(plain)
        result.append(plain)
    return tuple(result)


def row_width(node: Node, row_dims: int) -> int:
    """Bytes of one row of a node's value, 0 for no tensor.

    row_dims: how many leading dims are rows; a value without others has one number a row
    """
    value = example_value(node)
    if not isinstance(value, Tensor):
        return 0
    features: Any = 1
    if value.ndim > row_dims:
        features = sizes(value.shape)[-1]
    # A dynamic number of features counts as one.
    if not isinstance(features, int):
        features = 1
    return int(features * value.element_size())
