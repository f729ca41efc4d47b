"""What of a forward is kept for the backward and what is computed again, under a budget for the peak of the whole step.

torch's activation_memory_budget bounds what is kept, and a step may then peak where it recomputes: with less kept, more. Here a
choice is a set of values to keep; the partitioner splits the joint graph by it, and the programs that inductor writes for the two
halves say what a step holds (footprint). The fastest choice within the budget wins.

    choice            recomputes            peak, of four layers, in units of one activation
    torch's own       elementwise           69.2
    larger pieces     and  9 products       28.3
    ...               and 12 products       23.1
    one piece         and 16 products       53.3      all of it is there at once when it is recomputed
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
from ..analysis.effects import has_effects
from ..analysis.liveness import lifetimes, number_of, value_of
from ..analysis.peak import mebibytes
from ..protocol import Stage
from .checkpoint_cuts import Value, kept

# Bounds on what a piece makes, as shares of all that the forward makes.
_SHARES = tuple(2 ** (-step / 2) for step in range(10))
# What a processor computes while it moves a byte, roughly: it weighs products against elementwise work.
_FLOPS_PER_BYTE = 10


@dataclass(frozen=True)
class Remat:
    """Recomputes as little of a forward as lets a training step stay within its budget.

    budget_bytes: what a step may hold at its peak beyond its inputs, gradients included; sizes count as traced. Where no choice
    fits, the one that holds least is taken and the line says so. Less budget never takes more memory: all budgets choose among
    the same. Random numbers, collectives, custom operators and attention (whose kernels may drop out) are not computed twice.

    Results and gradients come from the same operators on the same operands; where inductor fuses them otherwise, they may be
    rounded otherwise.
    """

    budget_bytes: int

    stage = Stage.JOINT
    keeps_bits = False

    def __post_init__(self) -> None:
        arguments.whole("budget_bytes", self.budget_bytes, 0)

    @property
    def options(self) -> Mapping[str, Any]:
        """Reuse keeps a dead buffer until another of its size is asked for, which may be never."""
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
        except ValueError:  # sizes or branches by the data: there is no count, and the graph stays as it is
            return ()
        if best is options[0]:
            return ()
        best.apply(graph)
        missed = "" if best.peak_bytes <= self.budget_bytes else f", above {mebibytes(self.budget_bytes)}: no choice holds less"
        return (f"{best}: peak {mebibytes(options[0].peak_bytes)} -> {mebibytes(best.peak_bytes)}{missed}",)

    def _best(self, options: Sequence[Choice]) -> Choice:
        """The fastest that fits, else the one that holds least. What it saves alone rules out a choice before it is compiled."""
        for each in sorted(options, key=lambda each: each.cost):
            if each.saved_bytes <= self.budget_bytes and each.peak_bytes <= self.budget_bytes:
                return each
        least = options[0]
        for each in options[1:]:
            if each.saved_bytes < least.peak_bytes and each.peak_bytes < least.peak_bytes:
                least = each
        return least


@dataclass(frozen=True, eq=False)
class Choice:
    """What of a joint graph's forward is kept and what recomputed, by name; torch's partitioner decides on the rest.

    Prints as what the backward recomputes.
    """

    module: GraphModule
    policies: Mapping[str, CheckpointPolicy]

    def apply(self, graph: Graph) -> None:
        """Tells the partitioner."""
        for node in graph.nodes:
            if node.name in self.policies:
                node.meta.update(recompute=self.policies[node.name], ac_graph_id=0)

    @cached_property
    def halves(self) -> tuple[GraphModule, GraphModule]:
        """The forward and the backward."""
        from torch._functorch.partitioners import min_cut_rematerialization_partition  # it brings the compiler

        trial = footprint.copied(self.module)
        self.apply(trial.graph)
        context = torch._guards.TracingContext.try_get()
        fixed = context.fw_metadata.static_input_indices if context is not None and context.fw_metadata is not None else None
        count = len(_forward_results(self.module.graph))
        return min_cut_rematerialization_partition(trial, (), num_fwd_outputs=count, static_lifetime_input_indices=fixed)

    @cached_property
    def peak_bytes(self) -> int:
        """What a step holds beyond its inputs."""
        return footprint.of_step(*self.halves).added_bytes

    @cached_property
    def saved_bytes(self) -> int:
        """What the forward leaves to the backward, which is less than the peak."""
        forward, backward = self.halves
        made = {node.name for node in forward.graph.nodes if node.op == "call_function"}
        return sum(_bytes(node) for node in backward.graph.find_nodes(op="placeholder") if node.name in made)

    @cached_property
    def again(self) -> list[Node]:
        """The calls of the forward that the backward repeats."""
        first = {node.name for node in self.halves[0].graph.nodes}
        return [node for node in self.halves[1].graph.nodes if node.op == "call_function" and node.name in first]

    @property
    def flops(self) -> int:
        """Of the products that the backward repeats."""
        return sum(map(_flops, self.again))

    @property
    def cost(self) -> int:
        """The time of what is repeated, in operations."""
        return self.flops + _FLOPS_PER_BYTE * sum(map(_bytes, self.again))

    def __str__(self) -> str:
        products = sum(_flops(node) > 0 for node in self.again)
        return f"the backward repeats {len(self.again)} calls, {products} of them products of {self.flops / 1e9:,.3g} GFLOP"


def choices(module: GraphModule) -> list[Choice]:
    """torch's own choice, then those that keep least for several bounds on what is recomputed at one time."""
    forward = _needed(_forward_results(module.graph))
    values, names = _values(module.graph, forward)
    made = sum(each.size for each in values)
    found = {frozenset(names[number] for number in kept(values, len(forward), int(share * made))) for share in _SHARES}
    ordered = sorted(found, key=lambda keep: (len(keep), sorted(keep)))
    return [Choice(module, {}), *(Choice(module, _policies(forward, keep)) for keep in ordered)]


def _policies(forward: Sequence[Node], keep: frozenset[str]) -> dict[str, CheckpointPolicy]:
    """Kept is what is named and what must not run twice; of a tuple, the partitioner keeps the parts that are used."""
    return {
        node.name: CheckpointPolicy.MUST_SAVE if node.name in keep or has_effects(node) else CheckpointPolicy.MUST_RECOMPUTE
        for node in forward
        if node.target is not operator.getitem and not isinstance(node.meta.get("val"), (int, SymInt))
    }


def _values(graph: Graph, forward: Sequence[Node]) -> tuple[list[Value], list[str]]:
    """What the forward makes, with the steps of the forward that make and use it, and the name of the node that makes it."""
    step = {node.name: number for number, node in enumerate(forward)}
    users = {node.name: [step[user.name] for user in node.users if user.name in step] for node in graph.nodes}
    storages = [each for each in lifetimes(graph).storages if not each.is_input and each.name.partition("[")[0] in step]
    names = [each.name.partition("[")[0] for each in storages]
    values = [
        Value(each.size, step[name], max([step[name], *(at for alias in each.aliases for at in users[alias])]))
        for each, name in zip(storages, names, strict=True)
    ]
    return values, names


def _is_joint(graph: Graph) -> bool:
    """Whether it is a forward and its backward, as AOTAutograd names their inputs, and nothing else besides."""
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    return all("primals" in name or "tangents" in name for name in names) and any("tangents" in name for name in names)


def _forward_results(graph: Graph) -> list[Any]:
    """Of a joint graph's results those of the forward, which stand before a gradient, or None, for each of its inputs."""
    (results,) = graph.find_nodes(op="output")[0].args
    leaves = pytree.tree_leaves(results, lambda leaf: leaf is None)
    inputs = sum("primals" in node.name for node in graph.find_nodes(op="placeholder"))
    return leaves[: len(leaves) - inputs]


def _needed(results: Sequence[Any]) -> list[Node]:
    """The calls that results are made by, in the order of the graph."""
    found, waiting = set[Node](), [each for each in results if isinstance(each, Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return sorted(node for node in found if node.op == "call_function")


def _bytes(node: Node) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(value_of(node)) if isinstance(leaf, Tensor)]
    return 0 if _is_view(node) else sum(number_of(each.numel(), node, {}) * each.element_size() for each in tensors)


def _flops(node: Node) -> int:
    """Of matrix products and convolutions; 0 of others."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in flop_registry:
        return 0
    args, kwargs = pytree.tree_map_only(Node, value_of, (node.args, node.kwargs))
    return number_of(flop_registry[packet](*args, **kwargs, out_val=value_of(node)), node, {})


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)
