"""Cases of programs that are run forward and backward in Triton's interpreter, each against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .project import cd, pretended

from compiled_dilated import masks  # isort: skip
from compiled_dilated.tiles import splitting  # isort: skip

TOKENS = 300


@dataclass(frozen=True)
class Case:
    """A program and the tensors it is called with.

    shape: (batch, query heads, queries, head dim). kv_heads, keys, value_dim: of k and v; None as in q.
    options: further arguments of the call, made for the case. backward: whether gradients are compared too.
    narrow: whether lists of tiles may hold no padding, so that the mask falls into several parts.
    short: whether the case belongs to the short half.
    """

    program: Any
    lowering: str = "flex"
    shape: tuple[int, int, int, int] = (1, 2, TOKENS, 16)
    kv_heads: int | None = None
    keys: int | None = None
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    options: Callable[[], dict[str, Any]] = field(default=dict)
    backward: bool = True
    narrow: bool = False
    short: bool = False


def _documents() -> dict[str, Any]:
    ids = torch.randint(0, 3, (2, TOKENS)).sort()[0]
    return {
        "data": {"ids": ids, "pad": torch.arange(TOKENS)[None] < torch.tensor([[TOKENS], [250]])}
    }


def _slopes() -> dict[str, Any]:
    slopes = torch.rand(2, requires_grad=True)
    return {
        "score_mod": lambda score, b, h, q, kv: score + slopes[h] * (q - kv).abs() / 64,
        "learned": [slopes],
    }


_WINDOW = masks.causal() & masks.window(60)
_SINKS = masks.causal() & (masks.window(60) | masks.sinks(4))
CASES: dict[str, Case] = {
    "causal": Case(masks.causal(), short=True),
    "window, bfloat16": Case(masks.window(60), dtype=torch.bfloat16, shape=(1, 2, TOKENS, 32), kv_heads=1),
    "window, float16": Case(masks.window(60), dtype=torch.float16, shape=(1, 2, TOKENS, 32), kv_heads=1),
    "window, one tile whole": Case(_WINDOW, shape=(1, 2, 256, 64)),
    "window, wide values": Case(_WINDOW, value_dim=32),
    "sinks": Case(_SINKS, short=True),
    "sinks in parts": Case(_SINKS, narrow=True, shape=(1, 2, 640, 16), kv_heads=1, short=True),
    "global tokens": Case(masks.window(40) | masks.global_tokens(8)),
    "documents": Case(masks.documents(lengths=(100, 130, 70))),
    "documents and padding of data": Case(
        masks.documents(ids="ids") & masks.causal() & masks.padding("pad"), shape=(2, 2, TOKENS, 16), options=_documents
    ),
    "rows that see nothing": Case(masks.documents(lengths=(100,)), short=True),
    "longnet": Case(cd.longnet((128, 256), (1, 2)), shape=(1, 4, TOKENS, 16), kv_heads=2),
    "longnet, causal, rates that divide nothing": Case(cd.longnet((100, 256), (1, 3), causal=True), short=True),
    "longnet, heads split": Case(cd.longnet((128, 256), (1, 2), heads="split"), shape=(1, 4, TOKENS, 16)),
    "hilbert": Case(cd.hilbert_window((20, 15), 3), short=True),
    "grouped queries": Case(_WINDOW, shape=(2, 4, TOKENS, 16), kv_heads=2),
    "score_mod with learned slopes": Case(_WINDOW, options=_slopes, short=True),
    "decoding": Case(
        masks.causal() & masks.window(200), shape=(1, 4, 5, 16), kv_heads=2, keys=700, backward=False,
        options=lambda: {"q_offset": 695}, short=True,
    ),
    "100 queries of grouped heads": Case(
        _WINDOW, shape=(1, 4, 100, 16), kv_heads=2, keys=400, backward=False, options=lambda: {"q_offset": 300}
    ),
    "lanes: causal": Case(masks.causal(), "lanes", short=True),
    "lanes: full": Case(masks.full(), "lanes", shape=(1, 2, 200, 16)),
    "lanes: window": Case(masks.window(60, 20), "lanes"),
    "lanes: dilated window": Case(masks.window(60, 20, dilation=3), "lanes", short=True),
    "lanes: sinks": Case(_SINKS, "lanes", short=True),
    "lanes: global tokens": Case(masks.window(40) | masks.global_tokens(8), "lanes"),
    "lanes: prefix": Case(masks.causal() | masks.prefix(30), "lanes"),
    "lanes: documents, dead rows": Case(masks.documents(lengths=(100, 130, 20)) & masks.causal(), "lanes", short=True),
    "lanes: segments shorter than a tile": Case(masks.segments(20) | masks.window(3), "lanes", shape=(1, 1, 150, 16)),
    "lanes: longnet": Case(
        cd.longnet((64, 128, 256), (1, 2, 4)), "lanes", shape=(2, 4, TOKENS, 16), kv_heads=2, short=True
    ),
    "lanes: longnet, causal, rates that divide nothing": Case(cd.longnet((100, 256), (1, 3), causal=True), "lanes"),
    "lanes: longnet, heads split": Case(cd.longnet((128, 256), (1, 2), heads="split"), "lanes", shape=(1, 4, TOKENS, 16)),
    "lanes: bfloat16, grouped queries": Case(
        masks.window(60), "lanes", dtype=torch.bfloat16, shape=(1, 2, TOKENS, 32), kv_heads=1
    ),
    "lanes: float16, widths 24 and 40": Case(
        cd.longnet((64, 128), (1, 2)), "lanes", dtype=torch.float16, shape=(1, 2, TOKENS, 24), value_dim=40
    ),
    "lanes: decoding": Case(
        masks.causal() & masks.window(200), "lanes", shape=(1, 4, 5, 16), kv_heads=2, keys=700,
        options=lambda: {"q_offset": 695},
    ),
}  # fmt: skip


def error_of(case: Case) -> str | None:
    """What is wrong with a case, None where everything agrees with the reference."""
    torch.manual_seed(0)
    batch, heads, queries, head_dim = case.shape
    of_keys = batch, case.kv_heads or heads, case.keys or queries
    q = torch.randn(case.shape, dtype=case.dtype, requires_grad=case.backward)
    k = torch.randn(*of_keys, head_dim, dtype=case.dtype, requires_grad=case.backward)
    v = torch.randn(
        *of_keys, case.value_dim or head_dim, dtype=case.dtype, requires_grad=case.backward
    )
    options = case.options()
    inputs = [q, k, v, *options.pop("learned", [])]
    limits = splitting._ALWAYS_FITS, splitting._MOST_PADDING
    if case.narrow:
        splitting._ALWAYS_FITS, splitting._MOST_PADDING = 0, 1
    try:
        with torch.set_grad_enabled(case.backward):
            attend = cd.compile(case.program, lowering=case.lowering)
            out, lse = attend(q, k, v, return_lse=True, **options)
            true, true_lse = cd.reference(attend.program, q, k, v, return_lse=True, **options)
            seen = true_lse != -torch.inf
            if not (lse[~seen] == -torch.inf).all() or (out[~seen] != 0).any():
                return "rows that see nothing are not (0, -inf)"
            pairs = {"out": (out, true), "lse": (lse[seen], true_lse[seen])}
            if case.backward:
                weights = torch.randn_like(out), torch.where(seen, torch.randn_like(lse), 0)
                ours = torch.autograd.grad((out, lse), inputs, weights)
                theirs = torch.autograd.grad(
                    (true, true_lse), inputs, [x.double() for x in weights]
                )
                names = ("grad q", "grad k", "grad v", *("grad of an operand" for _ in inputs[3:]))
                pairs |= {
                    f"{name} {number}": pair
                    for number, (name, *pair) in enumerate(zip(names, ours, theirs, strict=True))
                }
    finally:
        splitting._ALWAYS_FITS, splitting._MOST_PADDING = limits
    return _worst(pairs, case.dtype)


def _worst(pairs: dict[str, Any], dtype: torch.dtype) -> str | None:
    """The result that is farthest off, where it is too far off: a few roundings of the dtype."""
    roundings = {torch.float32: 64, torch.bfloat16: 6, torch.float16: 6}[dtype]
    for name, (ours, theirs) in pairs.items():
        # The gradient of an operand is a sum over all pairs.
        terms = 8 if name.startswith("grad of an operand") else 1
        allowed = terms * roundings * torch.finfo(dtype).eps * max(1.0, float(theirs.abs().max()))
        error = _distance(ours, theirs)
        if not error <= allowed:
            return f"{name} is off by {error:.1e}; {allowed:.1e} is allowed"
    return None


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; NaN where there is one."""
    return float((ours.double() - theirs).detach().abs().max()) if ours.numel() else 0.0


assert pretended.MODE in ("interpret", "compile")
