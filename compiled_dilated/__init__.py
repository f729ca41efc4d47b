"""Sparse attention over long sequences: masks as expressions, planned and compiled."""

from . import hf, masks, orders
from .attend import Attend
from .block_masks import block_mask, block_masks
from .compiler import compile, plan
from .modules import DilatedAttention, MultiheadDilatedAttention
from .packages import export, inspect, load
from .pictures import show
from .plans import Plan
from .programs import Branch, Program, big_bird, block_sparse, hilbert_window, local_window, longnet
from .reference import reference
from .ring.plans import RingPlan
from .ring.streamed import Streamed
from .variants import variant
from .wrapping.sites import sites

__all__ = [
    "Attend",
    "Branch",
    "DilatedAttention",
    "MultiheadDilatedAttention",
    "Plan",
    "Program",
    "RingPlan",
    "Streamed",
    "big_bird",
    "block_mask",
    "block_masks",
    "block_sparse",
    "compile",
    "export",
    "hf",
    "hilbert_window",
    "inspect",
    "load",
    "local_window",
    "longnet",
    "masks",
    "orders",
    "plan",
    "reference",
    "show",
    "sites",
    "variant",
]
