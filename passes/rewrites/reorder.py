"""Node orders, chosen for the lowest peak of the compiled program.

    x = wide(a);  y = wide(b);  small(x);  small(y)        two wide values are live at one time
    x = wide(a);  small(x);  y = wide(b);  small(y)        one

Orders are searched by the bytes of the graph's own values, once node by node and once with chains
of elementwise nodes as one step. Of these and the graph's own order, inductor's program decides
which has the lowest peak (footprint); the graph's own order wins a tie.
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
    """Reorders the nodes of a lowered graph for the lowest peak.

    Random numbers, in-place operators, collectives and custom operators keep their order.

    width: states of each size in the search; more find better orders of graphs with many branches,
        in more time
    """

    width: int = 64

    stage = Stage.LOWERED
    keeps_bits = True

    def __post_init__(self) -> None:
        arguments.whole("width", self.width, 1)

    @property
    def options(self) -> Mapping[str, Any]:
        """Options without reuse of buffers.

        Reuse keeps a dead buffer until one of its size is needed, perhaps never.
        """
        return {"allow_buffer_reuse": False}

    def __call__(self, graph: Graph) -> Sequence[str]:
        try:
            orders = candidates(graph, width=self.width)
            if not orders or graph.owning_module is None:
                return ()
            orders = [list(graph.nodes), *orders]
            peaks = [_peak(graph.owning_module, order) for order in orders]
        except ValueError:  # sizes or branches depend on data: the peak is unknown
            return ()
        best = peaks.index(min(peaks))
        if not best:
            return ()
        moved = sum(now is not before for now, before in zip(orders[best], orders[0], strict=True))
        rearrange(graph, orders[best])
        change = f"peak {mebibytes(peaks[0])} -> {mebibytes(peaks[best])}"
        return (f"{moved} of {len(orders[0])} nodes moved: {change}",)


def candidates(graph: Graph, *, width: int = 64) -> list[list[Node]]:
    """Legal orders of lower peak than the graph's own, by liveness.

    Raises ValueError as liveness.lifetimes does.

    width: states of each size in the search
    """
    living = lifetimes(graph, donated=footprint.donated(graph))
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    calls = [node for node in graph.nodes if node.op == "call_function"]
    before = precedences(graph, living)
    # Node by node, then chains of elementwise nodes as one step.
    orders: list[list[Node]] = []
    for groups in ([[node] for node in calls], _chains(calls, before)):
        steps = steps_of(groups, living, before)
        order = search(steps, width=width)
        if steps.peak(order) >= steps.peak(range(len(groups))):
            continue
        nodes = list(inputs)
        for step in order:
            nodes += groups[step]
        nodes += graph.find_nodes(op="output")
        orders.append(nodes)
    return orders


def rearrange(graph: Graph, order: Sequence[Node]) -> None:
    """Reorder all nodes of a graph."""
    for before, node in pairwise(order):
        before.append(node)
    graph.lint()


def precedences(graph: Graph, living: Lifetimes) -> dict[Node, set[Node]]:
    """For each call the calls that must precede it.

    living: the lifetimes of the graph
    """
    touched = _touched(graph, living)
    before: dict[Node, set[Node]] = {}
    # By storage: the calls that have touched it, and the last that has written to it.
    readers, last_write = defaultdict[int, set[Node]](set), dict[int, Node]()
    last_effect: Node | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        # Operands, and the last write to what it touches.
        before[node] = {
            operand for operand in node.all_input_nodes if operand.op == "call_function"
        }
        before[node] |= {last_write[storage] for storage in touched[node] if storage in last_write}
        # Calls with effects keep their order.
        if has_effects(node):
            if last_effect is not None:
                before[node].add(last_effect)
            last_effect = node
        # A write comes after all calls that touched the storage before.
        if changes_operands(node):
            for storage in touched[node]:
                before[node] |= readers[storage] - {node}
                last_write[storage] = node
        for storage in touched[node]:
            readers[storage].add(node)
    return before


def steps_of(
    groups: Sequence[Sequence[Node]], living: Lifetimes, before: Mapping[Node, set[Node]]
) -> Steps:
    """Each group of calls as one step of the search.

    A value that is computed and used only within one group takes no memory: inductor fuses it.

    groups: of all calls, in order
    living: the lifetimes of the graph
    before: its precedences
    """
    group_of: dict[Node, int] = {}
    for number, group in enumerate(groups):
        group_of.update(dict.fromkeys(group, number))
    touched = _touched(groups[0][0].graph, living) if groups else {}
    # 1. The storages that each group uses, those never freed, and the groups before it.
    permanent = set[int]()
    for number, storage in enumerate(living.storages):
        if storage.is_output or storage.upper == len(living.steps):
            permanent.add(number)
    used: list[set[int]] = [set() for _ in groups]
    earlier: list[set[int]] = [set() for _ in groups]
    users = defaultdict[int, set[int]](set)
    for node, step in group_of.items():
        used[step] |= touched[node]
        earlier[step] |= {group_of[needed] for needed in before[node]} - {step}
        for number in touched[node]:
            users[number].add(step)
    # 2. Storages of one group only are fused away, if it has several calls.
    sizes = [storage.size for storage in living.storages]
    for number, using in users.items():
        if len(using) == 1 and len(groups[min(using)]) > 1 and number not in permanent:
            sizes[number] = 0
    return Steps(
        sizes=tuple(sizes),
        allocated=tuple(map(tuple, _allocated(group_of, living, len(groups)))),
        used=tuple(map(_ordered, used)),
        before=tuple(map(_ordered, earlier)),
        permanent=frozenset(permanent),
        workspace=_workspace(groups, living),
    )


def _ordered(numbers: set[int]) -> tuple[int, ...]:
    return tuple(sorted(numbers))


def _allocated(group_of: Mapping[Node, int], living: Lifetimes, groups: int) -> list[list[int]]:
    """The storages that each group of calls allocates, by number.

    groups: their count
    """
    by_name = {node.name: group for node, group in group_of.items()}
    allocated: list[list[int]] = [[] for _ in range(groups)]
    for number, storage in enumerate(living.storages):
        group = by_name.get(living.steps[storage.lower])
        if group is not None and not storage.is_input:
            allocated[group].append(number)
    return allocated


def _workspace(groups: Sequence[Sequence[Node]], living: Lifetimes) -> tuple[int, ...]:
    """The most bytes that a call's subgraphs take, by group."""
    nested = dict(zip(living.steps, living.nested, strict=True))
    workspace: list[int] = []
    for group in groups:
        workspace.append(max(nested[node.name] for node in group))
    return tuple(workspace)


def _chains(calls: Iterable[Node], before: Mapping[Node, set[Node]]) -> list[list[Node]]:
    """Group elementwise calls with their only follower, as inductor fuses them.

    Groups are in the order of their last calls.
    """
    followers = defaultdict[Node, set[Node]](set)
    for node, earlier in before.items():
        for needed in earlier:
            followers[needed].add(node)
    # last_of[node]: the last call of its group
    last_of: dict[Node, Node] = {}
    groups = defaultdict[Node, list[Node]](list)
    for node in reversed(list(calls)):
        last_of[node] = node
        if is_elementwise(node) and len(node.users) == len(followers[node]) == 1:
            (follower,) = followers[node]
            last_of[node] = last_of[follower]
        groups[last_of[node]].insert(0, node)
    return [groups[node] for node in before if node in groups]


def _touched(graph: Graph, living: Lifetimes) -> dict[Node, set[int]]:
    """The storages of each node's operands and results, by number."""
    storages = defaultdict[str, set[int]](set)
    for number, storage in enumerate(living.storages):
        for name in storage.aliases:
            storages[name].add(number)
    touched: dict[Node, set[int]] = {}
    for node in graph.nodes:
        touched[node] = set(storages[node.name])
        for operand in node.all_input_nodes:
            touched[node] |= storages[operand.name]
    return touched


def _peak(module: GraphModule, order: Sequence[Node]) -> int:
    """The peak of a graph in another order, in bytes.

    The graph itself is not changed.
    """
    trial = footprint.copied(module)
    copies = dict(zip(module.graph.nodes, trial.graph.nodes, strict=True))
    rearrange(trial.graph, [copies[node] for node in order])
    return footprint.in_compilation(trial)
