"""Programs that run forward and backward in Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import pretended  # isort: skip
from .project import cd

from compiled_dilated import masks  # isort: skip
from compiled_dilated.reference import multiplicity  # isort: skip
from compiled_dilated.tiles import splitting  # isort: skip

TOKENS = 300
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """A program and the tensors of a call.

    shape: (batch, query heads, queries, head dim).
    kv_heads, keys, value_dim: of k and v; None as in q.
    options: a function that makes further arguments of the call.
    backward: whether gradients are compared too.
    narrow: whether lists of tiles may have no padding, so that the mask falls into several parts.
    compiled: whether a compiled graph runs in place of the eager call.
    bad: whether keys, values and gradients contain some NaN and infinities.
    short: whether the case belongs to the short half.
    """

    program: Any
    lowering: str = "flex"
    shape: Shape = (1, 2, TOKENS, 16)
    kv_heads: int | None = None
    keys: int | None = None
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    options: Callable[[], dict[str, Any]] = field(default=dict)
    backward: bool = True
    narrow: bool = False
    compiled: bool = False
    bad: bool = False
    short: bool = False


def _documents() -> dict[str, Any]:
    """Random documents, and a sequence with padding."""
    ids = torch.randint(0, 3, (2, TOKENS)).sort()[0]
    padding = torch.arange(TOKENS)[None] < torch.tensor([[TOKENS], [250]])
    return {"data": {"ids": ids, "pad": padding}}


def _slopes() -> dict[str, Any]:
    """A score_mod with a learned slope for each head."""
    slopes = torch.rand(2, requires_grad=True)
    return {
        "score_mod": lambda score, b, h, q, kv: score + slopes[h] * (q - kv).abs() / 64,
        "learned": [slopes],
    }


def _at(q_offset: int) -> Callable[[], dict[str, Any]]:
    """The position of the first query."""
    return lambda: {"q_offset": q_offset}


_LOW = torch.bfloat16
_HALF = torch.float16
_ONE_HEAD, _TWO, _FOUR = (1, 1, 150, 16), (1, 2, TOKENS, 32), (1, 4, TOKENS, 16)
_BATCHES = (2, 4, TOKENS, 16)
_WINDOW = masks.causal() & masks.window(60)
_SINKS = masks.causal() & (masks.window(60) | masks.sinks(4))
_GLOBAL = masks.window(40) | masks.global_tokens(8)
_DATA = masks.documents(ids="ids") & masks.causal() & masks.padding("pad")
_DEAD = masks.documents(lengths=(100, 130, 20)) & masks.causal()
_LONGNET = cd.longnet((128, 256), (1, 2))
_ODD = cd.longnet((100, 256), (1, 3), causal=True)
_SPLIT = cd.longnet((128, 256), (1, 2), heads="split")
_THREE = cd.longnet((64, 128, 256), (1, 2, 4))
CASES: dict[str, Case] = {
    "causal": Case(masks.causal()),
    "window, bfloat16": Case(masks.window(60), dtype=_LOW, shape=_TWO, kv_heads=1),
    "window, float16": Case(masks.window(60), dtype=_HALF, shape=_TWO, kv_heads=1),
    "window, one tile whole": Case(_WINDOW, shape=(1, 2, 256, 64)),
    "window, wide values": Case(_WINDOW, value_dim=32),
    "sinks": Case(_SINKS),
    "sinks in parts": Case(_SINKS, narrow=True, shape=(1, 2, 640, 16), kv_heads=1, short=True),
    "global tokens": Case(_GLOBAL),
    "documents": Case(masks.documents(lengths=(100, 130, 70))),
    "documents and padding of data": Case(_DATA, shape=(2, 2, TOKENS, 16), options=_documents),
    "rows that see nothing": Case(masks.documents(lengths=(100,)), short=True),
    "longnet": Case(_LONGNET, shape=_FOUR, kv_heads=2),
    "longnet, causal, rates that divide nothing": Case(_ODD, short=True),
    "longnet, heads split": Case(_SPLIT, shape=_FOUR),
    "hilbert": Case(cd.hilbert_window((20, 15), 3)),
    "grouped queries": Case(_WINDOW, shape=_BATCHES, kv_heads=2),
    "score_mod with learned slopes": Case(_WINDOW, options=_slopes, short=True),
    "decoding": Case(
        masks.causal() & masks.window(200), shape=(1, 4, 5, 16), kv_heads=2, keys=700,
        options=_at(695), backward=False, short=True,
    ),
    "100 queries of grouped heads": Case(
        _WINDOW, shape=(1, 4, 100, 16), kv_heads=2, keys=400, options=_at(300), backward=False
    ),
    "lanes: causal": Case(masks.causal(), "lanes"),
    "lanes: full": Case(masks.full(), "lanes", shape=(1, 2, 200, 16)),
    "lanes: window": Case(masks.window(60, 20), "lanes"),
    "lanes: dilated window": Case(masks.window(60, 20, dilation=3), "lanes", short=True),
    "lanes: sinks": Case(_SINKS, "lanes"),
    "lanes: global tokens": Case(_GLOBAL, "lanes"),
    "lanes: prefix": Case(masks.causal() | masks.prefix(30), "lanes"),
    "lanes: documents, dead rows": Case(_DEAD, "lanes", short=True),
    "lanes: short segments": Case(masks.segments(20) | masks.window(3), "lanes", shape=_ONE_HEAD),
    "lanes: longnet": Case(_THREE, "lanes", shape=_BATCHES, kv_heads=2, short=True),
    "lanes: longnet, causal, rates that divide nothing": Case(_ODD, "lanes"),
    "lanes: longnet, heads split": Case(_SPLIT, "lanes", shape=_FOUR),
    "lanes: bfloat16, grouped queries": Case(
        masks.window(60), "lanes", dtype=_LOW, shape=_TWO, kv_heads=1
    ),
    "lanes: float16, widths 24 and 40": Case(
        cd.longnet((64, 128), (1, 2)), "lanes", dtype=_HALF, shape=(1, 2, TOKENS, 24), value_dim=40
    ),
    "lanes: decoding": Case(
        masks.causal() & masks.window(200), "lanes", shape=(1, 4, 5, 16), kv_heads=2, keys=700,
        options=_at(695),
    ),
    "lanes: bad numbers": Case(masks.window(30, 5), "lanes", bad=True, short=True),
    "lanes: bad numbers of longnet, bfloat16": Case(
        _ODD, "lanes", bad=True, dtype=_LOW, shape=_TWO, kv_heads=1
    ),
    "lanes in a graph": Case(
        _THREE, "lanes", shape=_BATCHES, kv_heads=2, compiled=True, short=True
    ),
    "lanes in a graph: bad numbers, dead rows": Case(_DEAD, "lanes", bad=True, compiled=True),
    "strided: longnet, bfloat16": Case(
        _LONGNET, "strided", dtype=_LOW, shape=_FOUR, kv_heads=2, short=True
    ),
    "tiled: sinks": Case(_SINKS, "tiled", short=True),
    "tiled: longnet, wide values": Case(_ODD, "tiled", value_dim=40),
    "dense: longnet, bfloat16": Case(_ODD, "dense", dtype=_LOW, shape=_TWO, short=True),
    "dense: score_mod with learned slopes": Case(_WINDOW, "dense", options=_slopes),
}  # fmt: skip


def error_of(case: Case) -> str | None:
    """The error of a case; None where results agree with the reference."""
    torch.manual_seed(0)
    options = case.options()
    tensors = _tensors(case)
    inputs = [*tensors, *options.pop("learned", [])]
    limits = splitting._ALWAYS_FITS, splitting._MOST_PADDING
    if case.narrow:
        splitting._ALWAYS_FITS, splitting._MOST_PADDING = 0, 1
    try:
        with torch.set_grad_enabled(case.backward):
            return _compared(case, tensors, inputs, options)
    finally:
        splitting._ALWAYS_FITS, splitting._MOST_PADDING = limits


def _tensors(case: Case) -> list[Tensor]:
    """q, k and v of a case."""
    batch, heads, queries, head_dim = case.shape
    of_keys = batch, case.kv_heads or heads, case.keys or queries
    shapes = case.shape, (*of_keys, head_dim), (*of_keys, case.value_dim or head_dim)
    q, k, v = (torch.randn(shape, dtype=case.dtype) for shape in shapes)
    if case.bad:
        # A key of all numbers, one of one number, and a value.
        k[:, :, 90] = torch.nan
        k[:, 0, 130, 3] = -torch.inf
        v[:, :, 60, 5] = torch.inf
    return [x.requires_grad_(case.backward) for x in (q, k, v)]


def _compared(
    case: Case, tensors: list[Tensor], inputs: list[Tensor], options: dict[str, Any]
) -> str | None:
    """What differs from the reference, forward and backward."""
    attend = cd.compile(case.program, lowering=case.lowering)
    call = torch.compile(attend, fullgraph=True) if case.compiled else attend
    # Without graphs of other shapes, after which Dynamo would let shapes vary.
    torch._dynamo.reset()
    pretended.KERNELS.clear()
    out, lse = call(*tensors, return_lse=True, **options)
    if case.compiled and "forward" not in dict(pretended.KERNELS):
        return "the graph does not hold the kernel of lanes"
    true, true_lse = cd.reference(attend.program, *tensors, return_lse=True, **options)
    alive = true_lse != -torch.inf
    if not (lse[~alive] == -torch.inf).all() or (out[~alive] != 0).any():
        return "rows that see nothing are not (0, -inf)"
    pairs = {"out": (out, true), "lse": (lse[alive], true_lse[alive])}
    if not case.backward:
        return _worst(pairs, case.dtype)
    grad_out = torch.randn_like(out)
    if case.bad:
        grad_out[:, 0, 200, 4] = torch.inf
    weights = grad_out, torch.where(alive, torch.randn_like(lse), 0)
    grads = torch.autograd.grad((out, lse), inputs, weights)
    expected = _expected(case, attend.program, tensors, inputs, (true, true_lse), weights)
    names = ("grad q", "grad k", "grad v", *("grad of an operand" for _ in inputs[3:]))
    for number, (name, *pair) in enumerate(zip(names, grads, expected, strict=True)):
        pairs[f"{name} {number}"] = (pair[0], pair[1])
    return _worst(pairs, case.dtype)


def _expected(
    case: Case,
    program: Any,
    tensors: list[Tensor],
    inputs: list[Tensor],
    results: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """The gradients of the reference.

    With bad numbers: NaN in rows that see some and in keys that such rows see, and elsewhere the
    gradients of clean tensors without these rows.
    """
    wide = [x.double() for x in weights]
    if not case.bad:
        return torch.autograd.grad(results, inputs, wide)
    bad_rows = results[1].isnan()
    for x in (results[0], wide[0]):
        bad_rows = bad_rows | ~x.isfinite().all(dim=-1)
    clean = [x.detach().nan_to_num(0.0, 0.0, 0.0).requires_grad_() for x in tensors]
    outputs = cd.reference(program, *clean, return_lse=True)
    dead = outputs[1] == -torch.inf
    wide[0] = wide[0].masked_fill(bad_rows[..., None], 0.0)
    wide[1] = wide[1].masked_fill(bad_rows | dead, 0.0)
    grad_q, grad_k, grad_v = torch.autograd.grad(outputs, clean, wide)
    counts = multiplicity(program, clean[0], clean[1]) > 0
    reached = (counts & bad_rows[..., None]).any(dim=2)
    reached = reached.unflatten(1, (tensors[1].shape[1], -1)).any(dim=2)[..., None]
    return (
        grad_q.masked_fill(bad_rows[..., None], torch.nan),
        grad_k.masked_fill(reached, torch.nan),
        grad_v.masked_fill(reached, torch.nan),
    )


def _worst(pairs: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> str | None:
    """The first result that differs by over a few roundings."""
    roundings = {torch.float32: 64, torch.bfloat16: 6, torch.float16: 6}[dtype]
    for name, (result, right) in pairs.items():
        if not torch.equal(result.isnan(), right.isnan()):
            count = int((result.isnan() != right.isnan()).sum())
            return f"{name} is NaN where it should not be, or the reverse: {count} numbers"
        # The gradient of an operand is a sum over all pairs.
        terms = 8 if name.startswith("grad of an operand") else 1
        allowed = terms * roundings * torch.finfo(dtype).eps * max(1.0, _size(right))
        error = _distance(result, right)
        if not error <= allowed:
            return f"{name} is off by {error:.1e}; {allowed:.1e} is allowed"
    return None


def _size(x: Tensor) -> float:
    """The largest finite magnitude; 0 of no numbers."""
    if not x.numel():
        return 0.0
    return float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _distance(result: Tensor, right: Tensor) -> float:
    """The largest difference, apart from places where both are NaN."""
    if not result.numel():
        return 0.0
    nan_in_both = result.isnan() & right.isnan()
    return float((result.double() - right).detach().masked_fill(nan_in_both, 0.0).abs().max())
