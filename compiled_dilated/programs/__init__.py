"""Programs: branches of (heads, mask, order) merged by log-sum-exp.

core        Branch, Program
per_length  PerLength: a program for each number of tokens
families    longnet, local_window, hilbert_window, big_bird
densities   block_sparse
"""

from .core import Branch, Program, as_program
from .densities import KINDS, block_sparse
from .families import big_bird, hilbert_window, local_window, longnet
from .per_length import (
    PerLength,
    builder,
    check_data,
    mask_mods_of,
    masks_of,
    per_length,
    query_names_of,
)

__all__ = [
    "KINDS",
    "Branch",
    "PerLength",
    "Program",
    "as_program",
    "big_bird",
    "block_sparse",
    "builder",
    "check_data",
    "hilbert_window",
    "local_window",
    "longnet",
    "mask_mods_of",
    "masks_of",
    "per_length",
    "query_names_of",
]
