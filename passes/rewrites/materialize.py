"""Buffers for shared elementwise values, which are then computed once.

Inductor inlines a sum of few buffers into each of its users. Along a residual stream that keeps
every summand alive:

    x1 = x + a;  f(x1);  x2 = x1 + b;  g(x2);  x3 = x2 + c        at x3 inductor needs x, a, b, c;
                                                                  with x2 as a buffer, x2 and c

Four transformer layers then need the memory of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from ..analysis import footprint
from ..analysis.effects import is_elementwise
from ..analysis.peak import mebibytes
from ..protocol import Stage

# A node with this key in its meta becomes a buffer of inductor, with the strides of the trace.
_REALIZE = "inductor_realize_to_strides"


@dataclass(frozen=True)
class Materialize:
    """Makes buffers of shared elementwise values, if that lowers the peak.

    Shared are values with two operands and two users or more; the peak is that of the lowered
    graph. In half precision a buffer is rounded, as without a compiler; a value computed again is
    not.
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
            before = footprint.in_compilation(module)
            after = footprint.in_compilation(trial)
        except ValueError:  # sizes or branches depend on data: the peak is unknown
            return ()
        if after >= before:
            return ()
        _mark(shared)
        peaks = f"peak {mebibytes(before)} -> {mebibytes(after)}"
        return (f"{len(shared)} shared elementwise values become buffers: {peaks}",)


def _shared(graph: Graph) -> list[Node]:
    """Unmarked elementwise nodes with two operands and two users or more."""
    shared: list[Node] = []
    for node in graph.nodes:
        if not is_elementwise(node) or _REALIZE in node.meta:
            continue
        if len(node.users) > 1 and len(node.all_input_nodes) > 1:
            shared.append(node)
    return shared


def _mark(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.meta[_REALIZE] = True
