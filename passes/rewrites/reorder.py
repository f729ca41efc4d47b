"""The nodes of a graph in another order, so that the compiled program holds less at its peak.

    x = wide(a);  y = wide(b);  small(x);  small(y)        holds two wide values
    x = wide(a);  small(x);  y = wide(b);  small(y)        holds one

Orders are searched by the bytes of the graph's own values, node by node and with chains of elementwise nodes taken as one. Of
those found and the given one, inductor's own program says which holds least (footprint); the given order wins a tie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.fx import Graph, GraphModule, Node

from .. import arguments
from ..analysis import footprint
from ..analysis.effects import changes_operands, has_effects, is_elementwise
from ..analysis.liveness import Lifetimes, lifetimes
from ..analysis.peak import mebibytes
from ..protocol import Stage
from .order_search import Steps, search


@dataclass(frozen=True)
class Reorder:
    """Chooses the order of a lowered graph. Random numbers, changes in place, collectives and custom operators keep theirs.

    width: states that the search keeps of each size; more find better orders of graphs with many branches, in more time.
    """

    width: int = 64

    stage = Stage.LOWERED
    keeps_bits = True

    def __post_init__(self) -> None:
        arguments.whole("width", self.width, 1)

    @property
    def options(self) -> Mapping[str, Any]:
        """Reuse keeps a dead buffer until another of its size is asked for, which may be never."""
        return {"allow_buffer_reuse": False}

    def __call__(self, graph: Graph) -> Sequence[str]:
        try:
            orders = candidates(graph, width=self.width)
            if not orders or graph.owning_module is None:
                return ()
            orders = [list(graph.nodes), *orders]
            peaks = [_peak(graph.owning_module, order) for order in orders]
        except ValueError:  # sizes or branches by the data: there is no count, and the graph stays as it is
            return ()
        best = peaks.index(min(peaks))
        if not best:
            return ()
        moved = sum(now is not before for now, before in zip(orders[best], orders[0], strict=True))
        rearrange(graph, orders[best])
        return (f"{moved} of {len(orders[0])} nodes stand elsewhere: peak {mebibytes(peaks[0])} -> {mebibytes(peaks[best])}",)


def candidates(graph: Graph, *, width: int = 64) -> list[list[Node]]:
    """Legal orders of all nodes that hold less than the given one by the count of their own values; none where none was found.

    Raises ValueError as liveness.lifetimes does.
    """
    found = lifetimes(graph, donated=footprint.donated(graph))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    before = precedences(graph, found)
    orders: list[list[Node]] = []
    for groups in ([[node] for node in calls], _chains(calls, before)):
        steps = steps_of(groups, found, before)
        order = search(steps, width=width)
        if steps.peak(order) < steps.peak(range(len(groups))):
            placed = [node for step in order for node in groups[step]]
            first = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
            orders.append([*first, *placed, *graph.find_nodes(op="output")])
    return orders


def rearrange(graph: Graph, order: Sequence[Node]) -> None:
    """Puts all nodes of a graph into the given order."""
    for before, node in pairwise(order):
        before.append(node)
    graph.lint()


def precedences(graph: Graph, found: Lifetimes) -> dict[Node, set[Node]]:
    """The calls that must stand before each call: operands, effects in their turn, readers before what they read is changed.

    found: the lifetimes of the graph.
    """
    touched = _touched(graph, found)
    before: dict[Node, set[Node]] = {}
    readers, changed = defaultdict[int, set[Node]](set), dict[int, Node]()
    effect: Node | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        before[node] = {each for each in node.all_input_nodes if each.op == "call_function"}
        before[node] |= {changed[each] for each in touched[node] if each in changed}
        if has_effects(node):
            before[node] |= {effect} if effect is not None else set()
            effect = node
        if changes_operands(node):
            for storage in touched[node]:
                before[node] |= readers[storage] - {node}
                changed[storage] = node
        for storage in touched[node]:
            readers[storage].add(node)
    return before


def steps_of(groups: Sequence[Sequence[Node]], found: Lifetimes, before: Mapping[Node, set[Node]]) -> Steps:
    """Each group of calls as one step. What a group makes and uses up within itself takes no memory."""
    group_of = {node: number for number, group in enumerate(groups) for node in group}
    touched = _touched(groups[0][0].graph, found) if groups else {}
    users = defaultdict[int, set[int]](set)
    made: list[list[int]] = [[] for _ in groups]
    place = {node.name: node for node in group_of}
    for node, number in group_of.items():
        for storage in touched[node]:
            users[storage].add(number)
    for number, each in enumerate(found.storages):
        maker = place.get(found.steps[each.lower])
        if not each.is_input and maker is not None:
            made[group_of[maker]].append(number)
    kept = {number for number, each in enumerate(found.storages) if each.is_output or each.upper == len(found.steps)}
    inner = {number for number, at in users.items() if len(at) == 1 and len(groups[min(at)]) > 1} - kept
    nested = dict(zip(found.steps, found.nested, strict=True))
    return Steps(
        tuple(0 if number in inner else each.size for number, each in enumerate(found.storages)),
        tuple(map(tuple, made)),
        tuple(tuple(sorted({each for node in group for each in touched[node]})) for group in groups),
        tuple(
            tuple(sorted({group_of[each] for node in group for each in before[node]} - {number}))
            for number, group in enumerate(groups)
        ),
        frozenset(kept),
        tuple(max(nested[node.name] for node in group) for group in groups),
    )


def _chains(calls: Iterable[Node], before: Mapping[Node, set[Node]]) -> list[list[Node]]:
    """Elementwise calls together with the one call that follows them, as inductor fuses them, in the order of their last."""
    following = defaultdict[Node, set[Node]](set)
    for node, earlier in before.items():
        for each in earlier:
            following[each].add(node)
    last: dict[Node, Node] = {}
    groups = defaultdict[Node, list[Node]](list)
    for node in reversed(list(calls)):
        joins = is_elementwise(node) and len(node.users) == len(following[node]) == 1
        last[node] = last[next(iter(following[node]))] if joins else node
        groups[last[node]].insert(0, node)
    return [groups[node] for node in before if node in groups]


def _touched(graph: Graph, found: Lifetimes) -> dict[Node, set[int]]:
    """The storages in which a node's operands and results lie, by number."""
    lies = defaultdict[str, set[int]](set)
    for number, storage in enumerate(found.storages):
        for name in storage.aliases:
            lies[name].add(number)
    return {node: set().union(lies[node.name], *(lies[each.name] for each in node.all_input_nodes)) for node in graph.nodes}


def _peak(module: GraphModule, order: Sequence[Node]) -> int:
    """The footprint of a graph in another order. The graph is left as it is."""
    trial = footprint.copied(module)
    twins = dict(zip(module.graph.nodes, trial.graph.nodes, strict=True))
    rearrange(trial.graph, [twins[node] for node in order])
    return footprint.in_compilation(trial)
