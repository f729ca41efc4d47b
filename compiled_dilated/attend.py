"""Attend: a program or mask as a callable, run as one operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, autograd, call_checks, checks, execution, for_passes, planner
from .decoding import Decoder
from .inputs import autocast, scaled
from .lowerings.flex import gives_lse
from .masks import Mask
from .mods import ScoreMod, check_callable
from .partials import lse_dtype, merge
from .programs import PerLength, Program, as_program, check_data, query_names_of
from .ring.rings import Ring
from .rules import Bound, Skeleton, bind, read_rule
from .tracing import is_traced

for_passes.register()


class _Arguments(NamedTuple):
    """The arguments of a call; q, k and v in autocast's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | Tensor | None
    q_offset: int | Tensor
    data: Mapping[str, Tensor] | None
    score_mod: ScoreMod | None
    sink_logits: Tensor | None
    return_lse: bool

    @property
    def needs_lse(self) -> bool:
        """Whether the lse is returned, or joins sinks."""
        return self.return_lse or self.sink_logits is not None


class Attend:
    """Attention by a program, a callable.

    q: (B, Hq, N, D), Hq a multiple of Hkv.
    k: (B, Hkv, M, D).
    v: (B, Hkv, M, Dv).

    tensor_layout: of the tensors that the user passes. A module that transposes them has checked
        their axes itself.
    """

    def __init__(
        self,
        program: Program | Mask | PerLength,
        lowering: str = "auto",
        ring: Ring | None = None,
        tensor_layout: checks.Layout = checks.HEADS_FIRST,
    ) -> None:
        if not isinstance(program, PerLength):
            program = as_program(program)
        self.program = program
        self.lowering = arguments.choice("lowering", lowering, planner.LOWERINGS)
        if ring is not None and lowering != "auto":
            raise ValueError(
                f"each block of a ring is lowered as it is best; got lowering={lowering!r}. "
                "Leave it at 'auto'"
            )
        self.ring, self.tensor_layout = ring, tensor_layout
        self._names = self.program.names
        self._query_names = query_names_of(self.program)
        self._skeleton = Skeleton(self.program, lowering, ring)
        self._decoder: Decoder | None = None
        if ring is None and lowering == "auto" and not self._skeleton.mask_mods:
            self._decoder = Decoder(self.program)

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
        """Attention of q, k and v.

        Returns out (B, Hq, N, Dv) in the dtype of q; with `return_lse` also lse (B, Hq, N), float32
        or, for float64 inputs, float64. Both are differentiable. If q is laid out token by token,
        as a view of (B, N, Hq, D), so is out, and its heads are joined without a copy. Hidden keys
        and values, NaN and infinity too, affect neither results nor gradients; a query that sees a
        number that is not finite has NaN as its result.

        Args:
            scale: of q . k, any finite number, default 1 / sqrt(D). A tensor of one number, which
                may be learned, multiplies q.
            q_offset: position of the first query, for decoding against a cache; an int64 tensor
                (B,) of one for each sequence.
            data: tensors that the masks read, by name, (B or 1, tokens).
            score_mod: FlexAttention's score_mod(score, b, h, q_idx, kv_idx), called with scalars
                and traced at every call. Tensors that it captures receive gradients; over
                torch.distributed each rank has those of its own queries, as of any weight.
            sink_logits: (Hq,), one learned logit per head that joins the softmax with value 0.

        Raises TypeError or ValueError for arguments that do not fit, before anything is computed,
        and on every rank of a ring.
        """
        # 1. Decoding of one query, if an earlier call of the same kind passed all checks.
        decoder = self._decoder
        has_options = data is not None or score_mod is not None or sink_logits is not None
        if is_traced() or has_options or return_lse is not False or options:
            decoder = None
        if decoder is not None:
            row = decoder(q, k, v, scale, q_offset)
            if row is not None:
                return row
        # 2. Checks, and in eager mode the tracing of functions.
        q, k, v = autocast(q, k, v)
        call = _Arguments(q, k, v, scale, q_offset, data, score_mod, sink_logits, return_lse)
        tensors, bound = self._prepared(call, options)
        # 3. The operator.
        out, lse = self._run(call, tensors, bound)
        if decoder is not None:
            decoder.learn(q, k, v)
        if sink_logits is not None:
            out, lse = _with_sinks(out, lse, sink_logits)
        if return_lse:
            return out, lse
        return out

    def _prepared(
        self, call: _Arguments, options: Mapping[str, Any]
    ) -> tuple[list[Tensor], Bound | None]:
        """The checked tensors and the rule of a call.

        An error is reported to all ranks of a ring before it is raised.

        options: keywords that no argument of a call has.
        """
        try:
            if not is_traced():  # a trace runs the operator's own check
                call_checks.no_onnx_export()
            call_checks.no_options_of_sdpa(options)
            return self._checked(call), self._bound(call)
        except Exception as error:
            # Also of a user's function. The other ranks must not wait for this one.
            if self.ring is not None and not is_traced():
                self.ring.transport.refuse(error)
            raise

    def _bound(self, call: _Arguments) -> Bound | None:
        """The rule with its functions traced; None if Dynamo traces them."""
        skeleton = self._skeleton
        if call.score_mod is None and not skeleton.mask_mods:
            return skeleton.plain
        if is_traced():
            return None
        mask_mods, literals = skeleton.mask_mods, skeleton.literals
        dtype = lse_dtype(call.q.dtype)
        bound = bind(skeleton.frame, literals, mask_mods, call.score_mod, dtype)
        call_checks.captured(bound.operands[len(literals) :], call.q.device)
        return bound

    def _run(
        self, call: _Arguments, tensors: Sequence[Tensor], bound: Bound | None
    ) -> tuple[Tensor, Tensor]:
        """out and lse of checked arguments.

        tensors: the data, and the offset if that is a tensor.
        """
        q, number = scaled(call.q, call.scale)
        q_offset = 0
        if not isinstance(call.q_offset, Tensor):
            q_offset = call_checks.q_offset(call.q_offset)
        k, v, wants_lse = call.k, call.v, call.needs_lse
        # Functions that Dynamo traces are subgraphs of a higher-order operator.
        if bound is None:
            skeleton = self._skeleton
            attend_with_functions = _attend_with_functions()
            inputs = (skeleton.frame, q, k, v, tensors, skeleton.literals)
            functions = (skeleton.mask_mods, call.score_mod)
            return attend_with_functions(*inputs, number, q_offset, wants_lse, *functions)
        # A compiled graph creates its own ring from the text; in eager mode the ledger of this
        # one is updated.
        ring = None if is_traced() else self.ring
        return autograd.attend_bound(bound, q, k, v, tensors, number, q_offset, wants_lse, ring)

    def _checked(self, call: _Arguments) -> list[Tensor]:
        """Check all arguments; returns the data, then a tensor offset."""
        q, k, q_offset = call.q, call.k, call.q_offset
        # 1. Numbers, flags and q, k and v.
        if call.scale is not None:
            checks.scale("scale", call.scale)
        arguments.flag("return_lse", call.return_lse)
        self._check_tensors(q, k, call.v)
        offset = call_checks.last_offset(q_offset, q.shape[0], q.device)
        if self.ring is not None:
            self._check_ring(q, k, q_offset)
        # 2. Tensors and functions of the call.
        shape = checks.Shape(q.shape[0], offset + q.shape[2], k.shape[2], q.device)
        tensors = checks.data(self._names, self._query_names, call.data, shape)
        if call.data:
            check_data(self.program, call.data)
        if call.score_mod is not None:
            check_callable("score_mod", call.score_mod, scores=True)
        if call.sink_logits is not None:
            call_checks.sinks(call.sink_logits, q.shape[1], q.device)
        if self.lowering == "flex" and call.needs_lse and not gives_lse(q.device.type):
            raise ValueError(
                "lowering 'flex' gives no lse on a CPU, which return_lse and sink_logits need. "
                "Use lowering='auto', 'strided' or 'tiled'"
            )
        if isinstance(q_offset, Tensor):
            tensors.append(q_offset[:, None])
        return tensors

    def _check_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Check q, k and v, and axes that no module has checked."""
        checks.tensors(q, k, v)
        if self.tensor_layout == checks.HEADS_FIRST:
            checks.warn_of_swapped_axes(q)

    def _check_ring(self, q: Tensor, k: Tensor, q_offset: object) -> None:
        """Raise ValueError unless queries and keys are one sequence."""
        if isinstance(q_offset, Tensor) or q_offset != 0 or q.shape[2] != k.shape[2]:
            raise ValueError(
                f"a ring deals out one sequence; got {q.shape[2]} queries at offset {q_offset} "
                f"and {k.shape[2]} keys. "
                "Compile without ranks for cross attention and decoding"
            )

    def plan(self, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int = 0) -> Any:
        """The `Plan` of a call with these tensors; a `RingPlan` for ranks."""
        self._check_tensors(q, k, v)
        skeleton = self._skeleton
        literals, mask_mods = skeleton.literals, skeleton.mask_mods
        bound = bind(skeleton.frame, literals, mask_mods, None, lse_dtype(q.dtype))
        rule = read_rule(bound.rule, bound.operands)
        if self.ring is not None:
            self._check_ring(q, k, q_offset)
            return self.ring.plan(execution.ring_problem(rule, bound.rule, self.ring, q, k, v))
        training = autograd.trains(q, k, v)
        problem = execution.problem_at(rule, q, k, v, call_checks.q_offset(q_offset), training)
        return planner.exact_plan_for(problem, rule.lowering)

    def __reduce__(self) -> tuple[Any, ...]:
        return Attend, (self.program, self.lowering, self.ring, self.tensor_layout)

    def __repr__(self) -> str:
        parts = [repr(self.program)]
        if self.lowering != "auto":
            parts.append(f"lowering={self.lowering!r}")
        if self.ring is not None:
            parts.append(repr(self.ring))
        return f"compile({', '.join(parts)})"


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
    """Attention by a rule as text, for graphs without an `Attend`.

    frame, rule: of a `Skeleton` without functions and literals.
    data: the tensors that its masks read, in the order of their names.

    The other arguments are those of `Attend`. Nothing is checked here.
    """
    q, k, v = autocast(q, k, v)
    q, number = scaled(q, scale)
    tensors = [*data]
    if isinstance(q_offset, Tensor):
        tensors.append(q_offset[:, None])
        q_offset = 0
    wants_lse = sink_logits is not None
    if score_mod is None:
        out, lse = autograd.attend_bound(
            Bound(rule, ()), q, k, v, tensors, number, q_offset, wants_lse
        )
    else:
        attend_with_functions = _attend_with_functions()
        inputs = (frame, q, k, v, tensors, ())
        out, lse = attend_with_functions(*inputs, number, q_offset, wants_lse, (), score_mod)
    if sink_logits is not None:
        out, _ = _with_sinks(out, lse, sink_logits)
    return out


def _with_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with one more logit per head, of value 0."""
    logits = sink_logits.to(lse.dtype)[None, :, None].expand(lse.shape)
    return merge(out, lse, torch.zeros_like(out), logits)


def _attend_with_functions() -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator for functions that Dynamo traces."""
    # Imported here: it imports torch's compiler, which takes longer than all of this package.
    from .dynamo import attend_with_functions

    return attend_with_functions
