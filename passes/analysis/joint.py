"""A joint graph, split as inductor's partitioner will split it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

from torch._functorch._aot_autograd.descriptors import GradAOTOutput
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .inductor_program import copied_graph
from .schemas import is_view


@dataclass(frozen=True)
class Halves:
    """The forward and the backward of a joint graph.

    A saved value has one name in both.

    results: values that forward returns to the caller; the values saved for backward follow them
    """

    forward: Graph
    backward: Graph
    results: int

    @cached_property
    def saved(self) -> list[Node]:
        """The nodes of forward that backward takes, inputs among them."""
        return [node for node in _returned(self.forward)[self.results :] if isinstance(node, Node)]

    @cached_property
    def tangents(self) -> list[Node]:
        """The placeholders of backward that forward does not provide: gradients of results."""
        saved = {node.name for node in self.saved}
        placeholders = self.backward.find_nodes(op="placeholder")
        return [node for node in placeholders if node.name not in saved]

    @cached_property
    def dependent(self) -> dict[str, Node]:
        """The nodes of backward that depend on tangents, by name."""
        dependent = {node.name: node for node in self.tangents}
        for node in self.backward.nodes:
            if node.op == "output":
                continue
            if any(operand.name in dependent for operand in node.all_input_nodes):
                dependent[node.name] = node
        return dependent

    @cached_property
    def owned_by_caller(self) -> set[Node]:
        """The nodes of forward whose memory the caller keeps: inputs, parameters, results."""
        results = _returned(self.forward)[: self.results]
        inputs = {node for node in self.forward.nodes if node.op in ("placeholder", "get_attr")}
        return inputs | {base(node) for node in results if isinstance(node, Node)}

    @cached_property
    def last_uses(self) -> dict[Node, Node]:
        """The last forward node that uses the memory of each base."""
        last: dict[Node, Node] = {}
        for node in self.forward.nodes:
            if node.op == "output":
                continue
            for used in (node, *node.all_input_nodes):
                last[base(used)] = node
        return last


def split(graph: Graph) -> Halves | None:
    """Split a copy of a joint graph; None without a backward."""
    output = next(iter(graph.find_nodes(op="output")))
    descriptions = pytree.arg_tree_leaves(output.meta.get("desc", ()))
    if not any(isinstance(description, GradAOTOutput) for description in descriptions):
        return None
    # Gradients follow the results. One that is not needed has no description.
    results = 0
    while not (descriptions[results] is None or isinstance(descriptions[results], GradAOTOutput)):
        results += 1
    module = GraphModule(graph.owning_module or {}, copied_graph(graph))
    partition = config.custom_partitioner_fn or min_cut_rematerialization_partition
    forward, backward = partition(module, (), num_fwd_outputs=results)
    return Halves(forward.graph, backward.graph, results)


def base(node: Node) -> Node:
    """The node whose memory this one views, or the node itself.

    One of several results is its own base, unless the operator returns views.
    """
    while is_view(node) or (node.target is operator.getitem and is_view(node.all_input_nodes[0])):
        node = node.all_input_nodes[0]
    return node


def _returned(graph: Graph) -> list[object]:
    return pytree.arg_tree_leaves(*next(iter(graph.find_nodes(op="output"))).args)
