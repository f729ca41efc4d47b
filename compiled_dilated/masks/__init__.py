"""Masks: expressions over token positions, joined by `&`, `|` and `~`.

core           Mask, And, Or, Not
full           full
algebra        conjunction, conjuncts, disjoint
bands          causal, window
segments       segments
congruent      congruent (LongNet's dilation)
leading        sinks, prefix, the first global tokens
blocks         block_window, dilated_blocks
grids          neighborhood; its masks in neighborhoods, its arithmetic in axes and coordinates
globals        global_tokens
data           documents, padding: read tensors of the call
explicit       tiles, random_blocks
functions      from_mod: a FlexAttention mask_mod; its graph in traced, captured values in contents
binding        masks with the data of a call, for counting and drawing; functions in unclassified
bounds         bounds of masks before a call passes its data

differences, lookup, ranges, summaries    arithmetic and text that several masks share
"""

from .algebra import conjunction, conjuncts, disjoint
from .bands import causal, narrowed, window
from .blocks import block_window, dilated_blocks
from .congruent import OFFSET_RULES, congruent
from .core import And, Mask, Not, Or
from .data import Padding, documents, padding
from .explicit import Tiles, random_blocks, tiles
from .full import Full, full
from .functions import from_mod
from .globals import global_tokens
from .grids import neighborhood
from .leading import prefix, sinks
from .segments import segments

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
