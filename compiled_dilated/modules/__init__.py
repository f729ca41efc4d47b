"""Attention modules, compatible with the first public LongNet port.

Signatures and state dicts are those of that port.

    DilatedAttention            (B, N, H, D) -> (B, N, H, D)     no parameters
    MultiheadDilatedAttention   (B, N, E) -> ((B, N, E), None)   projections -> attention -> norm
                                                                 -> output projection

The core works on (B, H, N, D): inputs and the output are transposed as views.

    attention  DilatedAttention and its base: a program over (B, N, H, D)
    multihead  MultiheadDilatedAttention and its base: projections around any attention
    padding    programs with padding keys hidden, the mask of padding
    refusals   dropout, which the kernels do not have
"""

from .attention import Attention, DilatedAttention
from .multihead import Multihead, MultiheadDilatedAttention
from .padding import visible

__all__ = [
    "Attention",
    "DilatedAttention",
    "Multihead",
    "MultiheadDilatedAttention",
    "visible",
]
