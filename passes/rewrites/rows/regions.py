"""Regions of a graph that work row by row through something wide.

    x ──┬── norm ── linear ── gelu ── linear ── add ── out        one node for all of it, x in,
        └────────────────────────────────────────┘                 out back

A region leads to a narrow result and starts where its inputs are smallest: every value in it is
used in it only, its last is its result, and some linear's result in it is wider than all inputs
together and than the output.

Which dims are rows follows from the result backwards, operand by operand (readers.Roles): the
leading dims of a linear's first operand are those of its result, its weight has none of them, and
a value used as a weight is not part of the region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
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
    order_of,
    row_inputs,
    row_width,
    sizes_of,
)
from .primitives import PRIMITIVES
from .readers import Memo, is_along_rows, tensor_of
from .recipes import Recipe
from .steps import Step

# Primitives whose result is narrower than their operands: regions end there, or a little later.
_ENDS = {"linear", "logsumexp", "argmax"}
# No gradient flows back from their results: a region has them last or not at all.
_WITHOUT_GRADIENT = {name for name, kind in PRIMITIVES.items() if kind.backward is None}

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
    search = _Search(list(graph.nodes))
    for node in search.nodes:
        if node in search.claimed:
            continue
        region = search.ending_at(node)
        if region is not None:
            search.claimed.update(region.nodes)
            yield region


@dataclass
class _Search:
    """The search for the regions of a graph, in its order.

    claimed: nodes that belong to regions
    widest: of the nodes so far, bytes of a row of the widest linear among them and what they are
        computed from; of those that a region may have
    narrowed: of nodes that no region ends with, bytes of a row
    """

    nodes: list[Node]
    claimed: set[Node] = field(default_factory=set)
    widest: dict[Node, int] = field(default_factory=dict)
    narrowed: dict[Node, int] = field(default_factory=dict)
    order: dict[Node, int] = field(init=False)
    memo: Memo = field(init=False)

    def __post_init__(self) -> None:
        self.order, self.memo = order_of(self.nodes), Memo(self.claimed)

    def ending_at(self, node: Node) -> Region | None:
        """The region whose result a node narrows; None if there is none."""
        call = self.memo.read(node)
        if call is None:
            return None
        self.widest[node] = self._widest(node)
        if call.primitive not in _ENDS or not is_rows(call.operands[0], None):
            return None
        lead = sizes_of(call.operands[0])[:-1]
        if not self._works(node, lead):
            return None
        members = self._grown_back(node, lead)
        if not members:
            self.narrowed[node] = row_width(node, len(lead))
            return None
        self._grow_forward(members, lead)
        if not is_contiguous(members[-1]) or is_interrupted(self.nodes, self.order, members):
            return None
        return self._region(members)

    def _widest(self, node: Node) -> int:
        """`widest` of a node, from that of earlier ones."""
        widest = 0
        if self.memo.primitive(node) == "linear":
            widest = row_width(node, 0)
        for operand in node.all_input_nodes:
            if operand not in self.claimed:
                widest = max(widest, self.widest.get(operand, 0))
        return widest

    def _grown_back(self, last: Node, lead: Lead) -> list[Node]:
        """The best part that ends with a node; [] for none.

        A part qualifies if a linear in it is wider than its inputs together and than its result.
        The best has the fewest linears, then the narrowest inputs, then starts earliest.
        """
        output_width = row_width(last, len(lead))
        # Most linears have nothing wider before them.
        if self.widest[last] <= output_width:
            return []

        def accepts(node: Node) -> bool:
            return self._works(node, lead) and self.memo.primitive(node) not in _WITHOUT_GRADIENT

        members, inputs = list[Node](), set[Node]()
        best = least = widest = input_width = 0
        # Longer and longer parts: a member is among the inputs until the part has it.
        grown = grow_back(last, self.order, accepts, self.claimed, self.memo.shared)
        for member, has_all_else in grown:
            is_linear = self.memo.primitive(member) == "linear"
            if best and is_linear:
                break
            # Nothing that leads to it is wide enough for its own result, which is no wider.
            is_known = has_all_else and self.narrowed.get(member, output_width + 1) <= output_width
            if is_known and not best and widest <= output_width:
                break
            members.append(member)
            if is_linear:
                widest = max(widest, row_width(member, len(lead)))
            if member in inputs:
                input_width -= row_width(member, len(lead))
            for operand in self.memo.rows(member):
                if operand not in inputs:
                    inputs.add(operand)
                    input_width += row_width(operand, len(lead))
            if max(input_width, output_width) < widest and (not best or input_width <= least):
                least, best = input_width, len(members)
        return members[:best][::-1]

    def _grow_forward(self, members: list[Node], lead: Lead) -> None:
        """Append what is done to the result only, as a residual's add."""
        available = {*members, *row_inputs(members, self.memo.rows)}
        while len(members[-1].users) == 1:
            (user,) = members[-1].users
            # A cheap call whose other operands the region has already, and that widens nothing.
            if self.memo.primitive(members[-1]) in _WITHOUT_GRADIENT:
                break
            if self.memo.primitive(user) in (None, "linear"):
                break
            if not self._works(user, lead) or not is_rows(user, lead):
                break
            if not is_used_as_rows(members[-1], {user}, self.memo.shared):
                break
            if not available.issuperset(row_inputs([user], self.memo.rows)):
                break
            if row_width(user, len(lead)) > row_width(members[-1], len(lead)):
                break
            members.append(user)
            available.add(user)

    def _region(self, members: list[Node]) -> Region | None:
        """Write members as a recipe; None if it disagrees with the trace."""
        rows = row_inputs(members, self.memo.rows)
        shared: dict[Node, None] = {}
        for member in members:
            shared.update(dict.fromkeys(self.memo.shared(member)))
        # A node may be both, as in F.linear(x, x), so it has a name for each role.
        row_names: dict[Node, str] = {node: f"x{i}" for i, node in enumerate(rows)}
        shared_names: dict[Node, str] = {node: f"w{i}" for i, node in enumerate(shared)}
        steps: list[Step] = []
        for node in members:
            call = self.memo.read(node)
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

    def _works(self, node: Node, lead: Lead) -> bool:
        """Whether a node is a primitive of rows (*lead, features), all real."""
        operands = self.memo.roles(node)
        if not operands.rows or not all(is_rows(row, lead) for row in operands.rows):
            return False
        if not all(map(is_static, operands.shared)):
            return False
        # The gradients of complex numbers have conjugates, which no primitive computes.
        return not any(map(_is_complex, (*operands.rows, *operands.shared)))


def _is_complex(node: Node) -> bool:
    value = example_value(node)
    return isinstance(value, Tensor) and value.is_complex()
