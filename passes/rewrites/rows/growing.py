"""Growing sets of nodes that work row by row.

Regions and blocks start from a result and add the nodes that lead to it, as long as nothing else
uses them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...analysis.effects import writes
from .calls import example_value
from .recipes import Recipe

# They change the meaning of the nodes after them.
_MODES = {
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
}

Operands = Callable[[Node], Sequence[Node]]


def order_of(nodes: Sequence[Node]) -> dict[Node, int]:
    """The place of each node in a graph."""
    return {node: number for number, node in enumerate(nodes)}


def grow_back(
    last: Node,
    order: Mapping[Node, int],
    accepts: Callable[[Node], bool],
    claimed: Collection[Node],
    shared_of: Operands,
) -> Iterator[tuple[Node, bool]]:
    """Yield the last node, then earlier nodes that only it needs.

    The latest come first, each with whether all that follow are needed by it only.

    order: the places of the nodes that may be members
    accepts: whether a node may be a member
    claimed: nodes that belong to something else
    """
    members, seen = set[Node](), {last}
    # The latest of those waiting comes next: all its users have been examined by then.
    waiting = [(-order[last], last)]
    while waiting:
        _, node = heapq.heappop(waiting)
        if node is not last and not is_used_as_rows(node, members, shared_of):
            continue
        members.add(node)
        yield node, not waiting
        for operand in node.all_input_nodes:
            if operand in seen:
                continue
            seen.add(operand)
            if operand in order and operand not in claimed and accepts(operand):
                heapq.heappush(waiting, (-order[operand], operand))


def is_used_as_rows(node: Node, members: Collection[Node], shared_of: Operands) -> bool:
    """Whether a node's users are members that take it as rows."""
    return all(user in members and node not in shared_of(user) for user in node.users)


def row_inputs(members: Sequence[Node], rows_of: Operands) -> list[Node]:
    """The row operands that members take from outside, each once."""
    inside = set(members)
    inputs: dict[Node, None] = {}
    for node in members:
        for operand in rows_of(node):
            if operand not in inside:
                inputs[operand] = None
    return list(inputs)


def is_interrupted(
    nodes: Sequence[Node], order: Mapping[Node, int], members: Sequence[Node]
) -> bool:
    """Whether a node among the members writes in-place or changes a mode.

    nodes: all of the graph, with their places
    """
    first, last = order[members[0]], order[members[-1]]
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
