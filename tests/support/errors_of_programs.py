"""Rows of bad input: masks, orders, programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders

CAUSAL, WINDOW = masks.causal(), masks.window(4)
IDS, PADDING = masks.documents(ids="ids"), masks.padding("pad")


def x(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*(shape or (2, 4, 8, 4)), **options)


def attend(
    program: Any = CAUSAL,
    q: Any = None,
    k: Any = None,
    v: Any = None,
    lowering: str = "auto",
    **options: Any,
) -> Any:
    q = x() if q is None else q
    k = x() if k is None else k
    return cd.compile(program, lowering=lowering)(q, k, k if v is None else v, **options)


Row = tuple[Callable[[], Any], type[Exception], str]
MASKS: list[Row] = [
    (lambda: masks.window(-1), ValueError, "left must be at least 0; got -1"),
    (lambda: masks.window(1.5), TypeError, "left must be an integer; got float 1.5"),
    (lambda: masks.window(True), TypeError, "left must be an integer; got bool True"),
    (
        lambda: masks.window("8"),
        TypeError,
        "left must be an integer; got str '8'. Pass a whole number of tokens",
    ),
    (lambda: masks.window(4, -2), ValueError, "right must be at least 0; got -2"),
    (lambda: masks.window(4, dilation=0), ValueError, "dilation must be at least 1; got 0"),
    (lambda: masks.window(np.float64(2)), TypeError, "left must be an integer; got float64"),
    (lambda: masks.segments(0), ValueError, "length must be at least 1; got 0"),
    (lambda: masks.congruent(0), ValueError, "modulus must be at least 1; got 0"),
    (lambda: masks.congruent(4, 4), ValueError, "offset must be below the modulus 4; got 4"),
    (
        lambda: masks.congruent(4, (0, 7)),
        ValueError,
        "offset must be below the modulus 4; got (0, 7)",
    ),
    (
        lambda: masks.congruent(4, "random"),
        ValueError,
        "offset must be one of 'cyclic', 'grouped'; got 'random'",
    ),
    (lambda: masks.congruent(4, ()), ValueError, "offset is empty; pass at least one integer"),
    (lambda: masks.congruent(4, 1, period=0), ValueError, "period must be at least 1; got 0"),
    (
        lambda: masks.documents(),
        ValueError,
        "documents needs either ids (the name of a data tensor) or lengths",
    ),
    (lambda: masks.documents(ids="a", lengths=(1,)), ValueError, "got ids='a', lengths=(1,)"),
    (
        lambda: masks.documents(ids=torch.zeros(4)),
        TypeError,
        "ids must be the name of a data tensor; got Tensor",
    ),
    (lambda: masks.documents(lengths=(3, -1)), ValueError, "lengths[1] must be at least 0; got -1"),
    (
        lambda: masks.documents(lengths=7),
        TypeError,
        "lengths must be a sequence of integers; got int 7. Write a tuple, as in (7,)",
    ),
    (
        lambda: masks.padding(torch.zeros(4)),
        TypeError,
        "Pass the tensor itself as data={...} at the call",
    ),
    (lambda: masks.sinks(-4), ValueError, "count must be at least 0; got -4"),
    (lambda: masks.prefix(None), TypeError, "count must be an integer; got NoneType None"),
    (lambda: masks.global_tokens(2.0), TypeError, "count must be an integer; got float 2.0"),
    (lambda: masks.dilated_blocks(0, 2), ValueError, "block must be at least 1; got 0"),
    (lambda: masks.dilated_blocks(4, 0), ValueError, "stride must be at least 1; got 0"),
    (
        lambda: masks.neighborhood((4, 4, 4, 4), 1),
        ValueError,
        "grid must have 1 to 3 axes; got (4, 4, 4, 4)",
    ),
    (
        lambda: masks.neighborhood(16, 1),
        TypeError,
        "grid must be a sequence of integers; got int 16",
    ),
    (
        lambda: masks.neighborhood((4, 4), (1, 1, 1)),
        ValueError,
        "radius must be one number or one per axis of the grid (4, 4)",
    ),
    (lambda: masks.neighborhood((4, 4), -1), ValueError, "radius[0] must be at least 0; got -1"),
    (
        lambda: masks.neighborhood((4, 4), 1, causal=(True,)),
        ValueError,
        "causal must be a bool or one bool per axis",
    ),
    (lambda: masks.neighborhood((4, 4), 1, causal=1), ValueError, "of the grid (4, 4); got 1"),
    (
        lambda: masks.neighborhood((4, 4), 1, edges="wrap"),
        ValueError,
        "edges must be one of 'cut', 'shift'; got 'wrap'",
    ),
    (lambda: masks.tiles("ab"), TypeError, "pairs must be (query tile, key tile) pairs; got str"),
    (
        lambda: masks.tiles([(0, 1, 2)]),
        ValueError,
        "every tile must be a (query tile, key tile) pair",
    ),
    (lambda: masks.tiles([(0, -1)]), ValueError, "must be at least 0; got -1"),
    (lambda: masks.tiles([(0, 3)], columns=2), ValueError, "columns must be at least 4; got 2"),
    (
        lambda: masks.tiles([(0, 0)], block=1, columns=2**60),
        ValueError,
        "columns must be at most 1,073,741,823 for tiles of 1 tokens; got 1,152,921,504,606",
    ),
    (
        lambda: masks.from_mod(7),
        TypeError,
        "fn must be a function of (b, h, q_idx, kv_idx); got int 7",
    ),
    (
        lambda: masks.from_mod(lambda b, h, q, kv: q == kv, within=3),
        TypeError,
        "within must be a mask; got int 3",
    ),
    (
        lambda: masks.window(2**63),
        ValueError,
        "left must be at most 2**60, so that positions fit 64 bits; got 9223372036854775808",
    ),
    (
        lambda: masks.window(10**5000),
        ValueError,
        "left must be at most 2**60, so that positions fit 64 bits; got an integer of 16610",
    ),
    (
        lambda: masks.window(torch.tensor(True)),
        TypeError,
        "left must be an integer; got Tensor tensor(True)",
    ),
    (
        lambda: masks.window(torch.zeros(64, 64)),
        TypeError,
        "left must be an integer; got Tensor of shape (64, 64). Pass",
    ),
    (
        lambda: masks.window(list(range(10**4))),
        TypeError,
        "... (58,890 characters). Pass a whole number of tokens",
    ),
    (
        lambda: masks.causal() & torch.zeros(2, 3),
        TypeError,
        "`&` joins two masks; got Tensor of shape (2, 3). Use one of compiled_dilated.masks",
    ),
    (
        lambda: masks.congruent(4, np.array(1.5)),
        TypeError,
        "offset must be an integer; got ndarray",
    ),
    (
        lambda: masks.documents(lengths=(2**59,) * 3),
        ValueError,
        "the sum of lengths must be at most 2**60",
    ),
    (
        lambda: masks.neighborhood((2**31, 2**31), 1),
        ValueError,
        "the number of cells of the grid must be at most 2**60",
    ),
    (
        lambda: masks.tiles([(2**40, 2**40)]),
        ValueError,
        "pairs must name at most 2**60 tiles, below position 2**60; got 1099511627777",
    ),
    (
        lambda: masks.tiles([(2**40, 0)], block=2**30),
        ValueError,
        "below position 2**60; got 1099511627777 x 1 tiles of 1073741824",
    ),
    (lambda: masks.tiles([5]), TypeError, "pairs[0] must be a sequence of integers; got int 5"),
    (lambda: CAUSAL and WINDOW, TypeError, "the mask causal() has no truth value"),
    (lambda: CAUSAL or WINDOW, TypeError, "Write `a & b`, `a | b` or `~a`"),
    (lambda: not CAUSAL, TypeError, "`and`, `or`, `not` and `if` cannot combine masks"),
    (lambda: CAUSAL & 3, TypeError, "`&` joins two masks; got int 3"),
    (lambda: CAUSAL | (lambda b, h, q, kv: q > kv), TypeError, "`|` joins two masks; got function"),
]
ORDERS: list[Row] = [
    (lambda: orders.residue(0), ValueError, "rate must be at least 1; got 0"),
    (lambda: orders.residue(2, period=-3), ValueError, "period must be at least 1; got -3"),
    (
        lambda: orders.hilbert(4),
        ValueError,
        "hilbert orders grids of 2 or 3 axes; got 1 sizes (4,)",
    ),
    (lambda: orders.hilbert(4, 0), ValueError, "grid[1] must be at least 1; got 0"),
    (lambda: orders.residue(2**61), ValueError, "rate must be at most 2**60"),
    (
        lambda: orders.hilbert(2**16, 2**16),
        ValueError,
        "grid must have at most 2147483648 cells, whose positions fit 32 bits",
    ),
    (
        lambda: orders.hilbert(4, 4).permute(x(2, 15, 3)),
        ValueError,
        "orders the 16 cells of its grid; got 15 tokens",
    ),
]
PROGRAMS: list[Row] = [
    (lambda: Branch(lambda b, h, q, kv: q >= kv), TypeError, "a branch needs a mask; got function"),
    (
        lambda: Branch(CAUSAL, order="hilbert"),
        TypeError,
        "order must be an order; got str 'hilbert'. Use compiled_dilated.orders",
    ),
    (
        lambda: Branch(CAUSAL, heads="2/2"),
        ValueError,
        "heads must be None, (start, stop) or a share 'i/k' with i < k; got '2/2'",
    ),
    (
        lambda: Branch(CAUSAL, heads=3),
        ValueError,
        "heads must be None, (start, stop) or a share 'i/k' with i < k; got 3",
    ),
    (
        lambda: Branch(CAUSAL, heads=(True, 2)),
        ValueError,
        "heads must be None, (start, stop) or a share 'i/k' with i < k",
    ),
    (
        lambda: Branch(CAUSAL, heads="\u0660/\u0662"),
        ValueError,
        "heads must be None, (start, stop) or a share 'i/k'",
    ),
    (
        lambda: Branch(CAUSAL, heads="0/" + "9" * 5000),
        ValueError,
        "heads must be None, (start, stop) or a share 'i/k'",
    ),
    (
        lambda: cd.block_sparse(5e-324, "dilated"),
        ValueError,
        "density must be at least 2**-60 for kind='dilated'; got 5e-324",
    ),
    (
        lambda: Branch(CAUSAL, heads=(0, 9)).head_range(8),
        ValueError,
        "names heads 0 to 9; the query has 8",
    ),
    (lambda: Program(()), TypeError, "a program needs a non-empty tuple of Branch; got ()"),
    (lambda: Program((CAUSAL,)), TypeError, "Write Program((Branch(mask),))"),
    (
        lambda: Program([Branch(CAUSAL)]),
        TypeError,
        "a program needs a non-empty tuple of Branch; got [Branch(causal())]",
    ),
    (
        lambda: cd.longnet((8, 16), (1,)),
        ValueError,
        "segment_lengths and dilation_rates must be of one length; got 2 and 1",
    ),
    (lambda: cd.longnet((), ()), ValueError, "segment_lengths is empty"),
    (
        lambda: cd.longnet(2048, 1),
        TypeError,
        "segment_lengths must be a sequence of integers; got int 2048",
    ),
    (
        lambda: cd.longnet((8, 0), (1, 2)),
        ValueError,
        "segment_lengths[1] must be at least 1; got 0",
    ),
    (
        lambda: cd.longnet((8,), (0.5,)),
        TypeError,
        "dilation_rates[0] must be an integer; got float 0.5",
    ),
    (
        lambda: cd.longnet((8,), (1,), causal="yes"),
        TypeError,
        "causal must be True or False; got str 'yes'",
    ),
    (
        lambda: cd.longnet((8,), (1,), offsets="paper"),
        ValueError,
        "offsets must be one of 'cyclic', 'grouped'; got 'paper'",
    ),
    (
        lambda: cd.longnet((8,), (1,), heads="some"),
        ValueError,
        "heads must be one of 'all', 'split'; got 'some'",
    ),
    (
        lambda: cd.local_window(8, 3, causal=True),
        ValueError,
        "a causal window has nothing to its right; got right=3",
    ),
    (lambda: cd.local_window(-8), ValueError, "left must be at least 0; got -8"),
    (lambda: cd.hilbert_window((8,), 1), ValueError, "grid must have 2 or 3 axes; got (8,)"),
    (
        lambda: cd.hilbert_window(64, 1),
        TypeError,
        "grid must be a sequence of integers; got int 64",
    ),
    (
        lambda: cd.block_sparse(0.0, tokens=64),
        ValueError,
        "density must be in (0, 1], the share of pairs kept; got 0.0",
    ),
    (lambda: cd.block_sparse(1.1, tokens=64), ValueError, "A sparsity of 0.9 is density 0.1"),
    (
        lambda: cd.block_sparse("0.1", tokens=64),
        TypeError,
        "density must be a number in (0, 1]; got str '0.1'",
    ),
    (
        lambda: cd.block_sparse(0.1),
        ValueError,
        "say how many: block_sparse(0.1, 'local', tokens=N)",
    ),
    (
        lambda: cd.block_sparse(0.1, "bigbird", tokens=64),
        ValueError,
        "kind must be one of 'local', 'global_local', 'dilated', 'tiles'",
    ),
    (
        lambda: cd.block_sparse(0.3, "dilated"),
        ValueError,
        "keeps one block in a whole number: density 0.25 or 0.3333; got 0.3",
    ),
    (
        lambda: cd.block_sparse(0.1, "global_local", tokens=64),
        ValueError,
        "take a smaller block or kind='local'",
    ),
    (
        lambda: cd.block_sparse(0.5, "tiles", tokens=64),
        ValueError,
        "tiles are for kind='tiles', which needs them",
    ),
    (
        lambda: cd.block_sparse(0.5, "local", tokens=64, tiles=[(0, 0)]),
        ValueError,
        "tiles are for kind='tiles'",
    ),
    (
        lambda: cd.block_sparse(0.5, "tiles", tokens=128, tiles=[(0, 0)]),
        ValueError,
        "the tiles keep 0.25 of the pairs of 128 tokens",
    ),
]
