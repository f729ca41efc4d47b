"""Cases of programs: published ones, branches, orders, and long sequences."""

from __future__ import annotations

from typing import Any

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from tests.support.case import (
    Case,
    ProgramOf,
    checkered,
    document_ids,
    grid_of,
    grid_within,
    in_order,
    regular,
    some_padding,
    window_within,
)


def _ordered(name: str, program: ProgramOf, **options: Any) -> Case:
    """A case of an order, which needs the same queries and keys."""
    return Case(name, program, crossed=False, **options)


def _long(name: str, program: ProgramOf, n: int = 1103, heads: int = 2, **options: Any) -> Case:
    """A case of one length, with few heads."""
    return Case(name, program, lengths=(n,), heads=heads, kv_heads=1, **options)


PROGRAMS = (
    regular("longnet", lambda n: cd.longnet((16, 48, 144), (1, 3, 9))),
    regular("longnet causal", lambda n: cd.longnet((16, 48, 144), (1, 3, 9), causal=True)),
    regular(
        "longnet grouped",
        lambda n: cd.longnet((32, 64, 128), (1, 2, 4), offsets="grouped", causal=True),
    ),
    regular(
        "longnet split",
        lambda n: cd.longnet((16, 48, 144), (1, 3, 9), heads="split"),
        heads=8,
        kv_heads=4,
    ),
    regular(
        "longnet split causal, uneven",
        lambda n: cd.longnet((32, 64, 128), (2, 3, 4), heads="split", causal=True),
        heads=5,
        kv_heads=5,
    ),
    regular(
        "longnet, more branches than heads",
        lambda n: cd.longnet((8, 16, 32), (1, 2, 3), heads="split"),
        heads=2,
        kv_heads=1,
    ),
    regular(
        "longnet, rates that divide nothing",
        lambda n: cd.longnet((30, 50, 100), (4, 7, 3), causal=True),
        heads=6,
        kv_heads=2,
    ),
    regular(
        "longnet, rates that divide nothing, grouped",
        lambda n: cd.longnet((30, 50, 100), (4, 7, 3), offsets="grouped"),
        heads=6,
        kv_heads=3,
    ),
    regular(
        "longnet, a rate above its segment",
        lambda n: cd.longnet((4, 60), (7, 1)),
        heads=8,
        kv_heads=8,
    ),
    regular("longnet of one branch", lambda n: cd.longnet((64,), (2,))),
    Case("local window", lambda n: cd.local_window(21)),
    Case("local window causal, dilated", lambda n: cd.local_window(21, causal=True, dilation=3)),
    Case("local window asymmetric", lambda n: cd.local_window(3, 40)),
    Case("block sparse local", lambda n: cd.block_sparse(0.3, tokens=n)),
    Case("block sparse local causal", lambda n: cd.block_sparse(0.3, tokens=n, causal=True)),
    Case(
        "block sparse global",
        lambda n: cd.block_sparse(1.0 if n < 40 else 0.3, "global_local", block=4, tokens=n),
    ),
    Case("block sparse dilated", lambda n: cd.block_sparse(0.25, "dilated", block=16)),
    Case(
        "block sparse dilated causal",
        lambda n: cd.block_sparse(0.25, "dilated", block=16, causal=True),
    ),
    Case(
        "block sparse tiles",
        lambda n: cd.block_sparse(
            1 / n, "tiles", block=1, tokens=n, tiles=[(i, i) for i in range(n)]
        ),
    ),
    Case("big bird", lambda n: cd.big_bird(16, 16, min(2, -(-n // 16)), 16, n, seed=3)),
    Case(
        "branches of different heads",
        lambda n: Program((Branch(masks.window(9), (0, 3)), Branch(masks.segments(40), (2, 4)))),
    ),
    Case("a head without a branch", lambda n: Program((Branch(masks.window(9), (1, 4)),))),
    Case(
        "rows dead in one branch",
        lambda n: Program(
            (Branch(masks.congruent(4, 1)), Branch(masks.window(3) & ~masks.prefix(10)))
        ),
    ),
    Case(
        "rows dead in the second branch",
        lambda n: Program((Branch(masks.window(3)), Branch(masks.congruent(4, 1)))),
    ),
    regular(
        "rows dead in every branch",
        lambda n: Program(
            (Branch(masks.congruent(4, 1)), Branch(masks.congruent(4, 2) & masks.causal()))
        ),
    ),
    Case("one mask three times", lambda n: Program((Branch(masks.window(9)),) * 3)),
    Case(
        "masks of unlike lowerings",
        lambda n: Program(
            (Branch(masks.window(9)), Branch(masks.sinks(3)), Branch(checkered(n, 16)))
        ),
    ),
    Case(
        "longnet with padding",
        lambda n: Program((*cd.longnet((16, 48), (1, 3)).branches, Branch(masks.padding()))),
        data=some_padding,
    ),
    regular(
        "values wider than keys", lambda n: cd.longnet((16, 48), (1, 3), causal=True), value_dim=12
    ),
    Case("values narrower than keys", lambda n: masks.window(20) | masks.sinks(2), value_dim=5),
    regular("no shared key heads", lambda n: masks.congruent(3, "cyclic"), heads=3, kv_heads=3),
    regular("one key head", lambda n: cd.longnet((16, 48), (1, 3)), heads=5, kv_heads=1),
)

ORDERED = (
    _ordered("hilbert window", lambda n: cd.hilbert_window(grid_of(n), 3)),
    _ordered(
        "hilbert window shifted", lambda n: cd.hilbert_window(grid_of(n), (1, 4), edges="shift")
    ),
    _ordered("hilbert window of a volume", lambda n: cd.hilbert_window(grid_of(n, 3), 2)),
    _ordered(
        "hilbert window within",
        lambda n: cd.hilbert_window(grid_within(n)[0], 2, offset=grid_within(n)[1]),
    ),
    _ordered("hilbert window within and global tokens", lambda n: window_within(n)),
    _ordered(
        "hilbert causal",
        lambda n: in_order(masks.causal(), orders.hilbert(*grid_of(n))),
        refused=None,
    ),
    _ordered(
        "hilbert window and sinks",
        lambda n: in_order(
            masks.neighborhood(grid_of(n), 2) | masks.sinks(2), orders.hilbert(*grid_of(n))
        ),
    ),
    _ordered(
        "residue dilated window",
        lambda n: in_order(masks.window(24, dilation=3), orders.residue(3)),
    ),
    _ordered(
        "residue longnet branch",
        lambda n: in_order(
            masks.congruent(4, "cyclic", period=50) & masks.segments(50),
            orders.residue(4, period=50),
        ),
        refused=None,
    ),
    _ordered(
        "branches of different orders",
        lambda n: Program(
            (
                Branch(masks.window(9), order=orders.residue(5)),
                Branch(masks.causal()),
                Branch(masks.neighborhood(grid_of(n), 2), (1, 3), orders.hilbert(*grid_of(n))),
            )
        ),
    ),
    _ordered(
        "documents by ids in hilbert order",
        lambda n: in_order(masks.documents(ids="documents"), orders.hilbert(*grid_of(n))),
        data=document_ids,
    ),
)

# Several tiles of every lowering: runs of equal tiles between clipped ones.
LONG = (
    _long("window, many tiles", lambda n: masks.window(70, 40)),
    _long("window causal, many tiles", lambda n: cd.local_window(70, causal=True)),
    _long(
        "window or sinks, many tiles",
        lambda n: masks.causal() & (masks.window(70) | masks.sinks(4)),
    ),
    _long(
        "longnet, many segments",
        lambda n: cd.longnet((64, 128, 256), (1, 2, 4), causal=True),
        refused=None,
        heads=4,
    ),
    _long("big bird, many tiles", lambda n: cd.big_bird(64, 32, 2, 32, n)),
    _long(
        "global positions, many tiles",
        lambda n: masks.window(40) | masks.global_tokens(positions=(5, 500, 501, 1102)),
    ),
    _long(
        "neighborhood within, many boxes",
        lambda n: masks.neighborhood((30, 40), 4, offset=1) | masks.global_tokens(1),
        n=1203,
    ),
    _long(
        "hilbert window, many boxes",
        lambda n: cd.hilbert_window((30, 40), 4),
        n=1200,
        crossed=False,
    ),
    _long(
        "neighborhood shifted, many boxes",
        lambda n: masks.neighborhood((30, 40), (2, 5), dilation=(2, 1), edges="shift"),
        n=1200,
    ),
)
