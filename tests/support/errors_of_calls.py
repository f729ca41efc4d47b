"""Rows of bad input: compile and its calls, plan, reference, block masks, rings."""

from __future__ import annotations

import torch

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.mods import ModError
from tests.support.errors_of_programs import CAUSAL, IDS, PADDING, WINDOW, Row, attend, x

COMPILE: list[Row] = [
    (
        lambda: cd.compile(lambda b, h, q, kv: q >= kv),
        TypeError,
        "expected a Program or a mask; got function",
    ),
    (lambda: cd.compile([CAUSAL]), TypeError, "expected a Program or a mask; got list"),
    (
        lambda: cd.compile(CAUSAL, lowering="fast"),
        ValueError,
        "lowering must be one of 'auto', 'native', 'dense', 'strided', 'tiled', 'flex', 'lanes'; got 'fast'",
    ),
    (
        lambda: attend(q=[[1.0]]),
        TypeError,
        "q must be a torch.Tensor; got list. Convert it with torch.as_tensor",
    ),
    (
        lambda: attend(q=x(4, 8, 4)),
        ValueError,
        "q must be (batch, heads, tokens, head_dim); got shape (4, 8, 4)",
    ),
    (
        lambda: attend(k=x(2, 4, 8, 4, 1)),
        ValueError,
        "k must be (batch, heads, tokens, head_dim); got shape (2, 4, 8, 4, 1)",
    ),
    (
        lambda: attend(q=x(dtype=torch.int64)),
        TypeError,
        "q must be float16, bfloat16, float32 or float64; got torch.int64",
    ),
    (lambda: attend(q=x(dtype=torch.complex64)), TypeError, "got torch.complex64. Cast it first"),
    (
        lambda: attend(k=x(dtype=torch.float16)),
        TypeError,
        "q, k and v must have one dtype; got q torch.float32 and k torch.float16",
    ),
    (
        lambda: attend(k=x(device="meta")),
        ValueError,
        "q, k and v must be on one device; got q on cpu and k on meta",
    ),
    (lambda: attend(v=x(2, 4, 9, 4)), ValueError, "k and v must agree in batch, heads and tokens"),
    (lambda: attend(k=x(3, 4, 8, 4)), ValueError, "q and k must have one batch size"),
    (lambda: attend(k=x(2, 4, 8, 5)), ValueError, "q and k must have one head_dim"),
    (
        lambda: attend(k=x(2, 3, 8, 4)),
        ValueError,
        "the 4 query heads must be a multiple of the 3 key heads",
    ),
    (lambda: attend(scale="1"), TypeError, "scale must be a finite number; got str '1'"),
    (lambda: attend(scale=float("nan")), ValueError, "Leave it out for 1 / sqrt(head_dim)"),
    (
        lambda: attend(scale=x(1)),
        ValueError,
        "scale must be a finite number or a tensor of one; got shape (1,)",
    ),
    (lambda: attend(return_lse="no"), TypeError, "return_lse must be True or False; got str 'no'"),
    (
        lambda: attend(sink_logits=x(4).to(torch.complex64)),
        TypeError,
        "sink_logits must be real numbers; got torch.complex64",
    ),
    (
        lambda: attend(sink_logits=torch.arange(4)),
        TypeError,
        "sink_logits must be real numbers; got torch.int64",
    ),
    (
        lambda: attend(k=x().to("meta")),
        ValueError,
        "q, k and v must be on one device; got q on cpu and k on meta",
    ),
    (
        lambda: attend(q=x().to_sparse()),
        TypeError,
        "q must be a dense tensor; got a torch.sparse_coo one",
    ),
    (lambda: attend(data=[1]), TypeError, "data must be a dict of tensors by name; got list"),
    (lambda: attend(q_offset=-1), ValueError, "q_offset must be at least 0; got -1"),
    (lambda: attend(q_offset=2**63), ValueError, "q_offset must be at most 2**60"),
    (lambda: attend(q_offset=1.0), TypeError, "q_offset must be an integer; got float 1.0"),
    (
        lambda: attend(IDS, q_offset="3", data={"ids": x(2, 8, dtype=torch.int64)}),
        TypeError,
        "q_offset must be an integer; got str '3'",
    ),
    (
        lambda: attend(IDS),
        ValueError,
        "the program reads the data tensors ['ids']; got []. Pass data={name: tensor}",
    ),
    (
        lambda: attend(IDS, data={"id": x(2, 8)}),
        ValueError,
        "the program reads the data tensors ['ids']; got ['id']",
    ),
    (
        lambda: attend(data={"ids": x(2, 8)}),
        ValueError,
        "the program reads the data tensors []; got ['ids']",
    ),
    (
        lambda: attend(IDS, data={"ids": [0] * 8}),
        TypeError,
        "data['ids'] must be a bool or integer tensor; got list",
    ),
    (
        lambda: attend(IDS, data={"ids": x(2, 8)}),
        TypeError,
        "data['ids'] must be a bool or integer tensor; got torch.float32",
    ),
    (
        lambda: attend(PADDING, data={"pad": x(8, dtype=torch.bool)}),
        ValueError,
        "data['pad'] must be (batch or 1, tokens)",
    ),
    (
        lambda: attend(PADDING, data={"pad": x(3, 8, dtype=torch.bool)}),
        ValueError,
        "with batch 2 and at least 8 tokens; got shape (3, 8)",
    ),
    (
        lambda: attend(PADDING, data={"pad": x(2, 7, dtype=torch.bool)}),
        ValueError,
        "at least 8 tokens; got shape (2, 7)",
    ),
    (
        lambda: attend(PADDING, data={"pad": x(2, 8, dtype=torch.int64)}),
        TypeError,
        "data['pad'] must be a bool tensor",
    ),
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
    (
        lambda: attend(score_mod=3),
        TypeError,
        "score_mod must be a function of (score, b, h, q_idx, kv_idx); got int",
    ),
    (lambda: attend(score_mod=lambda s, b: s), TypeError, "(s, b): too many positional arguments"),
    (
        lambda: attend(score_mod=lambda s, b, h, i, j: None),
        TypeError,
        "must return a number as a tensor for each pair",
    ),
    (
        lambda: attend(score_mod=lambda s, b, h, i, j: i >= j),
        TypeError,
        "must return the new score; got torch.bool",
    ),
    (
        lambda: attend(score_mod=lambda s, b, h, i, j: s.expand(3)),
        ValueError,
        "one number for each pair, called with scalars",
    ),
    (
        lambda: attend(score_mod=lambda s, b, h, i, j: s if i > j else -s),
        ModError,
        "Write torch.where(condition, a, b)",
    ),
    (
        lambda: attend(score_mod=lambda s, b, h, i, j: s + torch.rand((), device=s.device)),
        ModError,
        "draws random numbers",
    ),
    (
        lambda: attend(masks.from_mod(lambda b, h, i, j: None)),
        TypeError,
        "must return a bool tensor for each pair; got NoneType",
    ),
    (
        lambda: attend(masks.from_mod(lambda b, h, i, j: i * 1.0)),
        TypeError,
        "must return a bool tensor; got torch.float32",
    ),
    (
        lambda: attend(Program((Branch(CAUSAL, heads=(0, 5)),))),
        ValueError,
        "names heads 0 to 5; the query has 4",
    ),
    (
        lambda: attend(masks.congruent(2, (0, 1))),
        ValueError,
        "names 2 offsets for 4 heads; give one per head or a single number",
    ),
    (
        lambda: attend(masks.neighborhood((2, 3), 1)),
        ValueError,
        "a grid of 6 tokens; got positions up to 8",
    ),
    (
        lambda: attend(masks.neighborhood((2, 4), 1), q=x(2, 4, 1, 4), q_offset=8),
        ValueError,
        "a grid of 8 tokens; got positions up to 9",
    ),
    (
        lambda: attend(cd.hilbert_window((3, 3), 1)),
        ValueError,
        "orders the 9 cells of its grid; got 8 tokens",
    ),
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
    (
        lambda: attend(q=x(requires_grad=True), lowering="flex"),
        ValueError,
        "torch has no backward of FlexAttention on a CPU",
    ),
    (
        lambda: attend(lowering="flex", return_lse=True),
        ValueError,
        "lowering 'flex' gives no lse on a CPU",
    ),
    (lambda: cd.compile(CAUSAL)(x(), x(), x(), None), TypeError, "positional argument"),
    (
        lambda: attend(dropout_p=0.1),
        TypeError,
        "takes no dropout_p=; there is no dropout of attention weights",
    ),
]
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
        "layout must be one of 'auto', 'contiguous', 'zigzag', 'striped', 'residue', 'hilbert'; got 'ring'",
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
