"""Attention systems of the LongNet fork's benchmark reports, by name.

    longnet = {"segment_lengths": (2048, 4096), "dilation_rates": (1, 2)}
    variant("RingDilatedAttention", ring_size=4, **longnet)
    variant("RingDilatedAttentionV2_r8", **longnet)    the reports' spelling of ring_size=8
    variant("BlockSparse_LocalWindow_0.95")            ... and of sparsity=0.95

A variant computes what the system of its name is meant to, exactly and for every ring size. The
table notes what the fork's own code computed.

    attentions  the modules: Hilbert order, block-sparse, rings
    table       TABLE of Variant: the systems and their names
    construct   find, variant: from a name to a module
"""

from .attentions import (
    BlockSparseAttention,
    HilbertDilatedAttention,
    RingAttention,
    hilbert_grid,
    in_hilbert_order,
)
from .construct import find, variant
from .table import TABLE, Variant, rows

__all__ = [
    "TABLE",
    "BlockSparseAttention",
    "HilbertDilatedAttention",
    "RingAttention",
    "Variant",
    "find",
    "hilbert_grid",
    "in_hilbert_order",
    "rows",
    "variant",
]
