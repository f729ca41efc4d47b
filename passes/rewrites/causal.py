"""Replace a computed causal mask by is_causal=True.

A model that writes its mask as `keys <= queries`, as transformers' models do under torch.compile,
computes it for all pairs: a byte a pair, and four more if the kernel takes a bias. Whether a mask
is causal follows from the graph, as conditions on its indices:

    q = arange(n)[:, None];  k = arange(n)[None, :]

    k <= q                               (i, j) where      i - j >= 0
    ones(n, n, dtype=bool).tril()                          i - j >= 0
    (k <= q) & (k > q - w)                                 i - j >= 0,  w - 1 - i + j >= 0

A condition that holds for all pairs of the mask's shape, as the last one if w >= n, is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from ..analysis.sources import source_of
from ..protocol import Stage
from .rows.attentions import scaled_dot_product
from .rows.calls import example_value
from .rows.positions import Sum, conditions

# Queries i are the last axis but one, keys j the last.
_NOTHING_AHEAD = Sum({2: 1, 1: -1})


@dataclass(frozen=True)
class Causal:
    """Replaces computed causal masks of SDPA by is_causal=True.

    Leaves alone masks that depend on data (padding, documents), masks that are inputs, and
    floating-point masks.
    """

    stage = Stage.DYNAMO
    keeps_bits = False

    def __call__(self, graph: Graph) -> list[str]:
        lines = []
        for node in graph.nodes:
            call = scaled_dot_product(node)
            if (
                call is None
                or call.arguments["is_causal"]
                or not _is_causal(call.arguments["attn_mask"])
            ):
                continue
            # The mask's nodes stay, without users: dead code is eliminated later.
            mask = call.arguments["attn_mask"]
            call.arguments.update(attn_mask=None, is_causal=True)
            node.args, node.kwargs = call.args, call.kwargs
            shape = " x ".join(map(str, example_value(mask).shape))
            line = f"{node.name} is causal, without a mask of {shape}  {source_of(node)}"
            lines.append(line.rstrip())
        return lines


def _is_causal(mask: Any) -> bool:
    """Whether a mask is computed from positions as query >= key."""
    if not isinstance(mask, Node):
        return False
    read, value = conditions(mask), example_value(mask)
    if read is None or not isinstance(value, Tensor):
        return False
    effective = [condition for condition in read if not condition.is_never_negative(value.shape)]
    return bool(effective) and all(condition == _NOTHING_AHEAD for condition in effective)
