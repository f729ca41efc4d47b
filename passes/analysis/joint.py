"""Forward and backward in one graph, and the two that inductor's partitioner will make of it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch._functorch._aot_autograd.descriptors import GradAOTOutput
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .inductor_program import copied_graph


@dataclass(frozen=True)
class Halves:
    """A joint graph as it would be split: nodes of `forward` that `backward` takes have their names there.

    results: how many values forward returns to the caller; those saved for backward follow them.
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
        """What only backward takes."""
        crossing = {node.name for node in self.saved}
        return [node for node in self.backward.nodes if node.op == "placeholder" and node.name not in crossing]

    @cached_property
    def dependent(self) -> dict[str, Node]:
        """The nodes of backward that depend on tangents, by name."""
        found = {node.name: node for node in self.tangents}
        for node in self.backward.nodes:
            if node.op != "output" and any(each.name in found for each in node.all_input_nodes):
                found[node.name] = node
        return found

    @cached_property
    def held(self) -> set[Node]:
        """The nodes of forward whose memory the caller holds: inputs, parameters and results."""
        results = [node for node in _returned(self.forward)[: self.results] if isinstance(node, Node)]
        inputs = [node for node in self.forward.nodes if node.op in ("placeholder", "get_attr")]
        return {base(node) for node in results} | set(inputs)

    @cached_property
    def last_uses(self) -> dict[Node, Node]:
        """By the base of each node of forward: the last one that reads its memory, or that makes it."""
        return {base(each): node for node in self.forward.nodes if node.op != "output" for each in (node, *node.all_input_nodes)}


def split(graph: Graph) -> Halves | None:
    """The halves of a joint graph, which is left as it is; None of a graph without a backward."""
    output = next(iter(graph.find_nodes(op="output")))
    descriptions = pytree.arg_tree_leaves(output.meta.get("desc", ()))
    if not any(isinstance(each, GradAOTOutput) for each in descriptions):
        return None
    # A gradient that is not asked for has no description.
    results = next(i for i, each in enumerate(descriptions) if each is None or isinstance(each, GradAOTOutput))
    module = GraphModule(graph.owning_module or {}, copied_graph(graph))
    partition = config.custom_partitioner_fn or min_cut_rematerialization_partition
    forward, backward = partition(module, (), num_fwd_outputs=results)
    return Halves(forward.graph, backward.graph, results)


def base(node: Node) -> Node:
    """The node whose memory this one is a view of, or the node itself. A result of several is a base of its own."""
    while is_view(node) or (node.target is operator.getitem and is_view(node.all_input_nodes[0])):
        node = node.all_input_nodes[0]
    return node


def is_view(node: Node) -> bool:
    """Whether a node is a view of its first operand, by the schema of its operator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returned = node.target._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def _returned(graph: Graph) -> list[object]:
    return pytree.arg_tree_leaves(*next(iter(graph.find_nodes(op="output"))).args)
