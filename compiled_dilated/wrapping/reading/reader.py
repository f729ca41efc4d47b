"""Values of a graph, read as expressions of a pair's indices.

    i = arange(n)[:, None]
    mask = (arange(n) <= i) & seen[:, None, None, :]        a graph of Dynamo's
    (kv <= q) & seen[b, kv]                                 its expression; `seen` is captured

A value is read backwards: its entry at some indices is an operator on entries of the operands.
Without a rule for its node a value is captured as a tensor, so every value has an expression.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .expressions import (
    ZERO,
    Apply,
    At,
    Entry,
    Expression,
    Index,
    Number,
    constant,
    renumbered,
    size_of,
    slots_of,
)
from .scopes import Scope, example_of
from .simplify import apply
from .writes import Written, written

# Larger expressions are captured: pair by pair they would be slower than reading a tensor.
_MOST_OPERATORS = 256
_PAIR: Sequence[Expression] = (Index("b"), Index("h"), Index("q"), Index("kv"))
# The entry of a call's result; called with the `Call`, the indices, and the node's arguments.
Rule = Callable[..., "Expression | None"]


class Reader:
    """Reads values of a graph.

    rules: by function of torch, or name of a method.
    captured: scopes and nodes that expressions read, in the order of their slots.
    """

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        self.rules = rules
        self.captured: list[tuple[Scope, Node]] = []
        self._written: dict[Node, Written] = {}

    def mask(self, node: Node, scope: Scope, dims: Sequence[Expression] = _PAIR) -> Expression:
        """The entry of a mask for a pair.

        dims: the pair's indices along the mask's dimensions, default the last of (b, h, q, kv).
        """
        return self.value(self._writes(scope).current(node), scope, dims)

    def value(self, x: Any, scope: Scope, indices: Sequence[Expression]) -> Expression:
        """The entry of a value at some indices.

        x: a node, a number or an expression.
        indices: they broadcast with the shape of a node.
        """
        if isinstance(x, (Index, Number, Entry, Apply)):
            return x
        if not isinstance(x, Node):
            return Number(x, _dtype_of_number(x))
        example = example_of(x)
        if not isinstance(example, Tensor):
            return self._capture(x, scope, ())
        last = indices[len(indices) - example.dim() :]
        places: list[Expression] = []
        for size, index in zip(example.shape, last, strict=True):
            # Along a dimension of size 1 the index is 0.
            places.append(ZERO if is_one(size) else index)
        at = tuple(places)
        expression = self._by_rule(x, scope, at)
        if expression is None or size_of(expression) > _MOST_OPERATORS:
            return self._capture(x, scope, at)
        return expression

    def used(self, expression: Expression) -> tuple[Expression, list[tuple[Scope, Node]]]:
        """An expression with its slots renumbered, and their captured nodes.

        Captured nodes that the expression does not read are left out.
        """
        slots = {slot: place for place, slot in enumerate(sorted(slots_of(expression)))}
        return renumbered(expression, slots), [self.captured[slot] for slot in slots]

    def _by_rule(self, node: Node, scope: Scope, at: At) -> Expression | None:
        """The entry of a node by its rule.

        None without a rule, and if changes in place leave its value unclear.
        """
        writes = self._writes(scope)
        if writes.is_unclear(node):
            return None
        # A placeholder of an inner graph is an operand of that graph's call.
        if node.op == "placeholder" and scope.outer is not None:
            return self.value(scope.operand(node), scope.outer, at)
        if node.op not in ("call_function", "call_method") or node.target not in self.rules:
            return None
        rule = self.rules[node.target]
        args, kwargs = writes.operands(node)
        # A rule reads only calls whose arguments it accepts.
        try:
            bound = inspect.signature(rule).bind(Call(self, scope, node), at, *args, **kwargs)
        except TypeError:
            return None
        return rule(*bound.args, **bound.kwargs)

    def _writes(self, scope: Scope) -> Written:
        if scope.node not in self._written:
            self._written[scope.node] = written(scope.part.graph, scope.node)
        return self._written[scope.node]

    def _capture(self, node: Node, scope: Scope, at: At) -> Expression:
        example = example_of(node)
        if (scope, node) not in self.captured:
            self.captured.append((scope, node))
        dtype = example.dtype if isinstance(example, Tensor) else _dtype_of_number(example)
        return Entry(self.captured.index((scope, node)), at, dtype)


@dataclass(frozen=True)
class Call:
    """A node as a rule reads it."""

    reader: Reader
    scope: Scope
    node: Node

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result."""
        dtype: torch.dtype = example_of(self.node).dtype
        return dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of the result."""
        shape: torch.Size = example_of(self.node).shape
        return shape

    def at(self, x: Any, indices: Sequence[Expression]) -> Expression:
        """The entry of an operand."""
        return self.reader.value(x, self.scope, indices)

    def apply(self, name: str, *operands: Expression) -> Expression:
        """An operator with the dtype of the result."""
        floating = [
            operand.dtype
            for operand in operands
            if not isinstance(operand, Number) and operand.dtype.is_floating_point
        ]
        if floating:
            operands = tuple(_rounded(operand, floating[0]) for operand in operands)
        return apply(name, operands, self.dtype)


def _rounded(operand: Expression, dtype: torch.dtype) -> Expression:
    """An operand beside a tensor of a dtype, Python floats rounded."""
    if isinstance(operand, Number) and operand.dtype == torch.float64:
        return constant(operand.value, dtype)
    return operand


def _dtype_of_number(x: Any) -> torch.dtype:
    if isinstance(x, bool):
        return torch.bool
    if isinstance(x, (int, torch.SymInt)):
        return torch.int64
    return torch.float64


def is_one(size: Any) -> bool:
    """Whether a dimension has size 1 in every call."""
    return isinstance(size, int) and size == 1
