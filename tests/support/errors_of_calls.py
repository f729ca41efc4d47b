"""Rows of bad input: plan, reference, block masks, rings."""

from __future__ import annotations

import torch

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from tests.support.errors_of_programs import CAUSAL, IDS, WINDOW, Row, x

PLAN: list[Row] = [
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), memory_limit="8 gigs"),
        ValueError,
        "memory_limit must be a number and one of B, KiB",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), memory_limit=0.5),
        TypeError,
        "memory_limit must be an int of bytes or a string as '6GiB'; got float 0.5",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), memory_limit=100),
        ValueError,
        "memory_limit must be at least ",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), ranks=4, memory_limit="8GiB"),
        ValueError,
        "memory_limit is for a call on one device; got ranks=4 too",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64)),
        ValueError,
        "q_shape must be (batch, heads, tokens, head_dim); got (1, 8, 64)",
    ),
    (lambda: cd.plan(CAUSAL, 64), TypeError, "q_shape must be a sequence of integers; got int 64"),
    (lambda: cd.plan(CAUSAL, (1, 8, 0, 64)), ValueError, "q_shape[2] must be at least 1; got 0"),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), kv_heads=3),
        ValueError,
        "the 8 query heads must be a multiple of the 3 key heads",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), kv_len=-5),
        ValueError,
        "kv_len must be at least 1; got -5",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), dtype=torch.int8),
        TypeError,
        "dtype must be float16, bfloat16, float32 or float64; got torch.int8",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), q_offset=-1),
        ValueError,
        "q_offset must be at least 0; got -1",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 1, 64), q_offset=2**63),
        ValueError,
        "q_offset must be at most 2**60",
    ),
    (lambda: cd.plan(CAUSAL, (1, 8, 2**70, 64)), ValueError, "q_shape[2] must be at most 2**60"),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), device="xyz"),
        ValueError,
        "device must be a device that torch knows, as 'cpu' or",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), device=3),
        TypeError,
        "device must be a torch.device or its name, as 'cpu'; got int 3",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), dtype="float32"),
        TypeError,
        "dtype must be a torch.dtype; got str 'float32'",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), training="yes"),
        TypeError,
        "training must be True or False; got str 'yes'",
    ),
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
    (
        lambda: cd.plan(CAUSAL, (1, 8, 64, 64), lowering="cuda"),
        ValueError,
        "lowering must be one of 'auto', 'native', 'dense'",
    ),
    (
        lambda: cd.plan(torch.ones(4, 4), (1, 8, 64, 64)),
        TypeError,
        "expected a Program or a mask; got Tensor",
    ),
    (
        lambda: cd.plan(
            masks.from_mod(lambda b, h, q, kv: q == kv), (1, 1, 65536, 64), lowering="tiled"
        ),
        ValueError,
        "Say where to look: from_mod(fn, within=mask)",
    ),
    (
        lambda: cd.plan(WINDOW, (1, 1, 8192, 64), lowering="dense"),
        ValueError,
        "a bias over 8192 x 8192 pairs is larger than",
    ),
]
REFERENCE: list[Row] = [
    (
        lambda: cd.reference(lambda b, h, q, kv: q >= kv, x(), x(), x()),
        TypeError,
        "expected a Program or a mask; got function",
    ),
    (
        lambda: cd.reference(IDS, x(), x(), x()),
        ValueError,
        "the program reads the data tensors ['ids']; got []",
    ),
    (
        lambda: cd.reference(Program((Branch(CAUSAL, (0, 9)),)), x(), x(), x()),
        ValueError,
        "names heads 0 to 9; the query has 4",
    ),
]
BLOCK_MASKS: list[Row] = [
    (lambda: cd.block_masks("causal", 64, 64), TypeError, "mask must be a mask; got str 'causal'"),
    (lambda: cd.block_masks(CAUSAL, 0, 64), ValueError, "q_len must be at least 1; got 0"),
    (lambda: cd.block_masks(CAUSAL, 64, 64, tile=0), ValueError, "tile must be at least 1; got 0"),
    (
        lambda: cd.block_masks(CAUSAL, 64, 64, heads=0),
        ValueError,
        "heads must be at least 1; got 0",
    ),
    (
        lambda: cd.block_masks(IDS, 64, 64),
        ValueError,
        "the program reads the data tensors ['ids']; got []. Pass data={name: tensor}",
    ),
    (
        lambda: cd.block_masks(IDS, 64, 64, data={"ids": [0]}),
        TypeError,
        "data['ids'] must be a bool or integer tensor; got list",
    ),
    (
        lambda: cd.block_masks(CAUSAL, 64, 32, order=orders.residue(2)),
        ValueError,
        "needs q_len == kv_len and q_offset 0",
    ),
    (
        lambda: cd.block_masks(masks.neighborhood((4, 4), 1), 17, 17),
        ValueError,
        "a grid of 16 tokens; got positions up to 17",
    ),
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
        "layout must be one of 'auto', 'contiguous', 'zigzag', 'striped', 'residue', 'hilbert'; "
        "got 'ring'",
    ),
    (
        lambda: cd.compile(CAUSAL, layout="zigzag"),
        ValueError,
        "layout='zigzag' says how ranks share a sequence; say which",
    ),
    (
        lambda: cd.compile(CAUSAL, ranks=2, lowering="tiled"),
        ValueError,
        "got lowering='tiled'. Leave it at 'auto'",
    ),
    (
        lambda: cd.compile(CAUSAL, mesh=4),
        TypeError,
        "mesh must be a DeviceMesh of one dimension or a process group; got int",
    ),
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
    (
        lambda: cd.compile(CAUSAL, ranks=2, layout="residue")(x(), x(), x()),
        ValueError,
        "'residue' needs a dilated program",
    ),
    (
        lambda: cd.compile(CAUSAL, ranks=2, layout="hilbert")(x(), x(), x()),
        ValueError,
        "'hilbert' needs a program over a grid",
    ),
    (
        lambda: cd.compile(masks.neighborhood((2, 3), 1), ranks=2)(x(), x(), x()),
        ValueError,
        "a grid of 6 tokens; got positions",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 4, 8, 4), layout="zigzag"),
        ValueError,
        "layout='zigzag' says how ranks share a sequence",
    ),
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
    (
        lambda: cd.plan(CAUSAL, (1, 4, 8, 4), ranks=2).positions(2),
        ValueError,
        "rank must be at least 0 and less than 2; got 2",
    ),
    (
        lambda: cd.plan(CAUSAL, (1, 4, 8, 4), ranks=2).positions("0"),
        TypeError,
        "rank must be an integer; got str '0'",
    ),
]
