"""The table of the reports' systems, in the fork and here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from ..modules import Attention, DilatedAttention, Multihead
from .attentions import BlockSparseAttention, HilbertDilatedAttention

SINGLE, RING, DISTRIBUTED = "single", "ring", "distributed ring"

_PROGRAMS: dict[type[Attention], str] = {
    DilatedAttention: "longnet(segment_lengths, dilation_rates)",
    HilbertDilatedAttention: "longnet(segment_lengths, dilation_rates), branches in Hilbert order",
    BlockSparseAttention: "block_sparse(1 - sparsity, kind, block, tokens)",
}


@dataclass(frozen=True)
class Variant:
    """One system of the reports.

    attention: the module that computes its program.
    execution: "single" device, "ring" of devices, or "distributed ring" over torch.distributed.
    there: the computation of the fork's system of this name.
    here: the computation of this variant.
    multihead: whether it has projections.
    ring_sizes: of the reports; the default is 1.
    sparsities: of the reports; the default is the first.
    alias: another spelling in the reports.
    """

    name: str
    attention: type[Attention]
    execution: str
    there: str
    here: str
    multihead: bool = False
    ring_sizes: tuple[int, ...] = ()
    sparsities: tuple[float, ...] = ()
    alias: str | None = None

    @property
    def program(self) -> str:
        """The program as code, over the variant's arguments."""
        return _PROGRAMS[self.attention]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the reports, with every suffix of ring size or sparsity."""
        suffixes = [""]
        suffixes += [f"_r{size}" for size in self.ring_sizes]
        suffixes += [f"_{sparsity}" for sparsity in self.sparsities]
        names = [self.name + suffix for suffix in suffixes]
        if self.alias is not None:
            names += [self.alias + suffix for suffix in suffixes]
        return tuple(names)

    @property
    def takes(self) -> dict[str, bool]:
        """The keyword arguments of `variant`: name -> whether it is required."""
        is_required = {}
        if self.multihead:
            is_required = _parameters(Multihead)
            del is_required["attention"]
        is_required |= _parameters(self.attention)
        del is_required["ring"]
        if self.multihead:
            del is_required["attention_dropout"]
        if self.sparsities:
            is_required["sparsity"] = False
        if self.execution != SINGLE:
            is_required["ring_size"] = False
        return is_required


def _parameters(module: type[nn.Module]) -> dict[str, bool]:
    """The constructor's parameters: name -> whether it is required."""
    is_required = {}
    for name, parameter in inspect.signature(module).parameters.items():
        is_required[name] = parameter.default is inspect.Parameter.empty
    return is_required


_LONGNET = "the LongNet program, one softmax over all branches"
_SAME = f"{_LONGNET}; the same numbers for every ring size"
_WINDOW = "a window that keeps the stated share of all pairs, one softmax"
_BLOCKS = f"{_WINDOW}; the same numbers for every ring size"
_CHUNKED = (
    "in one process no attention crosses the chunks that q, k and v are cut into; causal leaks; "
    "16K tokens, ring 16: all zeros"
)
_DENSE = "dense attention; wrong on two real ranks, where K and V share one receive buffer"

TABLE: tuple[Variant, ...] = (
    Variant(
        "DilatedAttention",
        DilatedAttention,
        SINGLE,
        there="a softmax per branch, their sum divided by the number of branches; "
        "rows of no branch 0; softmax_scale ignored",
        here=_LONGNET,
    ),
    Variant(
        "MultiheadDilatedAttention",
        DilatedAttention,
        SINGLE,
        there="projections around its DilatedAttention",
        here=f"projections around {_LONGNET}",
        multihead=True,
    ),
    Variant(
        "ImprovedDilatedAttention",
        DilatedAttention,
        SINGLE,
        there="attention over the heads of each token, not over the sequence: the axes are swapped",
        here=_LONGNET,
    ),
    Variant(
        "ImprovedMultiheadDilatedAttention",
        DilatedAttention,
        SINGLE,
        there="projections around its ImprovedDilatedAttention; masks are dropped with a warning",
        here=f"projections around {_LONGNET}",
        multihead=True,
    ),
    Variant(
        "RingDilatedAttention",
        DilatedAttention,
        RING,
        there="its billion tokens: at most 4 chunks were run, and the tokens multiplied by the "
        "ring size",
        here=_SAME,
        ring_sizes=(1, 32, 256, 4096, 32768, 131072, 262144),
    ),
    Variant(
        "RingMultiheadDilatedAttention",
        DilatedAttention,
        RING,
        there="projections around its RingDilatedAttention; masks are dropped with a warning",
        here=f"projections around {_SAME}",
        multihead=True,
    ),
    Variant(
        "RingDilatedAttentionV2",
        DilatedAttention,
        RING,
        there=_CHUNKED,
        here=_SAME,
        ring_sizes=(1, 4, 8, 16),
        alias="RingDilatedV2",
    ),
    Variant(
        "RingDilatedAttentionProduction",
        DilatedAttention,
        RING,
        there=_CHUNKED,
        here=_SAME,
        ring_sizes=(1, 4, 8, 16),
        alias="Production",
    ),
    Variant(
        "StandardRingAttention", DilatedAttention, RING, there=_DENSE, here=_SAME, ring_sizes=(1,)
    ),
    Variant(
        "DistributedRingAttention",
        DilatedAttention,
        DISTRIBUTED,
        there=_DENSE,
        here=_SAME,
        ring_sizes=(1,),
    ),
    Variant(
        "HilbertRingAttention",
        HilbertDilatedAttention,
        RING,
        there="dense attention between a permutation and its inverse; causal leaks, being applied "
        "in the permuted order",
        here=f"{_SAME}, causal by original positions",
        ring_sizes=(1,),
    ),
    Variant(
        "BlockSparseRingDilatedAttention",
        BlockSparseAttention,
        RING,
        there="a softmax per tile, summed: the weights of a row add up to 3 to 6; "
        "sparsity_ratio ignored (0.9 is 0.95); no ring",
        here=_BLOCKS,
        sparsities=(0.95,),
    ),
    Variant(
        "BlockSparseRingMultiheadDilatedAttention",
        BlockSparseAttention,
        RING,
        there="projections around its BlockSparseRingDilatedAttention",
        here=f"projections around {_BLOCKS}",
        multihead=True,
        sparsities=(0.95,),
    ),
    Variant(
        "BlockSparseRingAttention",
        BlockSparseAttention,
        RING,
        there="an N x N mask; at 512 tokens 62% of the rows are NaN",
        here=_BLOCKS,
        ring_sizes=(1,),
        sparsities=(0.9,),
    ),
    Variant(
        "BlockSparse_LocalWindow",
        BlockSparseAttention,
        SINGLE,
        there="its BlockSparseRingDilatedAttention with a local pattern: weights of a row add up "
        "to 3 to 6, and 0.9 is 0.95",
        here=_WINDOW,
        sparsities=(0.9, 0.95),
    ),
)


def rows() -> list[dict[str, str]]:
    """The table for printing, one dict of strings per system."""
    table = []
    for row in TABLE:
        program = row.program
        if row.multihead:
            program = f"projections around {program}"
        table.append(
            {
                "name": row.name,
                "also": row.alias or "",
                "program": program,
                "execution": row.execution,
                "ring sizes": ", ".join(map(str, row.ring_sizes)),
                "sparsity": ", ".join(map(str, row.sparsities)),
                "there": row.there,
                "here": row.here,
            }
        )
    return table
