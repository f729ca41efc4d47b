"""Every attention system that the benchmark reports of the LongNet fork name, in one table: name -> program + execution.

    variant("RingDilatedAttention", segment_lengths=(2048, 4096), dilation_rates=(1, 2), ring_size=4)    a module on (B, N, H, D)
    variant("RingDilatedAttentionV2_r8", ...)    the reports' spelling of ring_size=8
    variant("BlockSparse_LocalWindow_0.95")      ... and of sparsity=0.95

Each name stands for what its system is meant to compute, exactly and for every ring size. What the system of that name computed
there is in the table's notes.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from . import arguments
from .modules import Attention, DilatedAttention, Multihead
from .orders import hilbert
from .programs import KINDS, PerLength, Program, block_sparse, builder
from .ring.distributed import Distributed
from .ring.rings import Ring

# A grid this many times as wide as high is no grid for a Hilbert curve.
_MOST_OBLONG = 4


class HilbertDilatedAttention(DilatedAttention):
    """`DilatedAttention` computed in Hilbert order: the same numbers, other tiles. The arguments are its own.

    The N tokens are taken as the cells of the most nearly square grid of N cells, row by row. Where that grid is more than 4
    times as wide as high (N prime, say), a Hilbert curve brings no cells together, and tokens are computed as they come.
    """

    @staticmethod
    def _ordered(program: Program) -> PerLength:
        return PerLength(in_hilbert_order, (program,))


@builder
def in_hilbert_order(program: Program, tokens: int) -> Program:
    """The program with its branches in Hilbert order, where so many tokens form a grid."""
    grid = hilbert_grid(tokens)
    if grid is None:
        return program
    return Program(tuple(replace(branch, order=hilbert(*grid)) for branch in program.branches))


def hilbert_grid(tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of the most nearly square grid of so many cells; None where it is more than 4 times as wide as high.

    >>> hilbert_grid(4096), hilbert_grid(130), hilbert_grid(37)
    ((64, 64), (10, 13), None)
    """
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    columns = tokens // rows
    return (rows, columns) if rows > 1 and columns <= _MOST_OBLONG * rows else None


class BlockSparseAttention(Attention):
    """Attention that leaves out a share `sparsity` of all pairs: `block_sparse` with density 1 - sparsity.

    sparsity: in [0, 1). kind, block: as in `block_sparse`, which also says what lengths are too short for a kind.
    """

    def __init__(
        self,
        sparsity: float,
        kind: str = "local",
        block: int = 64,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        *,
        lowering: str = "auto",
        ring: Ring | None = None,
    ) -> None:
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity must be a number in [0, 1), the share of pairs left out; got {sparsity!r}. Density 0.1 is sparsity 0.9"
            )
        arguments.choice("kind", kind, KINDS)
        # 1 - 0.9 is 0.0999...: twelve digits are what the user wrote.
        density = round(1 - sparsity, 12)
        if kind == "dilated":
            block_sparse(density, kind, block)  # the only kind that asks for certain densities at every length
        settings = (density, kind, arguments.integer("block", block, 1))
        programs = {causal: PerLength(block_sparse_at, (*settings, causal)) for causal in (False, True)}
        super().__init__(programs, softmax_scale, attention_dropout, lowering, ring)
        self.sparsity, self.kind, self.block = float(sparsity), kind, block

    def extra_repr(self) -> str:
        """The program's arguments."""
        return ", ".join([f"sparsity={self.sparsity}, kind={self.kind!r}, block={self.block}", *self._options()])


@builder
def block_sparse_at(density: float, kind: str, block: int, is_causal: bool, tokens: int) -> Program:
    """The block-sparse program that keeps `density` of the pairs of so many tokens."""
    return block_sparse(density, kind, block, tokens, causal=is_causal)


class RingAttention(nn.Module):
    """An attention computed by a ring of `ring_size` devices. A ring of one is the attention itself, on its device.

    execution: "ring", all devices in this process, one after the other, each holding what it may hold and taking every step;
    "distributed ring", one device a process of torch.distributed: each passes its own contiguous share of the tokens.
    program(tokens, is_causal) is the same for every ring size: a ring changes who computes what, never what is computed.
    """

    def __init__(self, name: str, execution: str, ring_size: int, attention: Attention) -> None:
        super().__init__()
        self.name, self.execution, self.ring_size, self.attention = name, execution, ring_size, attention

    def program(self, tokens: int, is_causal: bool = False) -> Program:
        """What a call with so many tokens, all devices together, computes."""
        return self.attention.program(tokens, is_causal)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """As the attention inside."""
        out: Tensor = self.attention(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
        return out

    def extra_repr(self) -> str:
        """What the attention inside does not say."""
        return f"{self.name!r}, execution={self.execution!r}, ring_size={self.ring_size}"


def _ring(execution: str, ring_size: object) -> Ring | None:
    """Who computes; None for one device."""
    size = arguments.integer("ring_size", ring_size, 1)
    if size == 1:
        return None
    return Ring(size, "contiguous", Distributed()) if execution == DISTRIBUTED else Ring(size)


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
    execution: "single", one device; "ring", a ring of devices; "distributed ring", the same over torch.distributed.
    ring_sizes, sparsities: those in the reports; the first sparsity is the default, the default ring size is 1.
    alias: another spelling in the reports.
    there: what the system of this name computed. here: what this one does.
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
        """Every name that the reports use for it: its own, its alias, and both with each ring size or sparsity."""
        spellings = (self.name,) if self.alias is None else (self.name, self.alias)
        suffixes = ("", *(f"_r{size}" for size in self.ring_sizes), *(f"_{sparsity}" for sparsity in self.sparsities))
        return tuple(spelling + suffix for spelling in spellings for suffix in suffixes)

    @property
    def takes(self) -> dict[str, bool]:
        """The keyword arguments that `variant` takes for it: name -> whether it must be given."""
        parameters = {name: each for name, each in inspect.signature(self.attention).parameters.items() if name != "ring"}
        if self.multihead:
            del parameters["attention_dropout"]
            parameters = {
                name: each for name, each in inspect.signature(Multihead).parameters.items() if name != "attention"
            } | parameters
        needed = {name: each.default is inspect.Parameter.empty for name, each in parameters.items()}
        if self.sparsities:
            needed["sparsity"] = False
        return needed if self.execution == SINGLE else needed | {"ring_size": False}


_LONGNET = "the LongNet program, one softmax over all branches"
_SAME = f"{_LONGNET}; the same numbers for every ring size"
_BLOCKS = "a window that holds the stated share of all pairs, one softmax; the same numbers for every ring size"
_CHUNKED = (
    "in one process no attention crosses the chunks that q, k and v are cut into; causal leaks; 16K tokens, ring 16: all zeros"
)

TABLE: tuple[Variant, ...] = (
    Variant(
        "DilatedAttention",
        DilatedAttention,
        SINGLE,
        there="a softmax per branch, their sum divided by the number of branches; rows of no branch 0; softmax_scale ignored",
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
        there="its billion tokens: at most 4 chunks were run, and the tokens multiplied by the ring size",
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
        "StandardRingAttention",
        DilatedAttention,
        RING,
        there="dense attention; wrong on two real ranks, where K and V share one receive buffer",
        here=_SAME,
        ring_sizes=(1,),
    ),
    Variant(
        "DistributedRingAttention",
        DilatedAttention,
        DISTRIBUTED,
        there="dense attention; wrong on two real ranks, where K and V share one receive buffer",
        here=_SAME,
        ring_sizes=(1,),
    ),
    Variant(
        "HilbertRingAttention",
        HilbertDilatedAttention,
        RING,
        there="dense attention between a permutation and its inverse; causal leaks, being applied in the permuted order",
        here=f"{_SAME}, causal by original positions",
        ring_sizes=(1,),
    ),
    Variant(
        "BlockSparseRingDilatedAttention",
        BlockSparseAttention,
        RING,
        there="a softmax per tile, summed: the weights of a row add up to 3 to 6; sparsity_ratio ignored (0.9 is 0.95); no ring",
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
        there="its BlockSparseRingDilatedAttention with a local pattern: weights of a row add up to 3 to 6, and 0.9 is 0.95",
        here="a window that holds the stated share of all pairs, one softmax",
        sparsities=(0.9, 0.95),
    ),
)

_BY_NAME = {spelling: row for row in TABLE for spelling in (row.name, row.alias) if spelling is not None}


def find(name: str) -> tuple[Variant, dict[str, Any]]:
    """The row of a name, and the arguments that its suffix states: ring_size for "_r8", sparsity for "_0.95"."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a variant must be a string; got {type(name).__name__} {name!r}")
    if name in _BY_NAME:
        return _BY_NAME[name], {}
    ring, sparse = re.fullmatch(r"(.+)_r([0-9]{1,9})", name), re.fullmatch(r"(.+)_(0?\.[0-9]+)", name)
    if ring and ring[1] in _BY_NAME and _BY_NAME[ring[1]].execution != SINGLE:
        return _BY_NAME[ring[1]], {"ring_size": int(ring[2])}
    if sparse and sparse[1] in _BY_NAME and _BY_NAME[sparse[1]].sparsities:
        return _BY_NAME[sparse[1]], {"sparsity": float(sparse[2])}
    known = [each for row in TABLE for each in row.names]
    near = difflib.get_close_matches(name, known, n=3)
    raise ValueError(f"no variant is named {name!r}; {'close to it are' if near else 'there are'} {', '.join(near or _BY_NAME)}")


def variant(name: str, **kwargs: Any) -> nn.Module:
    """The system of this name in the reports as a module on (B, N, H, D), or on (B, N, E) where it is a multihead one.

    kwargs: those of the program (segment_lengths and dilation_rates, or sparsity, kind and block), softmax_scale, lowering;
    ring_size where the name means a ring; embed_dim, num_heads and the rest of `Multihead` for a multihead name.
    A distributed ring runs in processes of torch.distributed, as torchrun starts them; other rings in this process.

    Raises ValueError for an unknown name, naming close ones, and TypeError for arguments that the variant does not take or lacks.

    >>> variant("BlockSparse_LocalWindow_0.95")(q, k, v).shape == q.shape
    True
    """
    row, stated = find(name)
    takes = row.takes
    for argument, value in stated.items():
        if kwargs.setdefault(argument, value) != value:
            raise ValueError(
                f"the name {name!r} says {argument}={value}; got {argument}={kwargs[argument]!r}. Use the name {row.name!r}"
            )
    unknown = [argument for argument in kwargs if argument not in takes]
    missing = [argument for argument, needed in takes.items() if needed and argument not in kwargs]
    if unknown or missing:
        wrong = [f"takes no {', '.join(unknown)}"] * bool(unknown) + [f"needs {', '.join(missing)}"] * bool(missing)
        raise TypeError(f"variant {name!r} {' and '.join(wrong)}. Its arguments are {', '.join(takes)}")
    if row.sparsities:
        kwargs.setdefault("sparsity", row.sparsities[0])
    ring_size = kwargs.pop("ring_size", 1)
    settings = {each: kwargs.pop(each) for each in inspect.signature(row.attention).parameters if each in kwargs}
    attention = row.attention(**settings, ring=_ring(row.execution, ring_size))
    module = attention if row.execution == SINGLE else RingAttention(row.name, row.execution, ring_size, attention)
    return Multihead(module, **kwargs) if row.multihead else module


def rows() -> list[dict[str, str]]:
    """The table for printing, one dict of strings per system."""
    return [
        {
            "name": row.name,
            "also": row.alias or "",
            "program": ("projections around " if row.multihead else "") + row.program,
            "execution": row.execution,
            "ring sizes": ", ".join(map(str, row.ring_sizes)),
            "sparsity": ", ".join(map(str, row.sparsities)),
            "there": row.there,
            "here": row.here,
        }
        for row in TABLE
    ]
