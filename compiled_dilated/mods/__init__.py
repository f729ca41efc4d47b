"""score_mods and mask_mods as graphs, evaluated on tiles.

tracing   fn(score, b, h, q, kv)  ->  Graph, operands (the tensors that fn captures)
captures  captured tensors and numbers while fn is traced
recorder  the operators that fn calls
draft     the graph while fn is traced, and its text
graphs    Graph: a text, its strict parser, and its values on all pairs of a tile
pairs     a function of scalars over all pairs, as FlexAttention calls it
bound     a graph with the operands of one call, and the sums of their gradients
"""

from .bound import Kind, Mod, TileMod, flat, kind_of, sums_dtype, unflat, zero_sums
from .graphs import Graph, ModError
from .pairs import over_pairs
from .tracing import (
    MaskMod,
    ScoreMod,
    as_tensor,
    check_callable,
    name_of,
    trace_mask_mod,
    trace_score_mod,
    without_autocast,
)

__all__ = [
    "Graph",
    "Kind",
    "MaskMod",
    "Mod",
    "ModError",
    "ScoreMod",
    "TileMod",
    "as_tensor",
    "check_callable",
    "flat",
    "kind_of",
    "name_of",
    "over_pairs",
    "sums_dtype",
    "trace_mask_mod",
    "trace_score_mod",
    "unflat",
    "without_autocast",
    "zero_sums",
]
