"""Bad input, one table: the error names the argument, what came and what was expected, and, where it is not plain, what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.mods import ModError

CAUSAL, WINDOW = masks.causal(), masks.window(4)
IDS, PADDING = masks.documents(ids="ids"), masks.padding("pad")


def x(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*(shape or (2, 4, 8, 4)), **options)


def attend(program: Any = CAUSAL, q: Any = None, k: Any = None, v: Any = None, lowering: str = "auto", **options: Any) -> Any:
    q = x() if q is None else q
    k = x() if k is None else k
    return cd.compile(program, lowering=lowering)(q, k, k if v is None else v, **options)


Row = tuple[Callable[[], Any], type[Exception], str]

MASKS: list[Row] = [
    (lambda: masks.window(-1), ValueError, "left must be at least 0; got -1"),
    (lambda: masks.window(1.5), TypeError, "left must be an integer; got float 1.5"),
    (lambda: masks.window(True), TypeError, "left must be an integer; got bool True"),
    (lambda: masks.window("8"), TypeError, "left must be an integer; got str '8'. Pass a whole number of tokens"),
    (lambda: masks.window(4, -2), ValueError, "right must be at least 0; got -2"),
    (lambda: masks.window(4, dilation=0), ValueError, "dilation must be at least 1; got 0"),
    (lambda: masks.window(np.float64(2)), TypeError, "left must be an integer; got float64"),
    (lambda: masks.segments(0), ValueError, "length must be at least 1; got 0"),
    (lambda: masks.congruent(0), ValueError, "modulus must be at least 1; got 0"),
    (lambda: masks.congruent(4, 4), ValueError, "offset must be below the modulus 4; got 4"),
    (lambda: masks.congruent(4, (0, 7)), ValueError, "offset must be below the modulus 4; got (0, 7)"),
    (lambda: masks.congruent(4, "random"), ValueError, "offset must be one of 'cyclic', 'grouped'; got 'random'"),
    (lambda: masks.congruent(4, ()), ValueError, "offset is empty; pass at least one integer"),
    (lambda: masks.congruent(4, 1, period=0), ValueError, "period must be at least 1; got 0"),
    (lambda: masks.documents(), ValueError, "documents needs either ids (the name of a data tensor) or lengths"),
    (lambda: masks.documents(ids="a", lengths=(1,)), ValueError, "got ids='a', lengths=(1,)"),
    (lambda: masks.documents(ids=torch.zeros(4)), TypeError, "ids must be the name of a data tensor; got Tensor"),
    (lambda: masks.documents(lengths=(3, -1)), ValueError, "lengths[1] must be at least 0; got -1"),
    (
        lambda: masks.documents(lengths=7),
        TypeError,
        "lengths must be a sequence of integers; got int 7. Write a tuple, as in (7,)",
    ),
    (lambda: masks.padding(torch.zeros(4)), TypeError, "Pass the tensor itself as data={...} at the call"),
    (lambda: masks.sinks(-4), ValueError, "count must be at least 0; got -4"),
    (lambda: masks.prefix(None), TypeError, "count must be an integer; got NoneType None"),
    (lambda: masks.global_tokens(2.0), TypeError, "count must be an integer; got float 2.0"),
    (lambda: masks.dilated_blocks(0, 2), ValueError, "block must be at least 1; got 0"),
    (lambda: masks.dilated_blocks(4, 0), ValueError, "stride must be at least 1; got 0"),
    (lambda: masks.neighborhood((4, 4, 4, 4), 1), ValueError, "grid must have 1 to 3 axes; got (4, 4, 4, 4)"),
    (lambda: masks.neighborhood(16, 1), TypeError, "grid must be a sequence of integers; got int 16"),
    (lambda: masks.neighborhood((4, 4), (1, 1, 1)), ValueError, "radius must be one number or one per axis of the grid (4, 4)"),
    (lambda: masks.neighborhood((4, 4), -1), ValueError, "radius[0] must be at least 0; got -1"),
    (lambda: masks.neighborhood((4, 4), 1, causal=(True,)), ValueError, "causal must be a bool or one bool per axis"),
    (lambda: masks.neighborhood((4, 4), 1, causal=1), ValueError, "of the grid (4, 4); got 1"),
    (lambda: masks.neighborhood((4, 4), 1, edges="wrap"), ValueError, "edges must be one of 'cut', 'shift'; got 'wrap'"),
    (lambda: masks.tiles("ab"), TypeError, "pairs must be (query tile, key tile) pairs; got str"),
    (lambda: masks.tiles([(0, 1, 2)]), ValueError, "every tile must be a (query tile, key tile) pair"),
    (lambda: masks.tiles([(0, -1)]), ValueError, "must be at least 0; got -1"),
    (lambda: masks.tiles([(0, 3)], columns=2), ValueError, "columns must be at least 4; got 2"),
    (lambda: masks.from_mod(7), TypeError, "fn must be a function of (b, h, q_idx, kv_idx); got int 7"),
    (lambda: masks.from_mod(lambda b, h, q, kv: q == kv, within=3), TypeError, "within must be a mask; got int 3"),
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
    (lambda: masks.window(torch.tensor(True)), TypeError, "left must be an integer; got Tensor tensor(True)"),
    (lambda: masks.congruent(4, np.array(1.5)), TypeError, "offset must be an integer; got ndarray"),
    (lambda: masks.documents(lengths=(2**59,) * 3), ValueError, "the sum of lengths must be at most 2**60"),
    (lambda: masks.neighborhood((2**31, 2**31), 1), ValueError, "the number of cells of the grid must be at most 2**60"),
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
    (lambda: orders.hilbert(4), ValueError, "hilbert orders grids of 2 or 3 axes; got 1 sizes (4,)"),
    (lambda: orders.hilbert(4, 0), ValueError, "grid[1] must be at least 1; got 0"),
    (lambda: orders.residue(2**61), ValueError, "rate must be at most 2**60"),
    (lambda: orders.hilbert(2**16, 2**16), ValueError, "grid must have at most 2147483648 cells, whose positions fit 32 bits"),
    (lambda: orders.hilbert(4, 4).permute(x(2, 15, 3)), ValueError, "orders the 16 cells of its grid; got 15 tokens"),
]

PROGRAMS: list[Row] = [
    (lambda: Branch(lambda b, h, q, kv: q >= kv), TypeError, "a branch needs a mask; got function"),
    (
        lambda: Branch(CAUSAL, order="hilbert"),
        TypeError,
        "order must be an order; got str 'hilbert'. Use compiled_dilated.orders",
    ),
    (lambda: Branch(CAUSAL, heads="2/2"), ValueError, "heads must be None, (start, stop) or a share 'i/k' with i < k; got '2/2'"),
    (lambda: Branch(CAUSAL, heads=3), ValueError, "heads must be None, (start, stop) or a share 'i/k' with i < k; got 3"),
    (lambda: Branch(CAUSAL, heads=(True, 2)), ValueError, "heads must be None, (start, stop) or a share 'i/k' with i < k"),
    (lambda: Branch(CAUSAL, heads="\u0660/\u0662"), ValueError, "heads must be None, (start, stop) or a share 'i/k'"),
    (lambda: Branch(CAUSAL, heads="0/" + "9" * 5000), ValueError, "heads must be None, (start, stop) or a share 'i/k'"),
    (lambda: cd.block_sparse(5e-324, "dilated"), ValueError, "density must be at least 2**-60 for kind='dilated'; got 5e-324"),
    (lambda: Branch(CAUSAL, heads=(0, 9)).head_range(8), ValueError, "names heads 0 to 9; the query has 8"),
    (lambda: Program(()), TypeError, "a program needs a non-empty tuple of Branch; got ()"),
    (lambda: Program((CAUSAL,)), TypeError, "Write Program((Branch(mask),))"),
    (lambda: Program([Branch(CAUSAL)]), TypeError, "a program needs a non-empty tuple of Branch; got [Branch(causal())]"),
    (lambda: cd.longnet((8, 16), (1,)), ValueError, "segment_lengths and dilation_rates must be of one length; got 2 and 1"),
    (lambda: cd.longnet((), ()), ValueError, "segment_lengths is empty"),
    (lambda: cd.longnet(2048, 1), TypeError, "segment_lengths must be a sequence of integers; got int 2048"),
    (lambda: cd.longnet((8, 0), (1, 2)), ValueError, "segment_lengths[1] must be at least 1; got 0"),
    (lambda: cd.longnet((8,), (0.5,)), TypeError, "dilation_rates[0] must be an integer; got float 0.5"),
    (lambda: cd.longnet((8,), (1,), causal="yes"), TypeError, "causal must be True or False; got str 'yes'"),
    (lambda: cd.longnet((8,), (1,), offsets="paper"), ValueError, "offsets must be one of 'cyclic', 'grouped'; got 'paper'"),
    (lambda: cd.longnet((8,), (1,), heads="some"), ValueError, "heads must be one of 'all', 'split'; got 'some'"),
    (lambda: cd.local_window(8, 3, causal=True), ValueError, "a causal window has nothing to its right; got right=3"),
    (lambda: cd.local_window(-8), ValueError, "left must be at least 0; got -8"),
    (lambda: cd.hilbert_window((8,), 1), ValueError, "grid must have 2 or 3 axes; got (8,)"),
    (lambda: cd.hilbert_window(64, 1), TypeError, "grid must be a sequence of integers; got int 64"),
    (lambda: cd.block_sparse(0.0, tokens=64), ValueError, "density must be in (0, 1], the share of pairs kept; got 0.0"),
    (lambda: cd.block_sparse(1.1, tokens=64), ValueError, "A sparsity of 0.9 is density 0.1"),
    (lambda: cd.block_sparse("0.1", tokens=64), TypeError, "density must be a number in (0, 1]; got str '0.1'"),
    (lambda: cd.block_sparse(0.1), ValueError, "say how many: block_sparse(0.1, 'local', tokens=N)"),
    (
        lambda: cd.block_sparse(0.1, "bigbird", tokens=64),
        ValueError,
        "kind must be one of 'local', 'global_local', 'dilated', 'tiles'",
    ),
    (lambda: cd.block_sparse(0.3, "dilated"), ValueError, "keeps one block in a whole number: density 0.25 or 0.3333; got 0.3"),
    (lambda: cd.block_sparse(0.1, "global_local", tokens=64), ValueError, "take a smaller block or kind='local'"),
    (lambda: cd.block_sparse(0.5, "tiles", tokens=64), ValueError, "tiles are for kind='tiles', which needs them"),
    (lambda: cd.block_sparse(0.5, "local", tokens=64, tiles=[(0, 0)]), ValueError, "tiles are for kind='tiles'"),
    (
        lambda: cd.block_sparse(0.5, "tiles", tokens=128, tiles=[(0, 0)]),
        ValueError,
        "the tiles keep 0.25 of the pairs of 128 tokens",
    ),
]

COMPILE: list[Row] = [
    (lambda: cd.compile(lambda b, h, q, kv: q >= kv), TypeError, "expected a Program or a mask; got function"),
    (lambda: cd.compile([CAUSAL]), TypeError, "expected a Program or a mask; got list"),
    (
        lambda: cd.compile(CAUSAL, lowering="fast"),
        ValueError,
        "lowering must be one of 'auto', 'native', 'dense', 'strided', 'tiled', 'flex', 'lanes'; got 'fast'",
    ),
    (lambda: attend(q=[[1.0]]), TypeError, "q must be a torch.Tensor; got list. Convert it with torch.as_tensor"),
    (lambda: attend(q=x(4, 8, 4)), ValueError, "q must be (batch, heads, tokens, head_dim); got shape (4, 8, 4)"),
    (lambda: attend(k=x(2, 4, 8, 4, 1)), ValueError, "k must be (batch, heads, tokens, head_dim); got shape (2, 4, 8, 4, 1)"),
    (lambda: attend(q=x(dtype=torch.int64)), TypeError, "q must be float16, bfloat16, float32 or float64; got torch.int64"),
    (lambda: attend(q=x(dtype=torch.complex64)), TypeError, "got torch.complex64. Cast it first"),
    (
        lambda: attend(k=x(dtype=torch.float16)),
        TypeError,
        "q, k and v must have one dtype; got q torch.float32 and k torch.float16",
    ),
    (lambda: attend(k=x(device="meta")), ValueError, "q, k and v must be on one device; got q on cpu and k on meta"),
    (lambda: attend(v=x(2, 4, 9, 4)), ValueError, "k and v must agree in batch, heads and tokens"),
    (lambda: attend(k=x(3, 4, 8, 4)), ValueError, "q and k must have one batch size"),
    (lambda: attend(k=x(2, 4, 8, 5)), ValueError, "q and k must have one head_dim"),
    (lambda: attend(k=x(2, 3, 8, 4)), ValueError, "the 4 query heads must be a multiple of the 3 key heads"),
    (lambda: attend(scale="1"), TypeError, "scale must be a finite number; got str '1'"),
    (lambda: attend(scale=float("nan")), ValueError, "Leave it out for 1 / sqrt(head_dim)"),
    (lambda: attend(scale=x(1)), ValueError, "scale must be a finite number or a tensor of one; got shape (1,)"),
    (lambda: attend(return_lse="no"), TypeError, "return_lse must be True or False; got str 'no'"),
    (lambda: attend(sink_logits=x(4).to(torch.complex64)), TypeError, "sink_logits must be real numbers; got torch.complex64"),
    (lambda: attend(sink_logits=torch.arange(4)), TypeError, "sink_logits must be real numbers; got torch.int64"),
    (lambda: attend(k=x().to("meta")), ValueError, "q, k and v must be on one device; got q on cpu and k on meta"),
    (lambda: attend(q=x().to_sparse()), TypeError, "q must be a dense tensor; got a torch.sparse_coo one"),
    (lambda: attend(data=[1]), TypeError, "data must be a dict of tensors by name; got list"),
    (lambda: attend(q_offset=-1), ValueError, "q_offset must be at least 0; got -1"),
    (lambda: attend(q_offset=2**63), ValueError, "q_offset must be at most 2**60"),
    (lambda: attend(q_offset=1.0), TypeError, "q_offset must be an integer; got float 1.0"),
    (
        lambda: attend(IDS, q_offset="3", data={"ids": x(2, 8, dtype=torch.int64)}),
        TypeError,
        "q_offset must be an integer; got str '3'",
    ),
    (lambda: attend(IDS), ValueError, "the program reads the data tensors ['ids']; got []. Pass data={name: tensor}"),
    (lambda: attend(IDS, data={"id": x(2, 8)}), ValueError, "the program reads the data tensors ['ids']; got ['id']"),
    (lambda: attend(data={"ids": x(2, 8)}), ValueError, "the program reads the data tensors []; got ['ids']"),
    (lambda: attend(IDS, data={"ids": [0] * 8}), TypeError, "data['ids'] must be a bool or integer tensor; got list"),
    (lambda: attend(IDS, data={"ids": x(2, 8)}), TypeError, "data['ids'] must be a bool or integer tensor; got torch.float32"),
    (lambda: attend(PADDING, data={"pad": x(8, dtype=torch.bool)}), ValueError, "data['pad'] must be (batch or 1, tokens)"),
    (
        lambda: attend(PADDING, data={"pad": x(3, 8, dtype=torch.bool)}),
        ValueError,
        "with batch 2 and at least 8 tokens; got shape (3, 8)",
    ),
    (lambda: attend(PADDING, data={"pad": x(2, 7, dtype=torch.bool)}), ValueError, "at least 8 tokens; got shape (2, 7)"),
    (lambda: attend(PADDING, data={"pad": x(2, 8, dtype=torch.int64)}), TypeError, "data['pad'] must be a bool tensor"),
    (
        lambda: attend(IDS, q=x(2, 4, 20, 4), data={"ids": x(2, 8, dtype=torch.int64)}),
        ValueError,
        "at least 20 tokens; got shape (2, 8)",
    ),
    (
        lambda: attend(IDS, q=x(2, 4, 1, 4), q_offset=9, data={"ids": x(2, 8, dtype=torch.int64)}),
        ValueError,
        "at least 10 tokens",
    ),
    (
        lambda: attend(IDS, data={"ids": x(2, 8, dtype=torch.int64, device="meta")}),
        ValueError,
        "data['ids'] must be on the device of q, cpu",
    ),
    (
        lambda: attend(sink_logits=0.5),
        ValueError,
        "sink_logits must be a tensor of one logit per query head, shape (4,); got float",
    ),
    (lambda: attend(sink_logits=x(3)), ValueError, "shape (4,); got (3,)"),
    (lambda: attend(score_mod=3), TypeError, "score_mod must be a function of (score, b, h, q_idx, kv_idx); got int"),
    (lambda: attend(score_mod=lambda s, b: s), TypeError, "(s, b): too many positional arguments"),
    (
        lambda: attend(score_mod=lambda s, b, h, i, j: None),
        TypeError,
        "must return a number as a tensor for each pair",
    ),
    (lambda: attend(score_mod=lambda s, b, h, i, j: i >= j), TypeError, "must return the new score; got torch.bool"),
    (lambda: attend(score_mod=lambda s, b, h, i, j: s.expand(3)), ValueError, "one number for each pair, called with scalars"),
    (lambda: attend(score_mod=lambda s, b, h, i, j: s if i > j else -s), ModError, "Write torch.where(condition, a, b)"),
    (lambda: attend(score_mod=lambda s, b, h, i, j: s + torch.rand((), device=s.device)), ModError, "draws random numbers"),
    (lambda: attend(masks.from_mod(lambda b, h, i, j: None)), TypeError, "must return a bool tensor for each pair; got NoneType"),
    (lambda: attend(masks.from_mod(lambda b, h, i, j: i * 1.0)), TypeError, "must return a bool tensor; got torch.float32"),
    (lambda: attend(Program((Branch(CAUSAL, heads=(0, 5)),))), ValueError, "names heads 0 to 5; the query has 4"),
    (lambda: attend(masks.congruent(2, (0, 1))), ValueError, "names 2 offsets for 4 heads; give one per head or a single number"),
    (lambda: attend(masks.neighborhood((2, 3), 1)), ValueError, "a grid of 6 tokens; got positions up to 8"),
    (
        lambda: attend(masks.neighborhood((2, 4), 1), q=x(2, 4, 1, 4), q_offset=8),
        ValueError,
        "a grid of 8 tokens; got positions up to 9",
    ),
    (lambda: attend(cd.hilbert_window((3, 3), 1)), ValueError, "orders the 9 cells of its grid; got 8 tokens"),
    (
        lambda: attend(cd.hilbert_window((2, 4), 1), q=x(2, 4, 2, 4)),
        ValueError,
        "Cross attention and decoding need order=identity()",
    ),
    (
        lambda: attend(WINDOW | masks.sinks(1), lowering="strided"),
        ValueError,
        "Use lowering='tiled' or 'auto' (asked to compute Program",
    ),
    (
        lambda: attend(q=x(dtype=torch.float64), k=x(dtype=torch.float64), lowering="flex"),
        ValueError,
        "FlexAttention does not compute in float64",
    ),
    (lambda: attend(q=x(requires_grad=True), lowering="flex"), ValueError, "torch has no backward of FlexAttention on a CPU"),
    (lambda: attend(lowering="flex", return_lse=True), ValueError, "lowering 'flex' gives no lse on a CPU"),
    (lambda: cd.compile(CAUSAL)(x(), x(), x(), None), TypeError, "positional argument"),
    (lambda: attend(dropout_p=0.1), TypeError, "takes no dropout_p=; there is no dropout of attention weights"),
]

PLAN: list[Row] = [
    (lambda: cd.plan(CAUSAL, (1, 8, 64)), ValueError, "q_shape must be (batch, heads, tokens, head_dim); got (1, 8, 64)"),
    (lambda: cd.plan(CAUSAL, 64), TypeError, "q_shape must be a sequence of integers; got int 64"),
    (lambda: cd.plan(CAUSAL, (1, 8, 0, 64)), ValueError, "q_shape[2] must be at least 1; got 0"),
    (lambda: cd.plan(CAUSAL, (1, 8, 64, 64), kv_heads=3), ValueError, "the 8 query heads must be a multiple of the 3 key heads"),
    (lambda: cd.plan(CAUSAL, (1, 8, 64, 64), kv_len=-5), ValueError, "kv_len must be at least 1; got -5"),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), dtype=torch.int8),
        TypeError,
        "dtype must be float16, bfloat16, float32 or float64; got torch.int8",
    ),
    (lambda: cd.plan(CAUSAL, (1, 8, 64, 64), q_offset=-1), ValueError, "q_offset must be at least 0; got -1"),
    (lambda: cd.plan(CAUSAL, (1, 8, 1, 64), q_offset=2**63), ValueError, "q_offset must be at most 2**60"),
    (lambda: cd.plan(CAUSAL, (1, 8, 2**70, 64)), ValueError, "q_shape[2] must be at most 2**60"),
    (lambda: cd.plan(CAUSAL, (1, 8, 64, 64), device="xyz"), ValueError, "device must be a device that torch knows, as 'cpu' or"),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), device=3),
        TypeError,
        "device must be a torch.device or its name, as 'cpu'; got int 3",
    ),
    (lambda: cd.plan(CAUSAL, (1, 8, 64, 64), dtype="float32"), TypeError, "dtype must be a torch.dtype; got str 'float32'"),
    (lambda: cd.plan(CAUSAL, (1, 8, 64, 64), training="yes"), TypeError, "training must be True or False; got str 'yes'"),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), lowering=["dense"]),
        ValueError,
        "lowering must be one of 'auto', 'native', 'dense'",
    ),
    (
        lambda: cd.plan(~masks.congruent(7, 3), (1, 1, 2**40, 16), lowering="tiled"),
        ValueError,
        "takes a list of more than 268,435,456 tiles. Use fewer tokens, or a mask of",
    ),
    (lambda: cd.plan(CAUSAL, (1, 8, 64, 64), lowering="cuda"), ValueError, "lowering must be one of 'auto', 'native', 'dense'"),
    (lambda: cd.plan(torch.ones(4, 4), (1, 8, 64, 64)), TypeError, "expected a Program or a mask; got Tensor"),
    (
        lambda: cd.plan(masks.from_mod(lambda b, h, q, kv: q == kv), (1, 1, 65536, 64), lowering="tiled"),
        ValueError,
        "Say where to look: from_mod(fn, within=mask)",
    ),
    (lambda: cd.plan(WINDOW, (1, 1, 8192, 64), lowering="dense"), ValueError, "a bias over 8192 x 8192 pairs is larger than"),
]

REFERENCE: list[Row] = [
    (lambda: cd.reference(lambda b, h, q, kv: q >= kv, x(), x(), x()), TypeError, "expected a Program or a mask; got function"),
    (lambda: cd.reference(IDS, x(), x(), x()), ValueError, "the program reads the data tensors ['ids']; got []"),
    (lambda: cd.reference(Program((Branch(CAUSAL, (0, 9)),)), x(), x(), x()), ValueError, "names heads 0 to 9; the query has 4"),
]

BLOCK_MASKS: list[Row] = [
    (lambda: cd.block_masks("causal", 64, 64), TypeError, "mask must be a mask; got str 'causal'"),
    (lambda: cd.block_masks(CAUSAL, 0, 64), ValueError, "q_len must be at least 1; got 0"),
    (lambda: cd.block_masks(CAUSAL, 64, 64, tile=0), ValueError, "tile must be at least 1; got 0"),
    (lambda: cd.block_masks(CAUSAL, 64, 64, heads=0), ValueError, "heads must be at least 1; got 0"),
    (
        lambda: cd.block_masks(IDS, 64, 64),
        ValueError,
        "the program reads the data tensors ['ids']; got []. Pass data={name: tensor}",
    ),
    (lambda: cd.block_masks(IDS, 64, 64, data={"ids": [0]}), TypeError, "data['ids'] must be a bool or integer tensor; got list"),
    (lambda: cd.block_masks(CAUSAL, 64, 32, order=orders.residue(2)), ValueError, "needs q_len == kv_len and q_offset 0"),
    (lambda: cd.block_masks(masks.neighborhood((4, 4), 1), 17, 17), ValueError, "a grid of 16 tokens; got positions up to 17"),
    (
        lambda: cd.block_masks(masks.congruent(2, "grouped"), 64, 64),
        ValueError,
        "depends on the number of heads; say it by heads=...",
    ),
    (
        lambda: cd.block_mask(masks.window(64) | masks.sinks(4), 2**16, 2**16),
        ValueError,
        "Call block_masks(...) and merge the parts by their lse",
    ),
]

RING: list[Row] = [
    (lambda: cd.compile(CAUSAL, ranks=0), ValueError, "ranks must be at least 1; got 0"),
    (lambda: cd.compile(CAUSAL, ranks="4"), TypeError, "ranks must be an integer; got str '4'"),
    (lambda: cd.compile(CAUSAL, ranks=2.0), TypeError, "ranks must be an integer; got float 2.0"),
    (
        lambda: cd.compile(CAUSAL, ranks=2, layout="ring"),
        ValueError,
        "layout must be one of 'auto', 'contiguous', 'zigzag', 'striped', 'residue', 'hilbert'; got 'ring'",
    ),
    (
        lambda: cd.compile(CAUSAL, layout="zigzag"),
        ValueError,
        "layout='zigzag' says how ranks share a sequence; say which",
    ),
    (lambda: cd.compile(CAUSAL, ranks=2, lowering="tiled"), ValueError, "got lowering='tiled'. Leave it at 'auto'"),
    (lambda: cd.compile(CAUSAL, mesh=4), TypeError, "mesh must be a DeviceMesh of one dimension or a process group; got int"),
    (
        lambda: cd.compile(CAUSAL, ranks=2)(x(), x(), x(), q_offset=3),
        ValueError,
        "a ring deals out one sequence; got 8 queries",
    ),
    (
        lambda: cd.compile(CAUSAL, ranks=2)(x(), x(2, 4, 9, 4), x(2, 4, 9, 4)),
        ValueError,
        "at offset 0 and 9 keys. Compile without ranks for cross attention and decoding",
    ),
    (lambda: cd.compile(CAUSAL, ranks=2, layout="residue")(x(), x(), x()), ValueError, "'residue' needs a dilated program"),
    (lambda: cd.compile(CAUSAL, ranks=2, layout="hilbert")(x(), x(), x()), ValueError, "'hilbert' needs a program over a grid"),
    (lambda: cd.compile(masks.neighborhood((2, 3), 1), ranks=2)(x(), x(), x()), ValueError, "a grid of 6 tokens; got positions"),
    (lambda: cd.plan(CAUSAL, (1, 4, 8, 4), layout="zigzag"), ValueError, "layout='zigzag' says how ranks share a sequence"),
    (
        lambda: cd.plan(CAUSAL, (1, 4, 8, 4), ranks=2, lowering="dense"),
        ValueError,
        "lowering='dense'. Leave out ranks, or these",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 4, 8, 4), ranks=2, kv_len=9),
        ValueError,
        "got 8 queries at offset 0, 9 keys and",
    ),
    (lambda: cd.plan(CAUSAL, (1, 4, 8, 4), ranks=2).positions(2), ValueError, "rank must be at least 0 and less than 2; got 2"),
    (lambda: cd.plan(CAUSAL, (1, 4, 8, 4), ranks=2).positions("0"), TypeError, "rank must be an integer; got str '0'"),
]

TABLE = {
    "masks": MASKS,
    "orders": ORDERS,
    "programs": PROGRAMS,
    "compile": COMPILE,
    "plan": PLAN,
    "reference": REFERENCE,
    "block_masks": BLOCK_MASKS,
    "ring": RING,
}


@pytest.mark.parametrize(
    ("call", "error", "fragment"),
    [pytest.param(*row, id=f"{room}-{number}-{row[2]}") for room, rows in TABLE.items() for number, row in enumerate(rows)],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], fragment: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert fragment in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_table_is_long() -> None:
    assert sum(map(len, TABLE.values())) >= 60


# Each constructor with arguments that it accepts.
CONSTRUCTORS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (masks.window, {"left": 4, "right": 4, "dilation": 1}),
    (masks.segments, {"length": 4}),
    (masks.congruent, {"modulus": 4, "offset": 1, "period": 8}),
    (masks.documents, {"lengths": (3, 4)}),
    (masks.sinks, {"count": 4}),
    (masks.prefix, {"count": 4}),
    (masks.global_tokens, {"count": 4}),
    (masks.dilated_blocks, {"block": 4, "stride": 2}),
    (masks.neighborhood, {"grid": (4, 4), "radius": 1, "dilation": 1, "causal": False, "edges": "cut"}),
    (masks.tiles, {"pairs": ((0, 0),), "block": 4, "columns": 3}),
    (masks.padding, {"name": "padding"}),
    (orders.residue, {"rate": 2, "period": 8}),
    (cd.longnet, {"segment_lengths": (4, 8), "dilation_rates": (1, 2), "causal": False, "offsets": "cyclic", "heads": "all"}),
    (cd.local_window, {"left": 4, "right": 4, "causal": False, "dilation": 1}),
    (cd.hilbert_window, {"grid": (4, 4), "radius": 1, "edges": "cut"}),
    (cd.block_sparse, {"density": 0.5, "kind": "local", "block": 4, "tokens": 64, "causal": False}),
    (Branch, {"mask": CAUSAL, "heads": (0, 2), "order": orders.identity()}),
    (
        partial(cd.plan, CAUSAL),
        {
            "q_shape": (1, 2, 8, 4), "kv_heads": 2, "kv_len": 8, "value_dim": 4, "dtype": torch.float32, "device": "cpu",
            "training": False, "lowering": "auto", "q_offset": 0,
        },
    ),
]  # fmt: skip
WRONG = st.one_of(
    st.integers(-(2**80), 2**80),
    st.sampled_from([-1, 0, 2**31, 2**60, 2**60 + 1, 2**62, 2**63, True, None, (), [], {}, (True,), (None, 1), ((1,),)]),
    st.sampled_from(
        [1.5, float("nan"), float("inf"), 1j, b"4", object, np.float32(2), np.array(3), np.array([1.5]), np.int64(-3)]
    ),
    st.sampled_from([torch.tensor(2), torch.tensor(2.5), torch.tensor([[1]]), torch.tensor(True), CAUSAL, len]),
    st.text(max_size=4),
    st.lists(st.integers(-2, 2**70), max_size=4).map(tuple),
)


@settings(max_examples=600)
@given(data=st.data())
def test_wrong_values_are_refused_by_name(data: st.DataObject) -> None:
    """Whatever comes for an argument is accepted, or refused by an error of ours that names an argument."""
    make, good = data.draw(st.sampled_from(CONSTRUCTORS))
    name = data.draw(st.sampled_from(sorted(good)))
    value = data.draw(WRONG)
    try:
        make(**{**good, name: value})
    except (TypeError, ValueError) as error:
        text = str(error)
        # The lengths of two sequences, windows, heads and shapes are said of each other.
        assert any(argument in text for argument in (name, *good)), text
        assert "\n" not in text
