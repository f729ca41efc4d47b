"""Graphs inside graphs (bodies of checkpoints), and values passed into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Scope:
    """A graph, its call, and the node at which values are read.

    node: a call of attention, or of a graph inside of this one.
    outer: the scope of the call of this graph; None for an outermost graph.
    operands: arguments of that call, one per placeholder: nodes of the outer graph or expressions.
    """

    part: GraphModule
    node: Node
    outer: Scope | None = None
    operands: tuple[Any, ...] = ()

    def operand(self, placeholder: Node) -> Any:
        """The outer graph's argument for a placeholder."""
        return self.operands[self.placeholders.index(placeholder)]

    @property
    def placeholders(self) -> list[Node]:
        """The placeholders of the graph."""
        return list(self.part.graph.find_nodes(op="placeholder"))


def scope_of(part: GraphModule, node: Node, callers: Mapping[GraphModule, Scope]) -> Scope:
    """The scope of a node.

    callers: of graphs inside of graphs, from `callers_of`.
    """
    outer = callers.get(part)
    if outer is None:
        return Scope(part, node)
    return Scope(part, node, outer, tuple(outer.node.args[1:]))


def callers_of(graph: GraphModule, operators: Sequence[str]) -> dict[GraphModule, Scope]:
    """Scopes of the calls of inner graphs that are called once.

    operators: names of those that pass their further operands on to the graph.
    """
    callers: dict[GraphModule, Scope] = {}
    pending = [graph]
    while pending:
        part = pending.pop()
        # The calls of inner graphs, with the names of these.
        bodies: dict[Any, str] = {}
        for node in part.graph.nodes:
            body = _body_of(node)
            if node.op == "call_function" and body is not None:
                bodies[node] = body
        calls = Counter(bodies.values())
        for node, body in bodies.items():
            inner = getattr(part, body)
            count = len(inner.graph.find_nodes(op="placeholder"))
            passes_on = node.target.__name__ in operators and count == len(node.args) - 1
            if passes_on and calls[body] == 1:
                callers[inner] = scope_of(part, node, callers)
                pending.append(inner)
    return callers


def _body_of(node: Node) -> str | None:
    """The name of the graph that is a node's first operand."""
    if not node.args or not hasattr(node.target, "__name__"):
        return None
    body = node.args[0]
    if not isinstance(body, Node) or body.op != "get_attr":
        return None
    return str(body.target)


def bring(captured: Sequence[tuple[Scope, Node]], scope: Scope) -> list[Node]:
    """Nodes of a scope's graph for captured nodes of its outer graphs.

    Those that the outer graphs do not pass on yet become further operands of their calls.
    """
    return [_brought(origin, node, scope) for origin, node in captured]


def _brought(origin: Scope, node: Node, scope: Scope) -> Node:
    if origin == scope:
        return node
    assert scope.outer is not None
    value = _brought(origin, node, scope.outer)
    call, placeholders = scope.outer.node, scope.placeholders
    # The call's arguments now, with values that were brought before.
    if value in call.args[1:]:
        return placeholders[call.args[1:].index(value)]
    call.args = (*call.args, value)
    with scope.part.graph.inserting_after(placeholders[-1]):
        placeholder = scope.part.graph.placeholder(f"{value.name}_captured")
    placeholder.meta = dict(value.meta)
    return placeholder


def example_of(node: Node) -> Any:
    """The fake tensor, or number, that a node was traced with."""
    return node.meta.get("example_value", node.meta.get("val"))
