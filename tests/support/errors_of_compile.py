"""Rows of bad input: compile and its calls."""

from __future__ import annotations

import torch

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks
from compiled_dilated.mods import ModError
from tests.support.errors_of_programs import CAUSAL, IDS, PADDING, WINDOW, Row, attend, x

COMPILE: list[Row] = [
    (
        lambda: cd.compile(lambda b, h, q, kv: q >= kv),  # type: ignore[call-overload]
        TypeError,
        "expected a Program or a mask; got function. Pass masks.from_mod(fn) for a function",
    ),
    (
        lambda: CAUSAL & (lambda b, h, q, kv: q >= kv),  # type: ignore[operator]
        TypeError,
        "Pass masks.from_mod(fn) for a function of FlexAttention; call masks.causal()",
    ),
    (
        lambda: cd.compile(lambda x: x, attention=CAUSAL),  # type: ignore[call-overload]
        TypeError,
        "are for models, torch.nn.Module; got function. Wrap a function in a module",
    ),
    (
        lambda: attend(q=torch.nested.nested_tensor([torch.zeros(4, 1, 4)] * 2)),
        TypeError,
        "q must be a dense tensor; got a nested one",
    ),
    (
        lambda: cd.compile([CAUSAL]),  # type: ignore[call-overload]
        TypeError,
        "expected a Program or a mask; got list",
    ),
    (
        lambda: cd.compile(CAUSAL, lowering="fast"),
        ValueError,
        "lowering must be one of 'auto', 'native', 'dense', 'strided', 'tiled', 'flex', 'lanes'; "
        "got 'fast'",
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
        lambda: attend(q=x(2, 4, 8, 0), k=x(2, 4, 8, 0)),
        ValueError,
        "q and k must have a head_dim of 1 at least; got 0",
    ),
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
    (
        lambda: cd.compile(CAUSAL)(x(), x(), x(), None),  # type: ignore[call-arg]
        TypeError,
        "positional argument",
    ),
    (
        lambda: attend(dropout_p=0.1),
        TypeError,
        "takes no dropout_p=; there is no dropout of attention weights",
    ),
]
