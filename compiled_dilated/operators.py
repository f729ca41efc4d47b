"""Attention by a rule as one differentiable operator: opaque to torch.compile and torch.export, one node for any length.

    compiled_dilated::attend -> rules.read_rule -> planner.plan_for -> lowerings.execute, or a ring

The operator's arguments say all that it computes: the rule is a text (see rules.py), and what functions capture are operands.
Nothing inside depends on modes of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_excluded,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _ForceDispatchKeyGuard,
    _is_any_autocast_enabled,
)
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from . import checks, planner
from .calls import Call
from .lowerings import execute, native
from .masks.functions import digest
from .mods import Mod, flat, sums_dtype, unflat, without_autocast
from .partials import Saved, empty_out, is_by_token, laid_out, lse_dtype
from .plans import Plan, Problem, Scores, problem_of
from .programs import PerLength
from .ring.rings import Ring
from .rules import Rule, read_rule, reads_contents, score_slots


@dataclass(frozen=True)
class Options:
    """A call's arguments that are no tensors.

    rule: as text.
    training: whether a backward may follow.
    wants_lse: whether a gradient of the lse may come; the compiler sends zeros where nothing uses it, which are work.
    learned: the operands that get gradients.
    data: how many of the tensors behind q, k and v are data; the others are operands.
    ring: the caller's own, whose ledger it reads; the text makes another one.
    """

    rule: str
    scale: float
    q_offset: Any
    training: bool
    wants_lse: bool
    learned: tuple[int, ...]
    data: int
    ring: Ring | None = None

    @property
    def plain(self) -> tuple[str, float, Any]:
        """What the operator takes as it is: rule, scale and q_offset."""
        return self.rule, self.scale, self.q_offset

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
        """Data and operands; None where there are none, as AOTInductor has it."""
        return tensors[: self.data] or None, tensors[self.data :] or None


# Plans ----------------------------------------------------------------------------------------------------------------------


def plan_of(rule: Rule, q: Tensor, k: Tensor, v: Tensor, q_offset: int, training: bool, score_mod: Mod | None = None) -> Plan:
    """The plan for tensors of these shapes, made when they first come. score_mod: of the call."""
    program = rule.program.at(q.shape[2]) if isinstance(rule.program, PerLength) else rule.program
    if planner.takes_any_offset(q.shape[2], training, rule.lowering):
        program.check(1, k.shape[2], q_offset)  # its plan may have been made for another position
    problem = problem_of(program, q.shape, k.shape, v.shape, q.dtype, q.device.type, q_offset, training, Scores.of(score_mod))
    return planner.plan_for(problem, rule.lowering)


def ring_problem(rule: Rule, written: str, ring: Ring, q: Tensor, k: Tensor, v: Tensor, call: Call | None = None) -> Problem:
    """What all ranks together compute, given the tensors of this process; the same forward and backward.

    written: the rule as text. call: what the ranks must agree in too.
    """
    about = {"the program, the layout or a function": f"{rule.program!r} over {ring!r}: {written}"}
    if ring.sharded and call is not None:
        about["the scale"] = str(call.scale)
        about |= {f"data[{name!r}] (of the whole sequence)": digest(x) for name, x in call.data.items()}
        captured = () if call.score_mod is None else call.score_mod.operands
        about["what the score_mod captures"] = str([digest(x) for x in captured])
    tokens = ring.transport.tokens(q, k, v, about)
    for name, x in ({} if call is None else call.data).items():
        if name in rule.names and x.shape[1] < tokens:
            raise ValueError(
                f"data[{name!r}] must hold all {tokens} tokens of the ring's sequence on every rank; got shape {tuple(x.shape)}. "
                "Pass the data of the whole sequence, not that of a shard"
            )
    program = rule.program.at(tokens) if isinstance(rule.program, PerLength) else rule.program
    q_shape, k_shape, v_shape = [(*x.shape[:2], tokens, x.shape[3]) for x in (q, k, v)]
    scores = None if call is None else Scores.of(call.score_mod)
    return problem_of(program, q_shape, k_shape, v_shape, q.dtype, q.device.type, 0, False, scores)


# Written out: torch's own reading of annotations knows no optional lists of tensors, which AOTInductor makes of empty ones.
_OTHERS = "Tensor[]? data, Tensor[]? operands, str rule, float scale, SymInt q_offset"
_INPUTS = f"Tensor q, Tensor k, Tensor v, {_OTHERS}"
_SAVED = f"Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OTHERS}"


# The operator ---------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as kernels read it; other strides may be any."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _is_empty(whole: Problem | None, *tensors: Tensor) -> bool:
    """Whether there is nothing to compute: for all ranks together, or for these tensors."""
    return whole.empty if whole is not None else not all(x.numel() for x in tensors)


# What a dispatch mode of the caller, such as the one around the first run of a compiled graph, takes from torch.vmap.
_OF_VMAP = tuple(
    key
    for name, key in DispatchKey.__members__.items()
    if name.startswith("FuncTorch") or name in ("ADInplaceOrView", "PythonTLSSnapshot")
)


@contextmanager
def _own_modes() -> Iterator[None]:
    """Without the caller's autocast and dispatch modes, which would change what is computed."""
    below_a_mode = _dispatch_tls_is_dispatch_key_excluded(DispatchKey.FuncTorchBatched)
    with ExitStack() as stack:
        if _is_any_autocast_enabled():
            stack.enter_context(without_autocast())
        if below_a_mode:
            excluded = _dispatch_tls_local_exclude_set()
            for key in _OF_VMAP:
                excluded = excluded.remove(key)
            stack.enter_context(_ForceDispatchKeyGuard(_dispatch_tls_local_include_set(), excluded))
        yield


def _forward(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None, options: Options
) -> tuple[Tensor, Tensor]:
    rule = read_rule(options.rule, operands)
    ring = rule.ring if options.ring is None else options.ring
    call = rule.call(data, operands, options.scale, options.q_offset)
    # A rank without tokens takes part in a ring: its problem is that of all ranks.
    whole = None if ring is None else ring_problem(rule, options.rule, ring, q, k, v, call)
    if _is_empty(whole, q, k, v):
        return empty_out(q, v, is_by_token(q)).zero_(), q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    if ring is not None and whole is not None:
        return ring.forward(whole, call, *map(_rows, (q, k, v)))
    plan = plan_of(rule, q, k, v, options.q_offset, options.training, call.score_mod)
    _check_offsets(plan, call)
    return execute.forward(plan, call, *map(_rows, (q, k, v)))


def _check_offsets(plan: Plan, call: Call) -> None:
    if call.offsets is not None and plan.lowering != "native":
        raise ValueError(
            "q_offset as a tensor, one position for each sequence, is computed by the lowering 'native' alone, which is not "
            f"possible here: the plan is {plan.lowering!r} on {plan.problem.device}. "
            "Call the sequences one by one, each with a number"
        )


def run(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None, options: Options
) -> tuple[Tensor, Tensor]:
    with _own_modes():
        return _forward(q, k, v, data, operands, options)


def run_backward(
    saved: Saved, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, and those of the learned operands in one vector."""
    with _own_modes():
        rule = read_rule(options.rule, operands)
        ring = rule.ring if options.ring is None else options.ring
        call = rule.call(data, operands, options.scale, options.q_offset, options.learned)
        saved = saved.map(_rows)
        whole = None if ring is None else ring_problem(rule, options.rule, ring, saved.q, saved.k, saved.v, call)
        if _is_empty(whole, saved.q, saved.k, saved.v):
            gradients = [torch.zeros_like(x) for x in (saved.q, saved.k, saved.v)]
        elif ring is not None and whole is not None:
            gradients = [*ring.backward(whole, call, saved)]
        else:
            plan = plan_of(rule, saved.q, saved.k, saved.v, options.q_offset, True, call.score_mod)
            gradients = [*execute.backward(plan, call, saved)]
        sums = () if call.score_mod is None else call.score_mod.sums
        learned = flat(sums, saved.q)
        # One by one: of what has been copied the original is freed.
        grad_q, grad_k, grad_v = (gradients.pop(0).contiguous() for _ in range(3))
        return grad_q, grad_k, grad_v, learned


@torch.library.custom_op(
    "compiled_dilated::attend", mutates_args=(), schema=f"({_INPUTS}, bool training, bool by_token) -> (Tensor, Tensor)"
)
def attend_operator(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, training: bool, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = Options(rule, scale, q_offset, training, True, (), len(data or ()))
    out, lse = run(q, k, v, data, operands, options)
    return laid_out(out, by_token), lse.contiguous()  # as the compiler was told


@attend_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, training: bool, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_out(q, v, by_token), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


@torch.library.custom_op(
    "compiled_dilated::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, {_SAVED}, int[] learned) -> (Tensor, Tensor, Tensor, Tensor)",
)
def attend_backward_operator(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, learned: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options(rule, scale, q_offset, True, True, tuple(learned), len(data or ()))
    return run_backward(Saved(q, k, v, out, lse, grad_out, grad_lse), data, operands, options)


@attend_backward_operator.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, learned: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = sum((operands or ())[number].numel() for number in learned)
    gradients = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return *gradients, q.new_empty((numbers,), dtype=sums_dtype(operands or (), learned))


@attend_operator.register_torch_dispatch(ProxyTorchDispatchMode)
def _(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """In a graph stands the native operator where it computes the rule: what holds it runs without Python too."""
    checks.no_onnx_export()
    q, k, v, data, operands, rule, scale, q_offset, _, by_token = args
    work, slots = None, score_slots(rule)
    if not reads_contents(rule):
        meaning = read_rule(rule, operands)
        scores = Scores.of(meaning.call(data, operands, scale, 0).score_mod)
        work = None if meaning.ring else native.work_of_graph(meaning.program, meaning.lowering, scores, q, k, v)
    if work is None:
        return mode.__torch_dispatch__(func, types, args, kwargs)
    with mode:
        inputs = work.of_operator(data, operands, slots)
        offsets = data[-1].squeeze(1) if len(data or ()) > len(work.names) else None
        return torch.ops.compiled_dilated.native.default(q, k, v, *inputs, work.code, scale, q_offset, offsets, by_token)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, data, operands, ctx.rule, ctx.scale, ctx.q_offset, _, _ = inputs
    ctx.data, ctx.operands = len(data or ()), len(operands or ())
    ctx.save_for_backward(q, k, v, *output, *(data or ()), *(operands or ()))


def _differentiated(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    data, operands = tensors[: ctx.data], tensors[ctx.data :]
    wanted = ctx.needs_input_grad[4] if operands else ()
    learned = [slot for slot in score_slots(ctx.rule) if wanted[slot]]
    grad_q, grad_k, grad_v, vector = attend_backward_operator(
        grad_out, grad_lse, q, k, v, out, lse, data or None, operands or None, ctx.rule, ctx.scale, ctx.q_offset, learned
    )
    grads: list[Tensor | None] = [None] * ctx.operands
    for slot, grad in zip(learned, unflat(vector, operands, learned), strict=True):
        grads[slot] = grad
    of_data = [None] * ctx.data if ctx.data else None
    return grad_q, grad_k, grad_v, of_data, grads or None, None, None, None, None, None


# Of the operator by itself, as an exported graph holds it; calls from Python come through the functions below.
torch.library.register_autograd("compiled_dilated::attend", _differentiated, setup_context=_save)
