"""Values that a graph changes in place, as their readers see them.

mask = full(n, n)
changed = mask.triu_(1)        readers of `mask` behind this line see `changed`
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

_AUGMENTED = frozenset(
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "floordiv")
)
# Calls whose result shares no memory with an operand: writing to it changes nothing else.
_SIZED = ("arange", "ones", "zeros", "full", "empty")
_LIKE = ("ones_like", "zeros_like", "full_like", "empty_like", "clone")
_NEW = ("new_ones", "new_zeros", "new_full", "new_empty")
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
_COMPUTED = ("tril", "triu", "where", "masked_fill", "add", "sub", "mul")
_LOGICAL = ("logical_not", "and_", "or_", "invert")
_FRESH = frozenset((*_SIZED, *_LIKE, *_NEW, *_COMPARED, *_COMPUTED, *_LOGICAL))


@dataclass(frozen=True)
class Written:
    """The changes in place before a node.

    last: by value, the change that readers behind it see.
    unclear: values with other changes: through a view, twice, or between two reads.
    order: position of each node in the graph.
    """

    last: dict[Node, Node]
    unclear: frozenset[Node]
    order: dict[Node, int]

    def is_unclear(self, node: Node) -> bool:
        """Whether the value of a node at its readers cannot be determined."""
        return node in self.unclear

    def operands(self, node: Node) -> tuple[Any, Any]:
        """Arguments and keyword arguments of a node, with changes before it."""

        def current(x: Node) -> Node:
            while x in self.last:
                change = self.last[x]
                if change is node or self.order[change] >= self.order[node]:
                    break
                x = change
            return x

        return torch.fx.map_arg(node.args, current), torch.fx.map_arg(node.kwargs, current)

    def current(self, x: Node) -> Node:
        """The last change of a value, or the value itself."""
        while x in self.last:
            x = self.last[x]
        return x


def written(graph: Graph, before: Node) -> Written:
    """The changes in place before a node."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    last: dict[Node, Node] = {}
    unclear: set[Node] = set()
    for node in graph.nodes:
        if order[node] >= order[before]:
            break
        if not writes(node):
            continue
        base: Any = None
        if node.args and "out" not in node.kwargs:
            base = node.args[0]
        # A second change of a value is not followed.
        if not isinstance(base, Node) or base in last or base in unclear:
            unclear |= _touched(node)
        elif _is_plain(node, base, order):
            last[base] = node
        else:
            unclear |= _touched(node)
    return Written(last, _with_users(unclear, graph), order)


def _is_plain(node: Node, base: Node, order: dict[Node, int]) -> bool:
    """Whether a change of an unshared value precedes its other readers."""
    if node.target is operator.setitem:
        return False
    # Back to the call that allocated the value.
    aliases = [base]
    while writes(aliases[-1]):
        aliases.append(aliases[-1].args[0])  # type: ignore[arg-type]
    if _name(aliases[-1]) not in _FRESH:
        return False
    users: set[Node] = set()
    for alias in aliases:
        users.update(alias.users)
    return all(user is node or user in aliases or order[user] > order[node] for user in users)


def _touched(node: Node) -> set[Node]:
    """Values in which a change may be visible.

    They are its operand, and what that may be a view of.
    """
    touched = set()
    for base in (*node.args[:1], node.kwargs.get("out")):
        while isinstance(base, Node) and base not in touched:
            touched.add(base)
            base = base.args[0] if base.args else None
    return touched | {node}


def _with_users(values: Collection[Node], graph: Graph) -> frozenset[Node]:
    """These values, and all that is computed from them."""
    closure = set(values)
    for node in graph.nodes:
        if any(operand in closure for operand in node.all_input_nodes):
            closure.add(node)
    return frozenset(closure)


def writes(node: Node) -> bool:
    """Whether a call changes its first operand, or its `out`, in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if node.target in _AUGMENTED or node.target is operator.setitem or "out" in node.kwargs:
        return True
    # name_ of torch and of tensors; and_ and or_ of operator change nothing.
    name = _name(node)
    of_operator = getattr(node.target, "__module__", "") == "_operator"
    return name.endswith("_") and not name.endswith("__") and not of_operator


def _name(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", "")
