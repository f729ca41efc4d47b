"""A program or mask as a callable: checks what it is given, then runs as one operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import arguments, autograd, checks, for_passes, operators, planner
from .decoding import Decoder
from .lowerings.flex import gives_lse
from .masks import Mask
from .mods import ScoreMod, check_callable
from .partials import lse_dtype, merge
from .programs import PerLength, Program, as_program, check_data, query_names_of
from .ring.rings import Ring
from .rules import Bound, Skeleton, bind, read_rule

for_passes.tell()


class Attend:
    """Attention by a program. Called with q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv); Hq a multiple of Hkv."""

    def __init__(self, program: Program | Mask | PerLength, lowering: str = "auto", ring: Ring | None = None) -> None:
        self.program = program if isinstance(program, PerLength) else as_program(program)
        self.lowering = arguments.choice("lowering", lowering, planner.LOWERINGS)
        if ring is not None and lowering != "auto":
            raise ValueError(f"each block of a ring is lowered as it is best; got lowering={lowering!r}. Leave it at 'auto'")
        self.ring, self._names = ring, self.program.names
        self._query_names = query_names_of(self.program)
        self._skeleton = Skeleton(self.program, lowering, ring)
        decodes = ring is None and lowering == "auto" and not self._skeleton.mask_mods
        self._decoder = Decoder(self.program) if decodes else None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        q_offset: int | Tensor = 0,
        data: Mapping[str, Tensor] | None = None,
        score_mod: ScoreMod | None = None,
        sink_logits: Tensor | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        """out (B, Hq, N, Dv) in the dtype of q; with `return_lse` also lse (B, Hq, N), differentiable.

        Where q lies token by token in memory, as a view of (B, N, Hq, D), out does too, and its heads are joined without a copy.
        The lse is float32 (float64 for float64 inputs).

        scale: of q . k, any finite number, default 1 / sqrt(D). A tensor of one number, which may be learned, multiplies q.
        q_offset: the position of the first query, for decoding against a cache; an int64 tensor (B,) of one for each sequence.
        data: tensors that the masks read, by name, (B or 1, tokens).
        score_mod: FlexAttention's score_mod(score, b, h, q_idx, kv_idx), called with scalars and traced at every call. Tensors
            that it captures get gradients; over torch.distributed each rank has those of its own queries, as of any weight.
        sink_logits: (Hq,), one learned logit per head that joins the softmax with value 0.

        What hidden keys and values hold, NaN and infinity too, reaches neither a result nor a gradient; a query that sees such a
        number gets NaN.

        Raises TypeError or ValueError where arguments do not fit, before anything is computed, and on every rank of a ring.
        """
        bare = data is None and score_mod is None and sink_logits is None and return_lse is False and not options
        decoder = self._decoder if bare and not is_compiling() else None
        if decoder is not None and (row := decoder(q, k, v, scale, q_offset)) is not None:
            return row
        q, k, v = _autocast(q, k, v)
        skeleton = self._skeleton
        has_functions = score_mod is not None or bool(skeleton.mask_mods)
        bound = skeleton.plain
        try:
            checks.no_options_of_sdpa(options)
            tensors = self._checked(q, k, v, scale, q_offset, data, score_mod, sink_logits, return_lse)
            if has_functions and not is_compiling():
                bound = bind(skeleton.frame, skeleton.literals, skeleton.mask_mods, score_mod, lse_dtype(q.dtype))
                checks.captured(bound.operands[len(skeleton.literals) :], q.device)
        except Exception as error:  # of a user's function too: other ranks wait for this one
            if self.ring is not None and not is_compiling():
                self.ring.transport.refuse(error)
            raise
        q, number = _scaled(q, scale)
        q_offset = 0 if isinstance(q_offset, Tensor) else checks.q_offset(q_offset)
        wants_lse = return_lse or sink_logits is not None
        if has_functions and is_compiling():
            out, lse = _attend_with_functions()(
                skeleton.frame, q, k, v, tensors, skeleton.literals, number, q_offset, wants_lse, skeleton.mask_mods, score_mod
            )
        else:
            # The text makes a ring of its own in a compiled graph; in eager mode the ledger of this one is written.
            ring = None if is_compiling() else self.ring
            out, lse = autograd.attend_bound(bound, q, k, v, tensors, number, q_offset, wants_lse, ring)
        if decoder is not None:
            decoder.learn(q, k, v)
        if sink_logits is not None:
            out, lse = _with_sinks(out, lse, sink_logits)
        return (out, lse) if return_lse else out

    def _checked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: object,
        q_offset: object,
        data: Mapping[str, Tensor] | None,
        score_mod: object,
        sink_logits: object,
        return_lse: object,
    ) -> list[Tensor]:
        """The data tensors in order, once everything fits."""
        if scale is not None:
            checks.scale("scale", scale)
        arguments.flag("return_lse", return_lse)
        checks.tensors(q, k, v)
        offset = checks.last_offset(q_offset, q.shape[0], q.device)
        if self.ring is not None and (isinstance(q_offset, Tensor) or offset or q.shape[2] != k.shape[2]):
            raise ValueError(
                f"a ring deals out one sequence; got {q.shape[2]} queries at offset {q_offset} and {k.shape[2]} keys. "
                "Compile without ranks for cross attention and decoding"
            )
        shape = checks.Shape(q.shape[0], offset + q.shape[2], k.shape[2], q.device)
        tensors = checks.data(self._names, self._query_names, data, shape)
        if data:
            check_data(self.program, data)
        if score_mod is not None:
            check_callable("score_mod", score_mod, scores=True)
        if sink_logits is not None:
            checks.sinks(sink_logits, q.shape[1], q.device)
        if self.lowering == "flex" and not gives_lse(q.device.type) and (return_lse or sink_logits is not None):
            raise ValueError(
                "lowering 'flex' gives no lse on a CPU, which return_lse and sink_logits need. "
                "Use lowering='auto', 'strided' or 'tiled'"
            )
        return [*tensors, q_offset[:, None]] if isinstance(q_offset, Tensor) else tensors

    def plan(self, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int = 0) -> Any:
        """The `Plan` that a call with these tensors follows, the `RingPlan` where there are ranks."""
        checks.tensors(q, k, v)
        skeleton = self._skeleton
        bound = bind(skeleton.frame, skeleton.literals, skeleton.mask_mods, None, lse_dtype(q.dtype))
        rule = read_rule(bound.rule, bound.operands)
        if self.ring is not None:
            return self.ring.plan(operators.ring_problem(rule, bound.rule, self.ring, q, k, v))
        return operators.plan_of(rule, q, k, v, checks.q_offset(q_offset), autograd.trains(q, k, v))

    def __reduce__(self) -> tuple[Any, ...]:
        return Attend, (self.program, self.lowering, self.ring)

    def __repr__(self) -> str:
        lowering = "" if self.lowering == "auto" else f", lowering={self.lowering!r}"
        ring = "" if self.ring is None else f", {self.ring!r}"
        return f"compile({self.program!r}{lowering}{ring})"


def attend_in_graph(
    frame: str,
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    data: Sequence[Tensor],
    *,
    scale: float | None = None,
    q_offset: int | Tensor = 0,
    score_mod: ScoreMod | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention by a rule as text, where torch.compile traces and no `Attend` can be made.

    frame, rule: of a `Skeleton` without functions and literals. data: the tensors that its masks read, in the order of their
    names. The rest as in a call of `Attend`, whose checks the maker of the rule vouches for.
    """
    q, k, v = _autocast(q, k, v)
    q, number = _scaled(q, scale)
    tensors = [*data]
    if isinstance(q_offset, Tensor):
        tensors.append(q_offset[:, None])
        q_offset = 0
    wants_lse = sink_logits is not None
    if score_mod is None:
        out, lse = autograd.attend_bound(Bound(rule, ()), q, k, v, tensors, number, q_offset, wants_lse)
    else:
        attend_with_functions = _attend_with_functions()
        out, lse = attend_with_functions(frame, q, k, v, tensors, (), number, q_offset, wants_lse, (), score_mod)
    return out if sink_logits is None else _with_sinks(out, lse, sink_logits)[0]


def _with_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """A result with one more logit for each head, whose value is 0."""
    logits = sink_logits.to(lse.dtype)[None, :, None].expand(lse.shape)
    return merge(out, lse, torch.zeros_like(out), logits)


def _attend_with_functions() -> Callable[..., tuple[Tensor, Tensor]]:
    # It imports the compiler, which takes longer than all of this package.
    from .dynamo import attend_with_functions

    return attend_with_functions


def _scaled(q: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
    """q and the number that scales q . k: a tensor, or a number that varies in a compiled graph, multiplies q itself."""
    if scale is None:
        return q, 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    if isinstance(scale, Tensor):
        return q * scale.to(q.dtype), 1.0
    return (q * scale, 1.0) if _varies(scale) else (q, float(scale))


def _varies(number: float) -> bool:
    """Whether a number is symbolic in the graph that is being made."""
    if not is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # Of a constant one of the two holds. At an odd number, for what comparisons elsewhere have settled is known too.
    return not (statically_known_true(number > 0.0123) or statically_known_true(number <= 0.0123))


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast attention runs in the lower precision, as torch's own does."""
    if not isinstance(q, Tensor) or q.device.type == "meta" or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    lower = torch.get_autocast_dtype(q.device.type)
    return tuple(
        x.to(lower) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x
        for x in (q, k, v)
    )  # type: ignore[return-value]
