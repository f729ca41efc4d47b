"""Sparse attention over long sequences: write what may attend to what, and let the library plan and compile it."""

from . import masks, orders
from .block_masks import block_mask, block_masks
from .compiler import compile, plan
from .modules import DilatedAttention, MultiheadDilatedAttention
from .programs import Branch, Program, block_sparse, hilbert_window, local_window, longnet
from .reference import reference
from .variants import variant

__all__ = [
    "Branch",
    "DilatedAttention",
    "MultiheadDilatedAttention",
    "Program",
    "block_mask",
    "block_masks",
    "block_sparse",
    "compile",
    "hilbert_window",
    "local_window",
    "longnet",
    "masks",
    "orders",
    "plan",
    "reference",
    "variant",
]
