"""Regions of a graph that work row by row through something wide.

    x ──┬── norm ── linear ── gelu ── linear ── add ── out        one node for all of it, x in,
        └────────────────────────────────────────┘                 out back

A region leads to a narrow result and starts where its inputs are smallest: every value in it is
used in it only, its last is its result, and some linear's result in it is wider than all inputs
together and than the output.

Which dims are rows follows from the result backwards, operand by operand (readers.roles): the
leading dims of a linear's first operand are those of its result, its weight has none of them, and
a value used as a weight is not part of the region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from .calls import example_value
from .growing import (
    agrees,
    grow_back,
    is_contiguous,
    is_interrupted,
    is_rows,
    is_static,
    is_used_as_rows,
    row_inputs,
    row_width,
    shared_operands,
    sizes_of,
)
from .readers import is_along_rows, primitive_of, read, roles, tensor_of
from .recipes import Recipe
from .steps import Step

# Primitives whose result is narrower than their operands: regions end there, or a little later.
_ENDS = {"linear", "logsumexp", "argmax"}

Lead = tuple[Any, ...]


@dataclass(frozen=True)
class Region:
    """Nodes of a graph that a recipe can replace.

    nodes: in the order of the graph; the value of the last is the result
    rows: inputs whose rows are worked on
    shared: inputs that all rows share
    """

    nodes: tuple[Node, ...]
    rows: tuple[Node, ...]
    shared: tuple[Node, ...]
    recipe: Recipe

    @property
    def result(self) -> Node:
        return self.nodes[-1]

    def row_bytes(self, *, at_once: bool) -> int:
        """Bytes of the values computed from one row.

        at_once: the most that is live at one time; else all values together, as a backward has them
        """
        rows = list(map(example_value, self.rows))
        shared = list(map(example_value, self.shared))
        if at_once:
            return self.recipe.live_bytes(rows, shared)
        return self.recipe.row_bytes(rows, shared)


def find(graph: Graph) -> Iterator[Region]:
    """Yield the disjoint regions of a graph, in its order.

    The graph may be changed at a region once it has been yielded.
    """
    nodes, claimed = list(graph.nodes), set[Node]()
    for number, node in enumerate(nodes):
        if node in claimed:
            continue
        region = _ending_at(nodes, number, claimed)
        if region is not None:
            claimed.update(region.nodes)
            yield region


def _ending_at(nodes: Sequence[Node], number: int, claimed: set[Node]) -> Region | None:
    """The region whose result node `number` narrows; None if there is none."""
    call = read(nodes[number])
    if call is None or call.primitive not in _ENDS or not is_rows(call.operands[0], None):
        return None
    lead = sizes_of(call.operands[0])[:-1]
    if not _works_on_rows(nodes[number], lead):
        return None
    grown = grow_back(nodes[: number + 1], lambda node: _works_on_rows(node, lead), claimed)
    members = _grow_forward(_cut(grown, lead), lead)
    if not members or not is_contiguous(members[-1]) or is_interrupted(nodes, members):
        return None
    return _region(members)


def _cut(members: list[Node], lead: Lead) -> list[Node]:
    """The best part that ends with the last member; [] for none.

    A part qualifies if a linear in it is wider than its inputs together and than its result. The
    best has the fewest linears, then the narrowest inputs, then starts earliest.
    """
    best: tuple[int, int] | None = None
    best_part: list[Node] = []
    output_width = row_width(members[-1], len(lead))
    for start in range(len(members)):
        part = members[start:]
        linears = [node for node in part if primitive_of(node) == "linear"]
        widest = max((row_width(node, len(lead)) for node in linears), default=0)
        input_width = sum(row_width(node, len(lead)) for node in row_inputs(part))
        rank = (len(linears), input_width)
        if max(input_width, output_width) < widest and (best is None or rank < best):
            best, best_part = rank, part
    return best_part


def _grow_forward(members: list[Node], lead: Lead) -> list[Node]:
    """Append what is done to the result only, as a residual's add."""
    while members and len(members[-1].users) == 1:
        (user,) = members[-1].users
        # A cheap call whose other operands the region has already, and that widens nothing.
        available = {*members, *row_inputs(members)}
        if primitive_of(user) in (None, "linear"):
            break
        if not _works_on_rows(user, lead) or not is_rows(user, lead):
            break
        if not is_used_as_rows(members[-1], {user}):
            break
        if not set(row_inputs([user])) <= available:
            break
        if row_width(user, len(lead)) > row_width(members[-1], len(lead)):
            break
        members = [*members, user]
    return members


def _region(members: list[Node]) -> Region | None:
    """Write members as a recipe; None if it disagrees with the trace."""
    rows = row_inputs(members)
    shared: dict[Node, None] = {}
    for member in members:
        shared.update(dict.fromkeys(shared_operands(member)))
    # A node may be both, as in F.linear(x, x), so it has a name for each role.
    row_names: dict[Node, str] = {node: f"x{i}" for i, node in enumerate(rows)}
    shared_names: dict[Node, str] = {node: f"w{i}" for i, node in enumerate(shared)}
    steps: list[Step] = []
    for node in members:
        call = read(node)
        assert call is not None
        operands: list[Any] = []
        for place, operand in enumerate(call.operands):
            if not isinstance(operand, Node):
                operands.append(operand)
                continue
            source = tensor_of(operand)
            names = row_names if is_along_rows(call.primitive, place, source) else shared_names
            operands.append(names[source])
        if not call.primitive:  # its value is its operand's
            row_names[node] = operands[0]
            continue
        row_names[node] = f"v{len(steps)}"
        options = tuple(call.options.items())
        steps.append(Step(row_names[node], call.primitive, tuple(operands), options))

    recipe = Recipe(tuple(steps))
    values = list(map(example_value, rows)), list(map(example_value, shared))
    if not agrees(recipe, *values, {node: row_names[node] for node in members}):
        return None
    return Region(tuple(members), tuple(rows), tuple(shared), recipe)


def _works_on_rows(node: Node, lead: Lead) -> bool:
    """Whether a node is a primitive of rows (*lead, features)."""
    operands = roles(node)
    if operands is None or not operands.rows:
        return False
    return all(is_rows(row, lead) for row in operands.rows) and all(
        is_static(operand) for operand in operands.shared
    )
