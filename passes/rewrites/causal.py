"""Attention whose mask is worked out from positions, and says no more than that nothing looks ahead, is told so instead.

A model that writes its mask as `keys <= queries`, as transformers' models do under torch.compile, makes it whole: a byte for each
pair of tokens, then four more where the kernel wants a bias. Whether a mask is causal is read off the graph, in whole numbers:

    q = arange(n)[:, None];  k = arange(n)[None, :]        k <= q        all (i, j) where      i - j >= 0
    ones(n, n, dtype=bool).tril()                                                              i - j >= 0
    (k <= q) & (k > q - w)                                                                     i - j >= 0,  w - 1 - i + j >= 0

What holds for all pairs of the mask's shape, as the last one does where w is at least n, says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from ..analysis.liveness import source_of
from ..protocol import Stage
from .rows.attentions import scaled_dot_product
from .rows.positions import Conditions, Sum, conditions
from .rows.readers import example_value

# Query i stands along the last axis but one, key j along the last.
_NOTHING_AHEAD = Sum({2: 1, 1: -1})


@dataclass(frozen=True)
class Causal:
    """Calls F.scaled_dot_product_attention with is_causal=True where a boolean attn_mask made in the graph means just that.

    Left alone: masks that depend on data (padding, documents), that are given from outside, or of floating point.
    """

    stage = Stage.DYNAMO
    keeps_bits = False

    def __call__(self, graph: Graph) -> list[str]:
        lines = []
        for node in graph.nodes:
            call = scaled_dot_product(node)
            if call is None or call.arguments["is_causal"] or not _is_causal(call.arguments["attn_mask"]):
                continue
            mask = call.arguments["attn_mask"]
            call.arguments.update(attn_mask=None, is_causal=True)
            node.args, node.kwargs = call.args, call.kwargs
            shape = " x ".join(map(str, example_value(mask).shape))
            lines.append(f"{node.name} is causal, its mask of {shape} is not made  {source_of(node)}".rstrip())
        return lines


def _is_causal(mask: Any) -> bool:
    said = conditions(mask) if isinstance(mask, Node) else None
    if said is None or not isinstance(value := example_value(mask), Tensor):
        return False
    tells: Conditions = tuple(each for each in said if not each.is_never_negative(value.shape))
    return bool(tells) and all(each == _NOTHING_AHEAD for each in tells)
