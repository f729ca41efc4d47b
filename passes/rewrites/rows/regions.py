"""Where a graph works on rows through something wide: the part of it that a recipe can stand for.

    x ──┬── norm ── linear ── gelu ── linear ── add ── out        one node for all of it, x in, out back:
        └────────────────────────────────────────┘                 nothing wider than x is ever whole

A region is what a narrow result is made of, back to where least has to be kept: every value in it is used in it alone, its
last is its result, and some linear's result in it is wider than all that goes in together, and than what comes out.

Which dims are rows follows from the result back, operand by operand (readers.roles): the leading dims of a linear's first operand
are those of its result, its weight has none of them, and a value that is used as a weight is not of the region.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ...analysis.effects import writes
from .readers import Roles, is_along_rows, primitive_of, read, roles, tensor_of, value_of
from .recipes import Recipe, Step

# Results that are narrower than what they are made of: regions end there, or a little later.
_ENDS = {"linear", "logsumexp", "argmax"}
# They change what the nodes after them mean.
_MODES = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast, torch._C._set_grad_enabled}


@dataclass(frozen=True)
class Region:
    """nodes: in the order of the graph; the last one's value is the result. rows, shared: what they are given."""

    nodes: tuple[Node, ...]
    rows: tuple[Node, ...]
    shared: tuple[Node, ...]
    recipe: Recipe

    @property
    def result(self) -> Node:
        return self.nodes[-1]

    def row_bytes(self, *, at_once: bool) -> int:
        """What values that are made of one row take: those that are held at once, or all of them."""
        counted = self.recipe.held_bytes if at_once else self.recipe.row_bytes
        return counted([value_of(node) for node in self.rows], [value_of(node) for node in self.shared])


def find(graph: Graph) -> Iterator[Region]:
    """The regions of a graph, in its order; no node is in two. The graph may be changed at a region once it has been yielded."""
    nodes, claimed = list(graph.nodes), set[Node]()
    for number, node in enumerate(nodes):
        if node not in claimed and (region := _ending_at(nodes, number, claimed)) is not None:
            claimed.update(region.nodes)
            yield region


def _ending_at(nodes: Sequence[Node], number: int, claimed: set[Node]) -> Region | None:
    end = nodes[number]
    found = read(end)
    if found is None or found.primitive not in _ENDS or not _is_rows(found.operands[0], None):
        return None
    lead = _lead(found.operands[0])
    members = _grown_forward(_cut(_grown_back(nodes[: number + 1], lead, claimed), lead), lead)
    if not members or not is_contiguous(members[-1]) or mixed_up(nodes, members):
        return None
    return _region(members)


def _grown_back(nodes: Sequence[Node], lead: Any, claimed: set[Node]) -> list[Node]:
    """The last node and all that is made for it alone."""
    members = {nodes[-1]: None}
    for node in reversed(nodes[:-1]):
        if node.users and node not in claimed and _is_used_as_rows(node, members) and _works_on_rows(node, lead):
            members[node] = None
    return list(reversed(members)) if _works_on_rows(nodes[-1], lead) else []


def _cut(members: list[Node], lead: Any) -> list[Node]:
    """The fewest linears that make nothing wide from outside, and of those cuts the one that needs least, the earliest."""
    best: tuple[int, int] | None = None
    kept: list[Node] = []
    for start in range(len(members)):
        part = members[start:]
        linears = [node for node in part if primitive_of(node) == "linear"]
        needed = sum(width(node, len(lead)) for node in _rows_given(part))
        widest = max((width(node, len(lead)) for node in linears), default=0)
        if max(needed, width(members[-1], len(lead))) < widest and (best is None or (len(linears), needed) < best):
            best, kept = (len(linears), needed), part
    return kept


def _grown_forward(members: list[Node], lead: Any) -> list[Node]:
    """With what is done to the result alone, together with what is already given."""
    while members and len(members[-1].users) == 1:
        (user,) = members[-1].users
        known = {*members, *_rows_given(members)}
        if primitive_of(user) in (None, "linear") or not _works_on_rows(user, lead) or not _is_rows(user, lead):
            break
        if not _is_used_as_rows(members[-1], {user}):
            break
        if not set(_rows_given([user])) <= known or width(user, len(lead)) > width(members[-1], len(lead)):
            break
        members = [*members, user]
    return members


def mixed_up(nodes: Sequence[Node], members: Sequence[Node]) -> bool:
    """Whether something between the first and the last member changes values in place, or how values are computed."""
    first, last = nodes.index(members[0]), nodes.index(members[-1])
    inside = set(members)
    return any(node not in inside and (writes(node) or node.target in _MODES) for node in nodes[first:last])


def _region(members: list[Node]) -> Region | None:
    rows = _rows_given(members)
    shared = list(dict.fromkeys(operand for node in members for operand in _roles(node).shared))
    # A node may be among both, as in F.linear(x, x), so it has a name for each role.
    row_names: dict[Node, str] = {node: f"x{i}" for i, node in enumerate(rows)}
    shared_names: dict[Node, str] = {node: f"w{i}" for i, node in enumerate(shared)}
    steps: list[Step] = []
    for node in members:
        call = read(node)
        assert call is not None
        operands: list[Any] = []
        for place, operand in enumerate(call.operands):
            source = tensor_of(operand) if isinstance(operand, Node) else operand
            names = row_names if is_along_rows(call.primitive, place, source) else shared_names
            operands.append(names[source] if isinstance(source, Node) else source)
        if not call.primitive:
            row_names[node] = operands[0]
            continue
        row_names[node] = f"v{len(steps)}"
        steps.append(Step(row_names[node], call.primitive, tuple(operands), tuple(call.options.items())))
    region = Region(tuple(members), tuple(rows), tuple(shared), Recipe(tuple(steps)))
    return region if _agrees(region, row_names) else None


def _agrees(region: Region, names: dict[Node, str]) -> bool:
    """Whether each value has the features and the dtype of its trace: under autocast, say, it has not."""
    try:
        kinds = region.recipe.kinds([value_of(node) for node in region.rows], [value_of(node) for node in region.shared])
    except (RuntimeError, ValueError, TypeError):  # what the primitives do not take as it stands
        return False
    values = {node: value for node in region.nodes if isinstance(value := value_of(node), Tensor)}
    return all(kinds[names[node]].dtype == value.dtype and _fits(kinds[names[node]], value) for node, value in values.items())


def _fits(kind: Tensor, value: Tensor) -> bool:
    return kind.ndim == 1 or kind.shape[-1] == sizes(value.shape)[-1]


def _works_on_rows(node: Node, lead: Any) -> bool:
    """Whether a node is a primitive of such rows and of what they share."""
    operands = roles(node)
    if operands is None or not operands.rows:
        return False
    return all(_is_rows(each, lead) for each in operands.rows) and all(map(is_fixed, operands.shared))


def _is_used_as_rows(node: Node, members: Collection[Node]) -> bool:
    """Whether all users of a node are members, and none of them takes it as something that all rows share."""
    return all(user in members and node not in _roles(user).shared for user in node.users)


def _roles(node: Node) -> Roles:
    operands = roles(node)
    assert operands is not None
    return operands


def _rows_given(members: Sequence[Node]) -> list[Node]:
    inside = set(members)
    return list(dict.fromkeys(each for node in members for each in _roles(node).rows if each not in inside))


def _is_rows(node: Any, lead: Any) -> bool:
    """Whether a node's value is (*lead, features); None: whatever lead it has."""
    value = value_of(node) if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or value.ndim < 2 or not isinstance(sizes(value.shape)[-1], int):
        return False
    return lead is None or _lead(node) == lead


def is_fixed(node: Any) -> bool:
    value = value_of(node) if isinstance(node, Node) else None
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in sizes(value.shape))


def _lead(node: Node) -> tuple[Any, ...]:
    return sizes(value_of(node).shape)[:-1]


def sizes(given: Sequence[Any]) -> tuple[Any, ...]:
    """Symbols as expressions, for to compare them would guard on them; those that are known to be a number as that."""
    plain = (size.node.expr if isinstance(size, torch.SymInt) else size for size in given)
    return tuple(int(size) if isinstance(size, int) or size.is_number else size for size in plain)


def is_contiguous(node: Node) -> bool:
    """Whether a value lies as an operator of ours would lay it, so that later views of it are views of ours."""
    value, expected = value_of(node), 1
    for size, stride in reversed(list(zip(sizes(value.shape), sizes(value.stride()), strict=True))):
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def width(node: Node, row_dims: int) -> int:
    """Bytes of one row. row_dims: how many leading dims are rows; a value with no other has one number a row."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return 0
    features = sizes(value.shape)[-1] if value.ndim > row_dims else 1
    return (features if isinstance(features, int) else 1) * value.element_size()
