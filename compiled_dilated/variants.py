"""The attention systems of the LongNet fork's benchmark reports: name -> program + execution.

    variant("RingDilatedAttention", segment_lengths=(2048, 4096), dilation_rates=(1, 2), ring_size=4)
    variant("RingDilatedAttentionV2_r8", ...)    the reports' spelling of ring_size=8
    variant("BlockSparse_LocalWindow_0.95")      ... and of sparsity=0.95

A variant computes what the system of its name is meant to, exactly and for every ring size. The
table notes what the fork's own code computed.
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

# Columns per row of a grid beyond which a Hilbert curve gains no locality.
_MOST_OBLONG = 4


class HilbertDilatedAttention(DilatedAttention):
    """`DilatedAttention` computed in Hilbert order: the same result with other tiles.

    The N tokens are the cells of the most nearly square grid of N cells, row by row. If that grid
    is more than 4 times as wide as high, as for a prime N, tokens keep their order.
    """

    @staticmethod
    def _ordered(program: Program) -> PerLength:
        return PerLength(in_hilbert_order, (program,))


@builder
def in_hilbert_order(program: Program, tokens: int) -> Program:
    """The program with its branches in Hilbert order if the tokens form a grid."""
    grid = hilbert_grid(tokens)
    if grid is None:
        return program
    return Program(tuple(replace(branch, order=hilbert(*grid)) for branch in program.branches))


def hilbert_grid(tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of the most nearly square grid of this many cells.

    None if it is more than 4 times as wide as high.

    >>> hilbert_grid(4096), hilbert_grid(130), hilbert_grid(37)
    ((64, 64), (10, 13), None)
    """
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    columns = tokens // rows
    return (rows, columns) if rows > 1 and columns <= _MOST_OBLONG * rows else None


class BlockSparseAttention(Attention):
    """Attention by `block_sparse` with density 1 - sparsity.

    sparsity: share of pairs left out, in [0, 1).
    kind, block: as in `block_sparse`, which raises for lengths that are too short for a kind.
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
        if (
            isinstance(sparsity, bool)
            or not isinstance(
                sparsity,
                (int, float),
            )
            or not 0 <= sparsity < 1
        ):
            raise ValueError(
                f"sparsity must be a number in [0, 1), the share of pairs left out; got {sparsity!r}. Density 0.1 is sparsity 0.9"
            )
        arguments.choice("kind", kind, KINDS)
        # 1 - 0.9 is 0.0999...: twelve digits are what the user wrote.
        density = round(1 - sparsity, 12)
        if kind == "dilated":
            block_sparse(density, kind, block)  # raises: it is defined for certain densities only
        settings = (density, kind, arguments.integer("block", block, 1))
        programs = {
            is_causal: PerLength(
                block_sparse_at,
                (*settings, is_causal),
            )
            for is_causal in (False, True)
        }
        super().__init__(programs, softmax_scale, attention_dropout, lowering, ring)
        self.sparsity, self.kind, self.block = float(sparsity), kind, block

    def extra_repr(self) -> str:
        """The program's arguments."""
        return ", ".join(
            [f"sparsity={self.sparsity}, kind={self.kind!r}, block={self.block}", *self._options()],
        )


@builder
def block_sparse_at(density: float, kind: str, block: int, is_causal: bool, tokens: int) -> Program:
    """The block-sparse program with this density of pairs, for this many tokens."""
    return block_sparse(density, kind, block, tokens, causal=is_causal)


class RingAttention(nn.Module):
    """An attention computed by a ring of devices; the result is the same for every ring size.

    execution: "ring", all devices simulated one after the other in this process, or "distributed
        ring", one process of torch.distributed per device with a contiguous shard of the tokens.
    ring_size: number of devices; 1 for no ring.
    """

    def __init__(self, name: str, execution: str, ring_size: int, attention: Attention) -> None:
        super().__init__()
        self.name, self.execution, self.ring_size, self.attention = (
            name,
            execution,
            ring_size,
            attention,
        )

    def program(self, tokens: int, is_causal: bool = False) -> Program:
        """The program of a call with this many tokens on all devices together."""
        return self.attention.program(tokens, is_causal)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Call the attention; arguments and result are those of `Attention.forward`."""
        out: Tensor = self.attention(
            query,
            key,
            value,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
        )
        return out

    def extra_repr(self) -> str:
        """The arguments that the attention does not print."""
        return f"{self.name!r}, execution={self.execution!r}, ring_size={self.ring_size}"


def _ring(execution: str, ring_size: object) -> Ring | None:
    """The ring of an execution; None for one device."""
    size = arguments.integer("ring_size", ring_size, 1)
    if size == 1:
        return None
    if execution == DISTRIBUTED:
        return Ring(size, "contiguous", Distributed())
    return Ring(size)


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
    there: what the fork's system of this name computed.
    here: what this variant computes.
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
        """Its names in the reports: name and alias, with every suffix of ring size or sparsity."""
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
_BLOCKS = "a window that holds the stated share of all pairs, one softmax; the same numbers for every ring size"
_CHUNKED = "in one process no attention crosses the chunks that q, k and v are cut into; causal leaks; 16K tokens, ring 16: all zeros"

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

_BY_NAME = {
    spelling: row for row in TABLE for spelling in (row.name, row.alias) if spelling is not None
}


def find(name: str) -> tuple[Variant, dict[str, Any]]:
    """The row of a name, and the arguments in its suffix.

    ring_size for "_r8", sparsity for "_0.95".

    Raises ValueError for an unknown name, with similar ones.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"the name of a variant must be a string; got {type(name).__name__} {name!r}",
        )
    if name in _BY_NAME:
        return _BY_NAME[name], {}
    with_ring_size = re.fullmatch(r"(.+)_r([0-9]{1,9})", name)
    if with_ring_size:
        row = _BY_NAME.get(with_ring_size[1])
        if row is not None and row.execution != SINGLE:
            return row, {"ring_size": int(with_ring_size[2])}
    with_sparsity = re.fullmatch(r"(.+)_(0?\.[0-9]+)", name)
    if with_sparsity:
        row = _BY_NAME.get(with_sparsity[1])
        if row is not None and row.sparsities:
            return row, {"sparsity": float(with_sparsity[2])}
    names = [spelling for row in TABLE for spelling in row.names]
    similar = difflib.get_close_matches(name, names, n=3)
    if similar:
        raise ValueError(f"no variant is named {name!r}; close to it are {', '.join(similar)}")
    raise ValueError(f"no variant is named {name!r}; there are {', '.join(_BY_NAME)}")


def variant(name: str, **kwargs: Any) -> nn.Module:
    """A system of the benchmark reports as a module.

    It maps (B, N, H, D) to (B, N, H, D); a multihead one (B, N, E) to (B, N, E).

    name: of the table, with "_r8" for ring_size=8 or "_0.95" for sparsity=0.95.
    kwargs: of the program (segment_lengths and dilation_rates, or sparsity, kind and block),
        softmax_scale, lowering; ring_size for a ring; embed_dim, num_heads and the other arguments
        of `Multihead` for a multihead name.

    A distributed ring runs in processes of torch.distributed, as torchrun starts them; other rings
    run in this process.

    Raises ValueError for an unknown name, with similar ones, and TypeError for unknown or missing
    arguments.

    >>> variant("BlockSparse_LocalWindow_0.95")(q, k, v).shape == q.shape
    True
    """
    row, stated = find(name)
    for argument, value in stated.items():
        if kwargs.setdefault(argument, value) != value:
            raise ValueError(
                f"the name {name!r} says {argument}={value}; got {argument}={kwargs[argument]!r}. Use the name {row.name!r}"
            )
    _check_arguments(name, row, kwargs)
    if row.sparsities:
        kwargs.setdefault("sparsity", row.sparsities[0])
    ring_size = kwargs.pop("ring_size", 1)
    # The attention's own arguments; the others are of the projections around it.
    settings = {}
    for parameter in inspect.signature(row.attention).parameters:
        if parameter in kwargs:
            settings[parameter] = kwargs.pop(parameter)
    module: nn.Module = row.attention(**settings, ring=_ring(row.execution, ring_size))
    if row.execution != SINGLE:
        assert isinstance(module, Attention)
        module = RingAttention(row.name, row.execution, ring_size, module)
    return Multihead(module, **kwargs) if row.multihead else module


def _check_arguments(name: str, row: Variant, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for unknown and missing arguments."""
    is_required = row.takes
    unknown = [argument for argument in kwargs if argument not in is_required]
    missing = []
    for argument, required in is_required.items():
        if required and argument not in kwargs:
            missing.append(argument)
    mistakes = []
    if unknown:
        mistakes.append(f"takes no {', '.join(unknown)}")
    if missing:
        mistakes.append(f"needs {', '.join(missing)}")
    if mistakes:
        raise TypeError(
            f"variant {name!r} {' and '.join(mistakes)}. Its arguments are {', '.join(is_required)}",
        )


def rows() -> list[dict[str, str]]:
    """The table for printing, one dict of strings per system."""
    table = []
    for row in TABLE:
        program = f"projections around {row.program}" if row.multihead else row.program
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
