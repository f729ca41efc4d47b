"""Values that a graph changes in place: what they are when they are read."""

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
# Calls whose result shares no memory with an operand, so that a change of it changes nothing else.
_FRESH = frozenset(
    ("arange", "ones", "zeros", "full", "empty", "ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros",
     "new_full", "new_empty", "clone", "tril", "triu", "eq", "ne", "lt", "le", "gt", "ge", "where", "add", "sub", "mul",
     "masked_fill", "logical_not", "and_", "or_", "invert")
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """The changes in place before a node. last: by value, the change that readers after it see.

    unclear: values that are changed in other ways: by a view, twice, or between two reads.
    """

    last: dict[Node, Node]
    unclear: frozenset[Node]
    order: dict[Node, int]

    def is_unclear(self, node: Node) -> bool:
        """Whether it is not known what a value is when it is read."""
        return node in self.unclear

    def operands(self, node: Node) -> tuple[Any, Any]:
        """The arguments of a node, each as it is when the node reads it."""

        def now(x: Node) -> Node:
            while (
                x in self.last
                and self.last[x] is not node
                and self.order[self.last[x]] < self.order[node]
            ):
                x = self.last[x]
            return x

        return torch.fx.map_arg(node.args, now), torch.fx.map_arg(node.kwargs, now)

    def current(self, x: Node) -> Node:
        """The change of a value that a read at the end sees, or the value itself."""
        while x in self.last:
            x = self.last[x]
        return x


def written(graph: Graph, before: Node) -> Written:
    """What is changed in place before a node."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    last: dict[Node, Node] = {}
    unclear: set[Node] = set()
    for node in graph.nodes:
        if order[node] >= order[before]:
            break
        if not writes(node):
            continue
        base = node.args[0] if node.args and "out" not in node.kwargs else None
        if (
            isinstance(base, Node)
            and base not in last
            and base not in unclear
            and _is_plain(node, base, order)
        ):
            last[base] = node
        else:
            unclear |= _touched(node)
    return Written(last, _with_users(unclear, graph), order)


def _is_plain(node: Node, base: Node, order: dict[Node, int]) -> bool:
    """Whether a change is of a value that nothing shares, before all of its other readers."""
    if node.target is operator.setitem:
        return False
    aliases = [base]
    while writes(aliases[-1]):
        aliases.append(aliases[-1].args[0])  # type: ignore[arg-type]
    if _name(aliases[-1]) not in _FRESH:
        return False
    users = {user for alias in aliases for user in alias.users}
    return all(user is node or user in aliases or order[user] > order[node] for user in users)


def _touched(node: Node) -> set[Node]:
    """The values that a change may show in: its operand, and what that may be a view of."""
    touched = set()
    for base in (*node.args[:1], node.kwargs.get("out")):
        while isinstance(base, Node) and base not in touched:
            touched.add(base)
            base = base.args[0] if base.args else None
    return touched | {node}


def _with_users(unclear: Collection[Node], graph: Graph) -> frozenset[Node]:
    """These values and all that is computed of them."""
    found = set(unclear)
    for node in graph.nodes:
        if any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def writes(node: Node) -> bool:
    """Whether a call changes its first operand, or what it gets as `out`, in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = _name(node)
    in_place = (
        name.endswith("_")
        and not name.endswith("__")
        and getattr(node.target, "__module__", "") != "_operator"
    )
    return (
        in_place
        or node.target in _AUGMENTED
        or node.target is operator.setitem
        or "out" in node.kwargs
    )


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
