"""Graph nodes as primitives, and the roles of their operands."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .calls import READERS, Read, bound, example_value


@dataclass(frozen=True)
class Roles:
    """The nodes among the operands of a primitive.

    A node may be in both: F.linear(x, x).

    rows: values whose leading dims are the rows of the result
    shared: values that all rows are computed with
    """

    rows: tuple[Node, ...]
    shared: tuple[Node, ...]


def read(node: Node) -> Read | None:
    """Read a node as a primitive.

    None if it is none, or has options that no primitive has.
    """
    if node.op not in ("call_function", "call_method") or node.target not in READERS:
        return None
    return bound(READERS[node.target], node)


def primitive_of(node: Node) -> str | None:
    """The name of a node's primitive, or None.

    "" if its value is its operand's.
    """
    return _name(read(node))


def is_along_rows(primitive: str, place: int, operand: Any) -> bool:
    """Whether a primitive's operand at `place` has the rows of its result.

    The place in the call decides, never a size: a linear's weight is shared by all rows, however
    many it has itself. Elementwise primitives align dims from the last on, so an operand of one dim
    has features only; one of more has rows.
    """
    value = example_value(operand)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return False
    has_weights = primitive == "linear" or primitive.endswith("_norm")
    return place == 0 or not has_weights


def tensor_of(node: Node) -> Node:
    """The tensor that x.item() reads; any other node itself.

    With dynamic=True a module's float is read by x.item().
    """
    if node.op != "call_method" or node.target != "item":
        return node
    source = node.args[0]
    assert isinstance(source, Node)
    return source


class Memo:
    """Nodes of a graph as primitives, each read once.

    replaced: nodes that another may stand for by now; a call that took one of them is read anew
    """

    def __init__(self, replaced: Collection[Node]) -> None:
        self.replaced = replaced
        self._calls: dict[Node, tuple[Read | None, Roles]] = {}

    def read(self, node: Node) -> Read | None:
        """Read a node as a primitive, as the function does."""
        return self._call(node)[0]

    def primitive(self, node: Node) -> str | None:
        """The name of a node's primitive, as `primitive_of`."""
        return _name(self.read(node))

    def roles(self, node: Node) -> Roles:
        """The operands of a node by their role; none without a primitive."""
        return self._call(node)[1]

    def rows(self, node: Node) -> tuple[Node, ...]:
        """The operands of a primitive that have its rows; else ()."""
        return self.roles(node).rows

    def shared(self, node: Node) -> tuple[Node, ...]:
        """The operands of a primitive that all rows share; else ()."""
        return self.roles(node).shared

    def _call(self, node: Node) -> tuple[Read | None, Roles]:
        if node in self._calls:
            call, roles = self._calls[node]
            if not any(operand in self.replaced for operand in (*roles.rows, *roles.shared)):
                return call, roles
        call = read(node)
        self._calls[node] = call, _roles(call)
        return self._calls[node]


def _name(call: Read | None) -> str | None:
    if call is None:
        return None
    return call.primitive


def _roles(call: Read | None) -> Roles:
    """The operands of a call by their role."""
    if call is None:
        return Roles((), ())
    rows, shared = dict[Node, None](), dict[Node, None]()
    for place, operand in enumerate(call.operands):
        if not isinstance(operand, Node):
            continue
        source = tensor_of(operand)
        if is_along_rows(call.primitive, place, source):
            rows[source] = None
        else:
            shared[source] = None
    return Roles(tuple(rows), tuple(shared))


def needs_gradient(node: Node) -> bool:
    """Whether a backward will pass through a node."""
    value = example_value(node)
    return torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad
