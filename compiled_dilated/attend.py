"""A program or mask as a callable: checks what it is given, then runs as one operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import arguments, for_passes, operators, planner
from .decoding import Decoder
from .masks import Mask
from .partials import merge
from .plans import BYTES
from .programs import PerLength, Program, as_program
from .ring.rings import Ring

ScoreMod = Callable[..., Any]

_DTYPES = frozenset(getattr(torch, name) for name in BYTES)

for_passes.tell()


class Attend:
    """Attention by a program. Called with q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv); Hq a multiple of Hkv."""

    def __init__(self, program: Program | Mask | PerLength, lowering: str = "auto", ring: Ring | None = None) -> None:
        self.program = program if isinstance(program, PerLength) else as_program(program)
        self.lowering = arguments.choice("lowering", lowering, planner.LOWERINGS)
        if ring is not None and lowering != "auto":
            raise ValueError(f"each block of a ring is lowered as it is best; got lowering={lowering!r}. Leave it at 'auto'")
        self.ring, self._names = ring, self.program.names
        self._bare = operators.handle_of(self.program, lowering, ring)
        self._decoder = Decoder(self._bare) if ring is None and planner.takes_any_offset(1, False, lowering) else None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        q_offset: int = 0,
        data: Mapping[str, Tensor] | None = None,
        score_mod: ScoreMod | None = None,
        sink_logits: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """out (B, Hq, N, Dv) in the dtype of q; with `return_lse` also lse (B, Hq, N), differentiable.

        Where q lies token by token in memory, as a view of (B, N, Hq, D), out does too, and its heads are joined without a copy.
        The lse is float32 (float64 for float64 inputs). scale: of q . k, default 1 / sqrt(D). q_offset: the position of the first
        query, for decoding against a cache. data: tensors that the masks read, by name. score_mod: FlexAttention's
        score_mod(score, b, h, q_idx, kv_idx); tensors that it captures get no gradient. sink_logits: (Hq,), one learned logit per
        head that joins the softmax with value 0.
        """
        if scale is not None:
            _check_scale(scale)
        bare = data is None and score_mod is None and sink_logits is None and not return_lse
        decoder = self._decoder if bare else None
        if decoder is not None and (row := decoder(q, k, v, scale, q_offset)) is not None:
            return row
        q, k, v = _autocast(q, k, v)
        _check_tensors(q, k, v)
        offset = q_offset if isinstance(q_offset, torch.SymInt) else arguments.integer("q_offset", q_offset, 0)
        tensors = _check_data(self.program, self._names, data, q, k, offset)
        if self.ring is not None and (offset or q.shape[2] != k.shape[2]):
            raise ValueError(
                f"a ring deals out one sequence; got {q.shape[2]} queries at offset {offset} and {k.shape[2]} keys. "
                "Compile without ranks for cross attention and decoding"
            )
        handle = self._bare
        if score_mod is not None:
            handle = operators.with_score_mod(self._bare, _check_score_mod(score_mod))
        if self.lowering == "flex" and q.device.type == "cpu" and (return_lse or sink_logits is not None):
            raise ValueError(
                "lowering 'flex' gives no lse on a CPU, which return_lse and sink_logits need. "
                "Use lowering='auto', 'strided' or 'tiled'"
            )
        if scale is None:
            scale = 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
        wants_lse = return_lse or sink_logits is not None
        out, lse = operators.attend(q, k, v, handle, float(scale), offset, tensors, wants_lse)
        if decoder is not None:
            decoder.learn(q, k, v, offset)
        if sink_logits is not None:
            _check_sinks(sink_logits, q)
            logits = sink_logits.to(lse.dtype)[None, :, None].expand(lse.shape)
            out, lse = merge(out, lse, torch.zeros_like(out), logits)
        return (out, lse) if return_lse else out

    def plan(self, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int = 0) -> Any:
        """The `Plan` that a call with these tensors follows, the `RingPlan` where there are ranks."""
        _check_tensors(q, k, v)
        if self.ring is not None:
            return self.ring.plan(operators.ring_problem(self._bare, q, k, v))
        return operators.plan_of(self._bare, q, k, v, arguments.integer("q_offset", q_offset, 0), operators.trains(q, k, v))

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew, because the process that unpickles it has not registered the program under its handle.
        return Attend, (self.program, self.lowering, self.ring)

    def __repr__(self) -> str:
        lowering = "" if self.lowering == "auto" else f", lowering={self.lowering!r}"
        ring = "" if self.ring is None else f", {self.ring!r}"
        return f"compile({self.program!r}{lowering}{ring})"


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast attention runs in the lower precision, as torch's own does."""
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x
        for x in (q, k, v)
    )  # type: ignore[return-value]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}. Convert it with torch.as_tensor")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, head_dim); got shape {tuple(x.shape)}. Add the missing dimensions"
            )
        check_dtype(name, x.dtype)
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype; got q {q.dtype} and {name} {x.dtype}. Cast with {name}.to(q.dtype)")
        if x.device != q.device:
            raise ValueError(
                f"q, k and v must be on one device; got q on {q.device} and {name} on {x.device}. "
                f"Move it with {name}.to(q.device)"
            )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, heads and tokens; got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q and k must have one batch size; got q {tuple(q.shape)} and k {tuple(k.shape)}. Expand the smaller one"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim; got q {tuple(q.shape)} and k {tuple(k.shape)}")
    check_groups(q.shape[1], k.shape[1])


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise unless attention is computed in this dtype."""
    if dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}. Cast it first")


def check_groups(heads: int, kv_heads: int) -> None:
    """Raise unless the key heads serve equally many query heads each."""
    if (kv_heads == 0 and heads != 0) or (kv_heads != 0 and heads % kv_heads):
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key heads, so that they share evenly")


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(
            f"scale must be a finite number; got {type(scale).__name__} {scale!r}. Leave it out for 1 / sqrt(head_dim)"
        )


def _check_data(
    program: Program | PerLength,
    names: tuple[str, ...],
    data: Mapping[str, Tensor] | None,
    q: Tensor,
    k: Tensor,
    q_offset: int,
) -> list[Tensor]:
    given = data or {}
    if set(given) != set(names):
        raise ValueError(
            f"the program reads the data tensors {list(names)}; got {sorted(given)}. "
            "Pass data={name: tensor} with exactly those"
        )
    branches = () if isinstance(program, PerLength) else program.branches
    query_names = {name for branch in branches for name in branch.mask.query_names}
    out = []
    for name in names:
        x = given[name]
        if not isinstance(x, Tensor) or x.dtype.is_floating_point or x.dtype.is_complex:
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"data[{name!r}] must be a bool or integer tensor; got {came}")
        tokens = k.shape[2]
        if name in query_names and q_offset + q.shape[2] > tokens:
            tokens = q_offset + q.shape[2]
        if x.dim() != 2 or x.shape[0] not in (1, q.shape[0]) or x.shape[1] < tokens:
            raise ValueError(
                f"data[{name!r}] must be (batch or 1, tokens) with batch {q.shape[0]} and at least {tokens} tokens; "
                f"got shape {tuple(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"data[{name!r}] must be on the device of q, {q.device}; got {x.device}. Move it with .to(q.device)")
        out.append(x.expand(q.shape[0], x.shape[1]))
    return out


def _check_sinks(sink_logits: Tensor, q: Tensor) -> None:
    if not isinstance(sink_logits, Tensor) or tuple(sink_logits.shape) != (q.shape[1],):
        came = tuple(sink_logits.shape) if isinstance(sink_logits, Tensor) else type(sink_logits).__name__
        raise ValueError(f"sink_logits must be a tensor of one logit per query head, shape ({q.shape[1]},); got {came}")


def _check_score_mod(score_mod: ScoreMod) -> ScoreMod:
    if not callable(score_mod):
        raise TypeError(f"score_mod must be a function of (score, b, h, q_idx, kv_idx); got {type(score_mod).__name__}")
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        zero = torch.zeros((), dtype=torch.int64)
        if _needs_grad(score_mod(torch.zeros(()), zero, zero, zero, zero)):
            raise ValueError(
                "score_mod reads a tensor that requires grad, and would get none: "
                "only q, k, v and sink_logits are differentiated. "
                "Detach it, or use compiled_dilated.reference"
            )
    return score_mod


def _needs_grad(score: object) -> bool:
    return isinstance(score, Tensor) and score.requires_grad
