"""The reports' attention modules beside LongNet's: Hilbert order, block-sparse, rings."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from .. import arguments
from ..modules import Attention, DilatedAttention
from ..orders import hilbert
from ..programs import KINDS, PerLength, Program, block_sparse, builder
from ..ring.rings import Ring

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
    """The program in Hilbert order, if its tokens form a grid."""
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
    if rows == 1 or columns > _MOST_OBLONG * rows:
        return None
    return rows, columns


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
        is_number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
        if not is_number or not 0 <= sparsity < 1:
            raise ValueError(
                "sparsity must be a number in [0, 1), the share of pairs left out; "
                f"got {sparsity!r}. Density 0.1 is sparsity 0.9"
            )
        arguments.choice("kind", kind, KINDS)
        # 1 - 0.9 is 0.0999...: twelve digits are what the user wrote.
        density = round(1 - sparsity, 12)
        if kind == "dilated":
            block_sparse(density, kind, block)  # raises: it is defined for certain densities only
        settings = (density, kind, arguments.integer("block", block, 1))
        programs: dict[bool, Program | PerLength] = {}
        for is_causal in (False, True):
            programs[is_causal] = PerLength(block_sparse_at, (*settings, is_causal))
        super().__init__(programs, softmax_scale, attention_dropout, lowering, ring)
        self.sparsity, self.kind, self.block = float(sparsity), kind, block

    def extra_repr(self) -> str:
        """The program's arguments."""
        program = f"sparsity={self.sparsity}, kind={self.kind!r}, block={self.block}"
        return ", ".join([program, *self._options()])


@builder
def block_sparse_at(density: float, kind: str, block: int, is_causal: bool, tokens: int) -> Program:
    """The block-sparse program with this density of pairs, for this many tokens."""
    return block_sparse(density, kind, block, tokens, causal=is_causal)


class RingAttention(nn.Module):
    """An attention computed by a ring of devices, of any size.

    execution: "ring", all devices simulated one after the other in this process, or "distributed
        ring", one process of torch.distributed per device with a contiguous shard of the tokens.
    ring_size: number of devices; 1 for no ring.
    """

    def __init__(self, name: str, execution: str, ring_size: int, attention: Attention) -> None:
        super().__init__()
        self.name, self.execution, self.ring_size = name, execution, ring_size
        self.attention = attention

    def program(self, tokens: int, is_causal: bool = False) -> Program:
        """The program of a call.

        tokens: on all devices together.
        """
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
        out: Tensor = self.attention(query, key, value, is_causal, key_padding_mask)
        return out

    def extra_repr(self) -> str:
        """The arguments that the attention does not print."""
        return f"{self.name!r}, execution={self.execution!r}, ring_size={self.ring_size}"
