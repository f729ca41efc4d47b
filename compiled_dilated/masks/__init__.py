"""What may attend to what: small expressions over token positions, joined by `&`, `|` and `~`."""

from .blocks import block_window
from .core import And, Full, Mask, Not, Or, conjunction, conjuncts, disjoint, full
from .data import Padding, documents, padding
from .explicit import Tiles, random_blocks, tiles
from .functions import from_mod
from .globals import global_tokens
from .grids import neighborhood
from .positions import OFFSET_RULES, causal, congruent, dilated_blocks, narrowed, prefix, segments, sinks, window

__all__ = [
    "OFFSET_RULES",
    "And",
    "Full",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "Tiles",
    "block_window",
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
    "random_blocks",
    "segments",
    "sinks",
    "tiles",
    "window",
]
