"""Sparse attention for sequences that are too long for dense attention: write what may attend to what, let the library plan and compile it."""

from . import masks, orders
from .attend import compile, plan
from .block_masks import block_mask, block_masks
from .oracle import reference
from .programs import Branch, Program, block_sparse, hilbert_window, local_window, longnet

__all__ = [
    "Branch",
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
]
