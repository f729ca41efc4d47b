"""Masks that a graph makes, read as expressions of a pair's indices.

    i = arange(n)[:, None];  mask = (arange(n) <= i) & seen[:, None, None, :]        a graph of Dynamo's
    (kv <= q) & seen[b, kv]                                                          its expression; `seen` is captured

A value is read backwards: the entry at some indices is an operator on entries of the operands. What is made in a way that has no
rule is captured whole, so that every value has an expression. Rules are in rules_of_reading.py.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .expressions import (
    Apply,
    Entry,
    Expression,
    Index,
    Number,
    apply,
    constant,
    renumbered,
    size_of,
    slots_of,
)
from .writes import Written, written

# Larger expressions are captured as tensors: they would be slower pair by pair than the tensor is to read.
_MOST_OPERATORS = 256
_PAIR = (Index("b"), Index("h"), Index("q"), Index("kv"))
Rule = Callable[..., "Expression | None"]
RULES: dict[Any, Rule] = {}


@dataclass(frozen=True)
class Scope:
    """A graph, the node before which its values are asked for, and where a graph inside of another one is called.

    node: a call of attention, or of the graph inside. outer: the scope of the call of this graph; None of an outermost graph.
    operands: what that call passes for the placeholders: nodes of the outer graph, or expressions.
    """

    part: GraphModule
    node: Node
    outer: Scope | None = None
    operands: tuple[Any, ...] = ()

    def operand(self, placeholder: Node) -> Any:
        """What the outer graph passes for a placeholder."""
        return self.operands[self.places.index(placeholder)]

    @property
    def places(self) -> list[Node]:
        """The placeholders of the graph."""
        return list(self.part.graph.find_nodes(op="placeholder"))


class Reader:
    """Reads values of a graph. captured: scopes and nodes of what expressions read, in the order of their slots."""

    def __init__(self) -> None:
        self.captured: list[tuple[Scope, Node]] = []
        self._written: dict[Node, Written] = {}

    def mask(
        self, node: Node, scope: Scope, dims: Sequence[Expression] | None = None
    ) -> Expression:
        """The entry of a mask for a pair.

        dims: the indices of the pair along the mask's dimensions; by default the last of (b, h, q, kv).
        """
        return self.value(self._writes(scope).current(node), scope, _PAIR if dims is None else dims)

    def value(self, x: Any, scope: Scope, indices: Sequence[Expression]) -> Expression:
        """The entry of a node at indices that broadcast with its shape; of a number itself."""
        if isinstance(x, (Index, Number, Entry, Apply)):
            return x
        if not isinstance(x, Node):
            return _number(x)
        example = example_of(x)
        if not isinstance(example, Tensor):
            return self._capture(x, scope, ())
        own = indices[len(indices) - example.dim() :]
        # Along a dimension of one entry there is no index but 0.
        at = tuple(
            constant(0, torch.int64) if is_one(size) else i
            for size, i in zip(example.shape, own, strict=True)
        )
        found = self._by_rule(x, scope, at)
        return (
            self._capture(x, scope, at)
            if found is None or size_of(found) > _MOST_OPERATORS
            else found
        )

    def used(self, expression: Expression) -> tuple[Expression, list[tuple[Scope, Node]]]:
        """An expression with slots for what it reads alone, and that."""
        slots = {slot: place for place, slot in enumerate(sorted(slots_of(expression)))}
        return renumbered(expression, slots), [self.captured[slot] for slot in slots]

    def _by_rule(self, node: Node, scope: Scope, at: tuple[Expression, ...]) -> Expression | None:
        writes = self._writes(scope)
        if writes.is_unclear(node):
            return None
        if node.op == "placeholder" and scope.outer is not None:
            return self.value(scope.operand(node), scope.outer, at)
        rule = RULES.get(node.target) if node.op in ("call_function", "call_method") else None
        if rule is None:
            return None
        args, kwargs = writes.operands(node)
        try:
            bound = inspect.signature(rule).bind(Call(self, scope, node), at, *args, **kwargs)
        except TypeError:
            return None
        return rule(*bound.args, **bound.kwargs)

    def _writes(self, scope: Scope) -> Written:
        if scope.node not in self._written:
            self._written[scope.node] = written(scope.part.graph, scope.node)
        return self._written[scope.node]

    def _capture(self, node: Node, scope: Scope, at: tuple[Expression, ...]) -> Expression:
        example = example_of(node)
        if (scope, node) not in self.captured:
            self.captured.append((scope, node))
        dtype = example.dtype if isinstance(example, Tensor) else _dtype_of_number(example)
        return Entry(self.captured.index((scope, node)), at, dtype)


@dataclass(frozen=True)
class Call:
    """A node that a rule reads."""

    reader: Reader
    scope: Scope
    node: Node

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result."""
        found: torch.dtype = example_of(self.node).dtype
        return found

    @property
    def shape(self) -> torch.Size:
        """The shape of the result."""
        found: torch.Size = example_of(self.node).shape
        return found

    def at(self, x: Any, indices: Sequence[Expression]) -> Expression:
        """The entry of an operand."""
        return self.reader.value(x, self.scope, indices)

    def apply(self, name: str, *operands: Expression) -> Expression:
        """An operator with the dtype of the result."""
        dtypes = [
            operand.dtype
            for operand in operands
            if not isinstance(operand, Number) and operand.dtype.is_floating_point
        ]
        if dtypes:
            # A number beside a floating tensor is rounded to its dtype.
            operands = tuple(
                constant(x.value, dtypes[0])
                if isinstance(x, Number) and x.dtype == torch.float64
                else x
                for x in operands
            )
        return apply(name, operands, self.dtype)


def example_of(node: Node) -> Any:
    """The fake tensor, or number, that a node was traced with."""
    return node.meta.get("example_value", node.meta.get("val"))


def bring(captured: Sequence[tuple[Scope, Node]], scope: Scope) -> list[Node]:
    """Nodes of the scope's graph for captured ones of its outer graphs, passed on as further operands where they are not yet."""
    return [_brought(origin, node, scope) for origin, node in captured]


def _brought(origin: Scope, node: Node, scope: Scope) -> Node:
    if origin == scope:
        return node
    assert scope.outer is not None
    value = _brought(origin, node, scope.outer)
    call, places = scope.outer.node, scope.places
    # Of the call as it is now: captured values may have joined it.
    if value in call.args[1:]:
        return places[call.args[1:].index(value)]
    call.args = (*call.args, value)
    with scope.part.graph.inserting_after(places[-1]):
        placeholder = scope.part.graph.placeholder(f"{value.name}_captured")
    placeholder.meta = dict(value.meta)
    return placeholder


def callers_of(graph: GraphModule, operators: Sequence[str]) -> dict[GraphModule, Scope]:
    """By graph inside of a graph its call: of those called once, by an operator that passes its other operands on.

    operators: the names of such.
    """
    callers: dict[GraphModule, Scope] = {}
    waiting = [graph]
    while waiting:
        part = waiting.pop()
        nodes = [
            node
            for node in part.graph.nodes
            if node.op == "call_function" and _body_of(node) is not None
        ]
        calls = Counter(_body_of(node) for node in nodes)
        for node in nodes:
            body = _body_of(node)
            inner = getattr(part, str(body))
            places = inner.graph.find_nodes(op="placeholder")
            if (
                node.target.__name__ in operators
                and calls[body] == 1
                and len(places) == len(node.args) - 1
            ):
                callers[inner] = scope_of(part, node, callers)
                waiting.append(inner)
    return callers


def scope_of(part: GraphModule, node: Node, callers: Mapping[GraphModule, Scope]) -> Scope:
    """The scope of a node. callers: of graphs inside of graphs."""
    outer = callers.get(part)
    return Scope(part, node, outer, () if outer is None else tuple(outer.node.args[1:]))


def _body_of(node: Node) -> str | None:
    """The name of the graph that a node calls as its first operand."""
    body = node.args[0] if node.args and hasattr(node.target, "__name__") else None
    return str(body.target) if isinstance(body, Node) and body.op == "get_attr" else None


def _number(x: Any) -> Number:
    return Number(x, _dtype_of_number(x))


def _dtype_of_number(x: Any) -> torch.dtype:
    if isinstance(x, bool):
        return torch.bool
    return torch.int64 if isinstance(x, (int, torch.SymInt)) else torch.float64


def is_one(size: Any) -> bool:
    """Whether a dimension is known to have one entry."""
    return isinstance(size, int) and size == 1
