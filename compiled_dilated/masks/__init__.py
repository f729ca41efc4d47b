"""What may attend to what: small expressions over token positions, joined by `&`, `|` and `~`."""

from .core import And, Full, Mask, Not, Or, conjunction, conjuncts, disjoint, full
from .data import Padding, documents, padding
from .explicit import Tiles, tiles
from .functions import from_mod
from .grids import neighborhood
from .positions import OFFSET_RULES, causal, congruent, dilated_blocks, global_tokens, narrowed, prefix, segments, sinks, window

__all__ = [
    "OFFSET_RULES",
    "And",
    "Full",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "Tiles",
    "causal",
    "congruent",
    "conjunction",
    "conjuncts",
    "dilated_blocks",
    "disjoint",
    "documents",
    "from_mod",
    "full",
    "global_tokens",
    "narrowed",
    "neighborhood",
    "padding",
    "prefix",
    "segments",
    "sinks",
    "tiles",
    "window",
]
