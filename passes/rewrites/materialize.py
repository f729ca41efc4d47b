"""Elementwise values that are used again are made, instead of being computed anew from all that went into them.

Inductor writes a sum of few buffers into each of its users. Along a residual stream that keeps every summand:

    x1 = x + a;  f(x1);  x2 = x1 + b;  g(x2);  x3 = x2 + c        at x3 inductor holds x, a, b and c; made, it holds x2 and c

Four transformer layers then take what one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from ..analysis import footprint
from ..analysis.effects import is_elementwise
from ..analysis.peak import mebibytes
from ..protocol import Stage

# Inductor makes a node that bears it a buffer, laid out as traced.
_MADE = "inductor_realize_to_strides"


@dataclass(frozen=True)
class Materialize:
    """Makes the elementwise values of a lowered graph that have two operands and two users or more, where that lowers the peak.

    In half precision a value that is made is rounded, as without a compiler, where one computed anew is not.
    """

    stage = Stage.LOWERED
    keeps_bits = False

    def __call__(self, graph: Graph) -> Sequence[str]:
        module, shared = graph.owning_module, _shared(graph)
        if module is None or not shared:
            return ()
        trial = footprint.copied(module)
        _mark(_shared(trial.graph))
        try:
            before, after = footprint.in_compilation(module), footprint.in_compilation(trial)
        except ValueError:  # sizes or branches by the data: there is no count, and the graph stays as it is
            return ()
        if after >= before:
            return ()
        _mark(shared)
        return (f"{len(shared)} shared elementwise values are made: peak {mebibytes(before)} -> {mebibytes(after)}",)


def _shared(graph: Graph) -> list[Node]:
    return [
        node
        for node in graph.nodes
        if is_elementwise(node) and len(node.users) > 1 and len(node.all_input_nodes) > 1 and _MADE not in node.meta
    ]


def _mark(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.meta[_MADE] = True
