"""Recomputation in backward, under a budget for the step's peak.

torch's activation_memory_budget bounds what is kept, and a step may then peak where it recomputes:
the less is kept, the higher. Here a choice is a set of values to keep; the partitioner splits the
joint graph by it, and inductor's programs for the two halves give the peak of a step (footprint).
The fastest choice within the budget wins.

    choice            recomputes            peak, of four layers, in units of one activation
    torch's own       elementwise           69.2
    larger pieces     and  9 products       28.3
    ...               and 12 products       23.1
    one piece         and 16 products       53.3      all of it is live when it is recomputed
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from .. import arguments
from ..analysis import footprint
from ..analysis.costs import MACHINE, Work
from ..analysis.effects import has_effects
from ..analysis.liveness import lifetimes
from ..analysis.peak import mebibytes
from ..analysis.values import number_of, value_of
from ..protocol import Stage
from .checkpoint_cuts import Value, values_to_keep

# Bounds on the bytes of a piece, as shares of all bytes that the forward makes.
_SHARES = tuple(2 ** (-step / 2) for step in range(10))


@dataclass(frozen=True)
class Remat:
    """Recomputes parts of a forward to keep a training step within budget.

    budget_bytes: for the peak of a step beyond its inputs, gradients included; dynamic sizes count
        as traced. If no choice fits, the one with the lowest peak is taken, as the report states.
        A smaller budget never takes more memory: all budgets choose among the same.

    Random numbers, collectives, custom operators and attention (whose kernels may drop out) are not
    recomputed. Results and gradients come from the same operators on the same operands; inductor
    may fuse them differently, and so round differently.
    """

    budget_bytes: int

    stage = Stage.JOINT
    keeps_bits = False

    def __post_init__(self) -> None:
        arguments.whole("budget_bytes", self.budget_bytes, 0)

    @property
    def options(self) -> Mapping[str, Any]:
        """Options without reuse of buffers.

        Reuse keeps a dead buffer until one of its size is needed, perhaps never.
        """
        return {"allow_buffer_reuse": False}

    def __call__(self, graph: Graph) -> Sequence[str]:
        module = graph.owning_module
        if module is None or not _is_joint(graph):
            return ()
        try:
            options = choices(module)
            if options[0].peak_bytes <= self.budget_bytes:
                return ()
            best = self._best(options)
        except ValueError:  # sizes or branches depend on data: the peak is unknown
            return ()
        if best is options[0]:
            return ()
        best.apply(graph)
        line = f"{best}: peak {mebibytes(options[0].peak_bytes)} -> {mebibytes(best.peak_bytes)}"
        if best.peak_bytes > self.budget_bytes:
            line += f", above {mebibytes(self.budget_bytes)}: no choice takes less"
        return (line,)

    def _best(self, options: Sequence[Choice]) -> Choice:
        """The fastest choice that fits, else the one with the lowest peak."""
        # The saved bytes are a lower bound of the peak, and need no program of inductor: they rule
        # choices out first.
        for choice in sorted(options, key=lambda choice: choice.cost):
            if choice.saved_bytes <= self.budget_bytes and choice.peak_bytes <= self.budget_bytes:
                return choice
        lowest = options[0]
        for choice in options[1:]:
            if choice.saved_bytes < lowest.peak_bytes and choice.peak_bytes < lowest.peak_bytes:
                lowest = choice
        return lowest


@dataclass(frozen=True, eq=False)
class Choice:
    """Values of a joint graph's forward to keep and to recompute.

    Prints what backward recomputes.

    policies: by the names of nodes; torch's partitioner decides on the others
    """

    module: GraphModule
    policies: Mapping[str, CheckpointPolicy]

    def apply(self, graph: Graph) -> None:
        """Annotate the nodes of a graph for the partitioner."""
        for node in graph.nodes:
            if node.name in self.policies:
                node.meta.update(recompute=self.policies[node.name], ac_graph_id=0)

    @cached_property
    def halves(self) -> tuple[GraphModule, GraphModule]:
        """The forward and the backward."""
        # Imports the compiler.
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        trial = footprint.copied(self.module)
        self.apply(trial.graph)
        context = torch._guards.TracingContext.try_get()
        static_inputs = None
        if context is not None and context.fw_metadata is not None:
            static_inputs = context.fw_metadata.static_input_indices
        return min_cut_rematerialization_partition(
            trial,
            (),
            num_fwd_outputs=len(_forward_results(self.module.graph)),
            static_lifetime_input_indices=static_inputs,
        )

    @cached_property
    def peak_bytes(self) -> int:
        """The peak of a step beyond its inputs."""
        return footprint.of_step(*self.halves).added_bytes

    @cached_property
    def saved_bytes(self) -> int:
        """Bytes that the forward saves for the backward, less than the peak."""
        forward, backward = self.halves
        computed = {node.name for node in forward.graph.nodes if node.op == "call_function"}
        placeholders = backward.graph.find_nodes(op="placeholder")
        return sum(_bytes(node) for node in placeholders if node.name in computed)

    @cached_property
    def recomputed(self) -> list[Node]:
        """The calls of the forward that the backward repeats."""
        forward, backward = self.halves
        names = {node.name for node in forward.graph.nodes}
        repeated: list[Node] = []
        for node in backward.graph.nodes:
            if node.op == "call_function" and node.name in names:
                repeated.append(node)
        return repeated

    @property
    def flops(self) -> int:
        """Flops of the matrix products that the backward repeats."""
        return sum(map(_flops, self.recomputed))

    @property
    def cost(self) -> float:
        """The time of what the backward repeats, in seconds of a machine."""
        return MACHINE.seconds(Work(self.flops, sum(map(_bytes, self.recomputed))))

    def __str__(self) -> str:
        products = sum(_flops(node) > 0 for node in self.recomputed)
        return (
            f"the backward repeats {len(self.recomputed)} calls, {products} of them products "
            f"of {self.flops / 1e9:,.3g} GFLOP"
        )


def choices(module: GraphModule) -> list[Choice]:
    """torch's own choice, then one for each of several bounds on pieces."""
    forward = _ancestors(_forward_results(module.graph))
    values, names = _values(module.graph, forward)
    total = sum(value.size for value in values)
    distinct: set[frozenset[str]] = set()
    for share in _SHARES:
        numbers = values_to_keep(values, len(forward), int(share * total))
        distinct.add(frozenset(names[number] for number in numbers))
    # torch's own first, then by the count of values that stay.
    result = [Choice(module, {})]
    for keep in sorted(distinct, key=lambda keep: (len(keep), sorted(keep))):
        result.append(Choice(module, _policies(forward, keep)))
    return result


def _policies(forward: Sequence[Node], keep: frozenset[str]) -> dict[str, CheckpointPolicy]:
    """Policies that keep `keep` and nodes that must not run twice."""
    policies: dict[str, CheckpointPolicy] = {}
    for node in forward:
        # Of a tuple that is kept, the partitioner keeps the items that are used.
        if node.target is operator.getitem or isinstance(node.meta.get("val"), (int, SymInt)):
            continue
        if node.name in keep or has_effects(node):
            policies[node.name] = CheckpointPolicy.MUST_SAVE
        else:
            policies[node.name] = CheckpointPolicy.MUST_RECOMPUTE
    return policies


def _values(graph: Graph, forward: Sequence[Node]) -> tuple[list[Value], list[str]]:
    """The values that the forward makes, and the names of their nodes.

    forward: its calls, in order; the steps of the values
    """
    step_of = {node.name: step for step, node in enumerate(forward)}
    use_steps: dict[str, list[int]] = {}
    for node in graph.nodes:
        use_steps[node.name] = [step_of[user.name] for user in node.users if user.name in step_of]
    # A value lasts until the last use of any view of its storage.
    values: list[Value] = []
    names: list[str] = []
    for storage in lifetimes(graph).storages:
        name = storage.name.partition("[")[0]
        if storage.is_input or name not in step_of:
            continue
        last = step_of[name]
        for alias in storage.aliases:
            last = max([last, *use_steps[alias]])
        values.append(Value(storage.size, step_of[name], last))
        names.append(name)
    return values, names


def _is_joint(graph: Graph) -> bool:
    """Whether a graph has a backward, by AOTAutograd's names of inputs."""
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    if not all("primals" in name or "tangents" in name for name in names):
        return False
    return any("tangents" in name for name in names)


def _forward_results(graph: Graph) -> list[Any]:
    """The forward's results in a joint graph.

    A gradient or None for each input follows them.
    """
    (results,) = graph.find_nodes(op="output")[0].args
    leaves = pytree.tree_leaves(results, lambda leaf: leaf is None)
    inputs = sum("primals" in node.name for node in graph.find_nodes(op="placeholder"))
    return leaves[: len(leaves) - inputs]


def _ancestors(results: Sequence[Any]) -> list[Node]:
    """The calls that results depend on, in the order of the graph."""
    ancestors, waiting = set[Node](), [node for node in results if isinstance(node, Node)]
    while waiting:
        node = waiting.pop()
        if node not in ancestors:
            ancestors.add(node)
            waiting += node.all_input_nodes
    return sorted(node for node in ancestors if node.op == "call_function")


def _bytes(node: Node) -> int:
    """Bytes of a node's results, 0 for a view.

    Dynamic sizes count as traced.
    """
    if _is_view(node):
        return 0
    size = 0
    for leaf in pytree.tree_leaves(value_of(node)):
        if isinstance(leaf, Tensor):
            size += number_of(leaf.numel(), node, {}) * leaf.element_size()
    return size


def _flops(node: Node) -> int:
    """The flops of a matrix product or a convolution, else 0."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in flop_registry:
        return 0
    args, kwargs = pytree.tree_map_only(Node, value_of, (node.args, node.kwargs))
    flops = flop_registry[packet](*args, **kwargs, out_val=value_of(node))
    return number_of(flops, node, {})


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)
