"""The one table of cases: programs over every kind of mask, order and branch, at ragged lengths.

Tests and benchmarks draw from it.

    case = by_name("window"); program, inputs = case.program(129), case.inputs(129, torch.float64)

A case says how to build its program for n positions, so that grids can fit n and tables can reach its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.masks import Mask

# One token, two, around a power of two, and a prime that is more than one tile of every lowering
# and divisible by no segment or rate.
LENGTHS = (1, 2, 127, 128, 129, 331)
BATCH, HEAD_DIM = 2, 8
# On a CPU auto is the native kernel; with COMPILED_DILATED_NATIVE=off it is what a machine without a compiler has.
LOWERINGS = ("auto", "dense", "strided", "tiled")

DataOf = Callable[[int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) as leaves, the data tensors, and what flows back."""

    q: Tensor
    k: Tensor
    v: Tensor
    data: dict[str, Tensor]
    grad_out: Tensor
    grad_lse: Tensor


@dataclass(frozen=True)
class Case:
    """A program and the shapes that it is tried at.

    program: of the number of positions. refused: what the strided lowering says when it refuses the case, at every length;
    None where it computes it. crossed: whether it also makes sense where queries and keys are not the same tokens (an order does
    not).
    """

    name: str
    program: Callable[[int], Program | Mask]
    refused: str | None = "is not made of regular blocks"
    heads: int = 4
    kv_heads: int = 2
    value_dim: int = HEAD_DIM
    lengths: tuple[int, ...] = LENGTHS
    data: DataOf | None = field(default=None, repr=False)
    crossed: bool = True

    def inputs(
        self, n: int, dtype: torch.dtype, q_len: int | None = None, kv_len: int | None = None
    ) -> Inputs:
        """Random inputs, the same at every call; q_len and kv_len tokens out of n positions (default: all)."""
        q_len, kv_len = n if q_len is None else q_len, n if kv_len is None else kv_len
        generator = torch.Generator().manual_seed(n)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        q = normal(BATCH, self.heads, q_len, HEAD_DIM)
        k, v = (
            normal(BATCH, self.kv_heads, kv_len, HEAD_DIM),
            normal(BATCH, self.kv_heads, kv_len, self.value_dim),
        )
        grad_out, grad_lse = (
            normal(BATCH, self.heads, q_len, self.value_dim),
            normal(BATCH, self.heads, q_len),
        )
        q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
        data = {} if self.data is None else self.data(BATCH, n)
        return Inputs(
            q,
            k,
            v,
            data,
            grad_out.to(dtype),
            grad_lse.to(torch.promote_types(dtype, torch.float32)),
        )

    def __str__(self) -> str:
        return self.name


def grid_of(n: int, axes: int = 2) -> tuple[int, ...]:
    """A grid of n cells, as near to a square or a cube as the divisors of n allow; a prime makes a line."""
    if axes == 1:
        return (n,)
    size = max(each for each in range(1, n + 1) if n % each == 0 and each**axes <= n)
    return (size, *grid_of(n // size, axes - 1))


def document_ids(batch: int, n: int) -> dict[str, Tensor]:
    """Documents of about 40 tokens; the second batch entry has others, and one that comes back after a while."""
    at = torch.arange(n)
    return {"documents": torch.stack([at // 40, (at + 13) // 37 % 3][:batch])}


def some_padding(batch: int, n: int) -> dict[str, Tensor]:
    """A padded end in the first batch entry; holes, the first token among them, in the second."""
    at = torch.arange(n)
    return {"padding": torch.stack([at >= max(1, n - n // 3), at % 3 == 0][:batch])}


def all_padding(batch: int, n: int) -> dict[str, Tensor]:
    """Nothing is left of the first batch entry."""
    return {
        "padding": torch.stack([torch.ones(n, dtype=torch.bool), torch.arange(n) > n // 2][:batch])
    }


def both_data(batch: int, n: int) -> dict[str, Tensor]:
    return document_ids(batch, n) | some_padding(batch, n)


def some_global(batch: int, n: int) -> dict[str, Tensor]:
    """Scattered global tokens, others in the second batch entry."""
    at = torch.arange(n)
    return {"is_global": torch.stack([at % 61 == 5, (at == 0) | (at == n - 1)][:batch])}


def odd_keys(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return ((q + kv) % 3 == 0) | (q == kv)


def head_distance(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return abs(q - kv) <= h * 3


def batch_distance(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return abs(q - kv) <= b * 5 + 1


def checkered(n: int, block: int) -> Mask:
    """Some tiles: a diagonal, a row that sees little, a column that many see; the last row of tiles sees nothing."""
    size = max(1, n // block)
    return masks.tiles(
        [
            (i, j)
            for i in range(size)
            for j in range(size)
            if j in (i, (i * 5) % size) or (j == 0 and i % 2)
        ],
        block,
    )


def random_blocks(n: int, block: int) -> Mask:
    """Three random blocks a row, as far as there are so many."""
    return masks.random_blocks(block, min(3, -(-n // block)), n, seed=7)


def grid_within(n: int, axes: int = 2) -> tuple[tuple[int, ...], int]:
    """A grid, and where it starts, with two tokens before it and one after it where there are so many."""
    cells = max(1, n - 3)
    return grid_of(cells, axes), min(2, n - cells)


def window_within(n: int) -> Program:
    """A neighbourhood of such a grid in Hilbert order, and what the tokens beside the grid see."""
    grid, offset = grid_within(n)
    mask = masks.neighborhood(grid, 3, offset=offset) | masks.global_tokens(offset)
    return in_order(mask, orders.hilbert(*grid, offset=offset))


def in_order(mask: Mask, order: orders.Order) -> Program:
    return Program((Branch(mask, order=order),))


def _regular(name: str, program: Callable[[int], Program | Mask], **options: Any) -> Case:
    """A case that the strided lowering computes."""
    return Case(name, program, None, **options)


_MASKS = (
    _regular("full", lambda n: masks.full()),
    _regular("causal", lambda n: masks.causal()),
    Case("window", lambda n: masks.window(9)),
    Case("window wide", lambda n: masks.window(100)),
    Case("window wider than the sequence", lambda n: masks.window(10**6)),
    Case("window self", lambda n: masks.window(0)),
    Case("window back", lambda n: masks.window(17, 0)),
    Case("window ahead", lambda n: masks.window(0, 17)),
    Case("window asymmetric", lambda n: masks.window(30, 3)),
    Case("window dilated", lambda n: masks.window(24, dilation=3)),
    Case("window dilated, reach no multiple", lambda n: masks.window(22, 7, dilation=5)),
    Case("window causal", lambda n: masks.window(40) & masks.causal()),
    Case("window dilated causal", lambda n: masks.causal() & masks.window(40, dilation=4)),
    Case("windows of two dilations", lambda n: masks.window(40, dilation=2) & masks.window(60, 20, dilation=3)),
    _regular("segments", lambda n: masks.segments(50)),
    _regular("segments of one", lambda n: masks.segments(1)),
    _regular("segments causal", lambda n: masks.segments(64) & masks.causal()),
    _regular("segments in segments", lambda n: masks.segments(20) & masks.segments(60)),
    Case("segments across segments", lambda n: masks.segments(20) & masks.segments(30), "do not divide each other"),
    Case("segments window", lambda n: masks.segments(48) & masks.window(7, 5)),
    Case("segments window causal", lambda n: masks.segments(48) & masks.window(20) & masks.causal()),
    _regular("congruent", lambda n: masks.congruent(4, 1)),
    _regular("congruent causal", lambda n: masks.congruent(3, 2) & masks.causal()),
    _regular("congruent per head", lambda n: masks.congruent(3, (0, 2, 1, 1))),
    _regular("congruent cyclic", lambda n: masks.congruent(3, "cyclic")),
    _regular("congruent grouped", lambda n: masks.congruent(3, "grouped")),
    Case("congruent window", lambda n: masks.congruent(3, 1) & masks.window(31)),
    Case("congruent window dilated", lambda n: masks.congruent(4, 1) & masks.window(60, dilation=6)),
    _regular("congruent in segments", lambda n: masks.congruent(5, 2, period=32) & masks.segments(32)),
    Case("congruent with a short period", lambda n: masks.congruent(5, 2, period=32), "starts anew where no segment does"),
    Case("congruent across segments", lambda n: masks.congruent(5, 2) & masks.segments(32), "at another residue"),
    Case("congruent twice", lambda n: masks.congruent(2, 1) & masks.congruent(3, 1), "more than one congruent"),
    Case("documents by lengths", lambda n: masks.documents(lengths=(3, 60, 1, 0, 40, 25, 200))),
    Case("documents by lengths, causal", lambda n: masks.documents(lengths=(70, 60)) & masks.causal()),
    Case("documents by lengths, window", lambda n: masks.documents(lengths=(70, 60)) & masks.window(9, dilation=2)),
    Case("documents of one token", lambda n: masks.documents(lengths=(1,) * 300)),
    Case("documents by ids", lambda n: masks.documents(ids="documents"), data=document_ids),
    Case("documents by ids, causal", lambda n: masks.documents(ids="documents") & masks.causal(), data=document_ids),
    Case("padding", lambda n: masks.padding(), data=some_padding),
    Case("padding of everything", lambda n: masks.padding(), data=all_padding),
    Case("padding causal", lambda n: masks.padding() & masks.causal(), data=some_padding),
    Case("padding window", lambda n: masks.padding() & masks.window(11), data=some_padding),
    Case("padding and documents", lambda n: masks.documents(ids="documents") & masks.padding(), data=both_data),
    Case("padding alone, in segments", lambda n: ~masks.padding() & masks.segments(60), data=some_padding),
    Case("sinks", lambda n: masks.sinks(3)),
    Case("no sinks", lambda n: masks.sinks(0)),
    Case("prefix", lambda n: masks.prefix(70)),
    Case("global tokens", lambda n: masks.global_tokens(5)),
    Case("global positions", lambda n: masks.global_tokens(positions=(0, 17, 18, 130, 900))),
    Case("many global positions", lambda n: masks.global_tokens(positions=range(3, 400, 9))),
    Case("global tokens by data", lambda n: masks.global_tokens(data="is_global"), data=some_global),
    Case("global tokens by data, causal",
        lambda n: masks.global_tokens(data="is_global") & masks.causal(), data=some_global,
    ),
    Case("block window", lambda n: masks.block_window(16, 1, 2)),
    Case("random blocks", lambda n: random_blocks(n, 16)),
    Case("dilated blocks", lambda n: masks.dilated_blocks(16, 3)),
    Case("tiles", lambda n: checkered(n, 16)),
    Case("from_mod", lambda n: masks.from_mod(odd_keys)),
    Case("from_mod within", lambda n: masks.from_mod(odd_keys, within=masks.window(50))),
    Case("from_mod per head", lambda n: masks.from_mod(head_distance)),
    Case("from_mod per batch entry", lambda n: masks.from_mod(batch_distance, within=masks.window(40))),
)  # fmt: skip

_GRIDS = (
    Case("neighborhood of a line", lambda n: masks.neighborhood((n,), 11)),
    Case("neighborhood of a line, shifted", lambda n: masks.neighborhood((n,), 11, edges="shift")),
    Case("neighborhood", lambda n: masks.neighborhood(grid_of(n), (2, 3))),
    Case("neighborhood shifted", lambda n: masks.neighborhood(grid_of(n), 2, edges="shift")),
    Case("neighborhood dilated", lambda n: masks.neighborhood(grid_of(n), (1, 3), dilation=(1, 3))),
    Case(
        "neighborhood dilated, shifted",
        lambda n: masks.neighborhood(grid_of(n), 1, dilation=(1, 3), edges="shift"),
    ),
    Case("neighborhood causal", lambda n: masks.neighborhood(grid_of(n), 3, causal=True)),
    Case(
        "neighborhood causal along one axis, shifted",
        lambda n: masks.neighborhood(grid_of(n), 2, causal=(True, False), edges="shift"),
    ),
    Case("neighborhood of a volume", lambda n: masks.neighborhood(grid_of(n, 3), (1, 2, 3))),
    Case(
        "neighborhood of a volume, shifted",
        lambda n: masks.neighborhood(grid_of(n, 3), (1, 1, 4), dilation=(1, 1, 2), edges="shift"),
    ),
    Case(
        "neighborhood and causal tokens",
        lambda n: masks.neighborhood(grid_of(n), 3) & masks.causal(),
    ),
    Case(
        "neighborhood and segments",
        lambda n: masks.neighborhood(grid_of(n), 3) & masks.segments(50),
    ),
    Case("neighborhood of a part of its grid", lambda n: masks.neighborhood((16, n // 16 + 3), 3)),
    Case(
        "neighborhood of some lines of its grid",
        lambda n: masks.neighborhood((n + 4, math.gcd(n, 12)), 3),
    ),
    Case("neighborhood within", lambda n: masks.neighborhood(grid_within(n)[0], (2, 3), offset=2)),
    Case(
        "neighborhood within, of a volume, shifted and dilated",
        lambda n: masks.neighborhood(
            grid_within(n, 3)[0], 1, dilation=(1, 1, 2), edges="shift", offset=1
        ),
    ),
    Case(
        "neighborhood at the front",
        lambda n: masks.neighborhood((7, 5), 2, causal=(True, False), offset=0),
    ),
    Case("neighborhood beyond the end", lambda n: masks.neighborhood((40, 40), 3, offset=n // 2)),
)

_COMPOSED = (
    Case("causal or prefix", lambda n: masks.causal() | masks.prefix(20)),
    Case("window or sinks", lambda n: masks.window(12) | masks.sinks(4)),
    Case("causal and window or sinks", lambda n: masks.causal() & (masks.window(33) | masks.sinks(4))),
    Case("window or global tokens", lambda n: masks.window(6) | masks.global_tokens(3)),
    Case("window or global positions", lambda n: masks.window(6) | masks.global_tokens(positions=(3, 77))),
    Case("window or global tokens by data",
        lambda n: masks.window(6) | masks.global_tokens(data="is_global"), data=some_global,
    ),
    Case("neighborhood within or global tokens",
        lambda n: masks.neighborhood(grid_within(n)[0], 2, offset=2) | masks.global_tokens(2),
    ),
    Case("random blocks and causal", lambda n: random_blocks(n, 8) & masks.causal()),
    Case("window or dilated window", lambda n: masks.window(5) | masks.window(60, dilation=10)),
    Case("not causal", lambda n: ~masks.causal()),
    Case("not window", lambda n: ~masks.window(30)),
    Case("not segments, causal", lambda n: ~masks.segments(16) & masks.causal()),
    Case("not congruent", lambda n: ~masks.congruent(3, 1) & masks.window(20)),
    Case("causal less a window", lambda n: masks.causal() & ~masks.window(10)),
    Case("neither window nor segments", lambda n: ~(masks.window(8) | masks.segments(40)) & masks.causal()),
    Case("not documents", lambda n: ~masks.documents(lengths=(50, 70, 100)) & masks.window(40)),
    Case("nothing", lambda n: masks.full() & ~masks.full()),
    Case("congruent per head or window", lambda n: masks.congruent(4, "cyclic") | masks.window(5)),
    Case("neighborhood or sinks", lambda n: masks.neighborhood(grid_of(n), 2) | masks.sinks(2)),
    Case("tiles in a window", lambda n: checkered(n, 16) & masks.window(25)),
)  # fmt: skip

_PROGRAMS = (
    _regular("longnet", lambda n: cd.longnet((16, 48, 144), (1, 3, 9))),
    _regular("longnet causal", lambda n: cd.longnet((16, 48, 144), (1, 3, 9), causal=True)),
    _regular("longnet grouped", lambda n: cd.longnet((32, 64, 128), (1, 2, 4), offsets="grouped", causal=True)),
    _regular("longnet split", lambda n: cd.longnet((16, 48, 144), (1, 3, 9), heads="split"), heads=8, kv_heads=4),
    _regular("longnet split causal, uneven",
        lambda n: cd.longnet((32, 64, 128), (2, 3, 4), heads="split", causal=True), heads=5, kv_heads=5,
    ),
    _regular("longnet, more branches than heads",
        lambda n: cd.longnet((8, 16, 32), (1, 2, 3), heads="split"), heads=2, kv_heads=1,
    ),
    _regular("longnet, rates that divide nothing",
        lambda n: cd.longnet((30, 50, 100), (4, 7, 3), causal=True), heads=6, kv_heads=2,
    ),
    _regular("longnet, rates that divide nothing, grouped",
        lambda n: cd.longnet((30, 50, 100), (4, 7, 3), offsets="grouped"), heads=6, kv_heads=3,
    ),
    _regular("longnet, a rate above its segment", lambda n: cd.longnet((4, 60), (7, 1)), heads=8, kv_heads=8),
    _regular("longnet of one branch", lambda n: cd.longnet((64,), (2,))),
    Case("local window", lambda n: cd.local_window(21)),
    Case("local window causal, dilated", lambda n: cd.local_window(21, causal=True, dilation=3)),
    Case("local window asymmetric", lambda n: cd.local_window(3, 40)),
    Case("block sparse local", lambda n: cd.block_sparse(0.3, tokens=n)),
    Case("block sparse local causal", lambda n: cd.block_sparse(0.3, tokens=n, causal=True)),
    Case("block sparse global", lambda n: cd.block_sparse(1.0 if n < 40 else 0.3, "global_local", block=4, tokens=n)),
    Case("block sparse dilated", lambda n: cd.block_sparse(0.25, "dilated", block=16)),
    Case("block sparse dilated causal", lambda n: cd.block_sparse(0.25, "dilated", block=16, causal=True)),
    Case("block sparse tiles",
        lambda n: cd.block_sparse(1 / n, "tiles", block=1, tokens=n, tiles=[(i, i) for i in range(n)]),
    ),
    Case("big bird", lambda n: cd.big_bird(16, 16, min(2, -(-n // 16)), 16, n, seed=3)),
    Case("branches of different heads", lambda n: Program((Branch(masks.window(9), (0, 3)), Branch(masks.segments(40), (2, 4))))),
    Case("a head without a branch", lambda n: Program((Branch(masks.window(9), (1, 4)),))),
    Case("rows dead in one branch",
        lambda n: Program((Branch(masks.congruent(4, 1)), Branch(masks.window(3) & ~masks.prefix(10)))),
    ),
    Case("rows dead in the second branch", lambda n: Program((Branch(masks.window(3)), Branch(masks.congruent(4, 1))))),
    _regular("rows dead in every branch",
        lambda n: Program((Branch(masks.congruent(4, 1)), Branch(masks.congruent(4, 2) & masks.causal()))),
    ),
    Case("one mask three times", lambda n: Program((Branch(masks.window(9)),) * 3)),
    Case("masks of unlike lowerings",
        lambda n: Program((Branch(masks.window(9)), Branch(masks.sinks(3)), Branch(checkered(n, 16)))),
    ),
    Case("longnet with padding",
        lambda n: Program((*cd.longnet((16, 48), (1, 3)).branches, Branch(masks.padding()))), data=some_padding,
    ),
    _regular("values wider than keys", lambda n: cd.longnet((16, 48), (1, 3), causal=True), value_dim=12),
    Case("values narrower than keys", lambda n: masks.window(20) | masks.sinks(2), value_dim=5),
    _regular("no shared key heads", lambda n: masks.congruent(3, "cyclic"), heads=3, kv_heads=3),
    _regular("one key head", lambda n: cd.longnet((16, 48), (1, 3)), heads=5, kv_heads=1),
)  # fmt: skip

_ORDERED = (
    Case("hilbert window", lambda n: cd.hilbert_window(grid_of(n), 3), crossed=False),
    Case("hilbert window shifted", lambda n: cd.hilbert_window(grid_of(n), (1, 4), edges="shift"), crossed=False),
    Case("hilbert window of a volume", lambda n: cd.hilbert_window(grid_of(n, 3), 2), crossed=False),
    Case("hilbert window within",
        lambda n: cd.hilbert_window(grid_within(n)[0], 2, offset=grid_within(n)[1]), crossed=False,
    ),
    Case("hilbert window within and global tokens", lambda n: window_within(n), crossed=False),
    _regular("hilbert causal", lambda n: in_order(masks.causal(), orders.hilbert(*grid_of(n))), crossed=False),
    Case("hilbert window and sinks",
        lambda n: in_order(masks.neighborhood(grid_of(n), 2) | masks.sinks(2), orders.hilbert(*grid_of(n))), crossed=False,
    ),
    Case("residue dilated window", lambda n: in_order(masks.window(24, dilation=3), orders.residue(3)), crossed=False),
    _regular("residue longnet branch",
        lambda n: in_order(masks.congruent(4, "cyclic", period=50) & masks.segments(50), orders.residue(4, period=50)),
        crossed=False,
    ),
    Case("branches of different orders", lambda n: Program((
        Branch(masks.window(9), order=orders.residue(5)), Branch(masks.causal()),
        Branch(masks.neighborhood(grid_of(n), 2), (1, 3), orders.hilbert(*grid_of(n))),
    )), crossed=False),
    Case("documents by ids in hilbert order",
        lambda n: in_order(masks.documents(ids="documents"), orders.hilbert(*grid_of(n))), data=document_ids, crossed=False,
    ),
)  # fmt: skip

# Long enough for several tiles of every lowering, and for runs of tiles that are clipped, alike, and clipped again.
_LONG = (
    Case("window, many tiles", lambda n: masks.window(70, 40), lengths=(1103,), heads=2, kv_heads=1),
    Case("window causal, many tiles", lambda n: cd.local_window(70, causal=True), lengths=(1103,), heads=2, kv_heads=1),
    Case("window or sinks, many tiles",
        lambda n: masks.causal() & (masks.window(70) | masks.sinks(4)), lengths=(1103,), heads=2, kv_heads=1,
    ),
    _regular("longnet, many segments",
        lambda n: cd.longnet((64, 128, 256), (1, 2, 4), causal=True), lengths=(1103,), heads=4, kv_heads=1,
    ),
    Case("big bird, many tiles", lambda n: cd.big_bird(64, 32, 2, 32, n), lengths=(1103,), heads=2, kv_heads=1),
    Case("global positions, many tiles",
        lambda n: masks.window(40) | masks.global_tokens(positions=(5, 500, 501, 1102)), lengths=(1103,), heads=2,
        kv_heads=1,
    ),
    Case("neighborhood within, many boxes",
        lambda n: masks.neighborhood((30, 40), 4, offset=1) | masks.global_tokens(1), lengths=(1203,), heads=2,
        kv_heads=1,
    ),
    Case("hilbert window, many boxes",
        lambda n: cd.hilbert_window((30, 40), 4), lengths=(1200,), heads=2, kv_heads=1, crossed=False,
    ),
    Case("neighborhood shifted, many boxes",
        lambda n: masks.neighborhood((30, 40), (2, 5), dilation=(2, 1), edges="shift"), lengths=(1200,), heads=2, kv_heads=1,
    ),
)  # fmt: skip

CASES = (*_MASKS, *_GRIDS, *_COMPOSED, *_PROGRAMS, *_ORDERED, *_LONG)


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
