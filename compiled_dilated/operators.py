"""Attention by a rule as one differentiable operator: opaque to torch.compile and torch.export, one node for any length.

    attend -> _Attention (autograd) -> compiled_dilated::attend (custom operator) -> planner -> lowerings.execute

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
    _len_torch_dispatch_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import planner
from .calls import Call
from .lowerings import execute
from .masks.functions import digest
from .mods import flat, unflat
from .partials import Saved, empty_out, is_by_token, laid_out, lse_dtype
from .plans import Plan, Problem
from .programs import PerLength, Program
from .ring.rings import Ring
from .rules import Rule, read_rule

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


@dataclass(frozen=True)
class Options:
    """A call's arguments that are no tensors.

    rule: as text. training: whether a backward may follow. wants_lse: whether a gradient of the lse may come; the compiler sends
    zeros where nothing uses it, which are work. learned: the operands that get gradients. data: how many of the tensors behind q,
    k and v are data; the others are operands. ring: the caller's own, whose ledger it reads; the text makes another one.
    """

    rule: str
    scale: float
    q_offset: Any
    training: bool
    wants_lse: bool
    learned: tuple[int, ...]
    data: int
    ring: Ring | None = None

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
        """Data and operands; None where there are none, as AOTInductor has it."""
        return tensors[: self.data] or None, tensors[self.data :] or None


# Plans ----------------------------------------------------------------------------------------------------------------------


def plan_of(rule: Rule, q: Tensor, k: Tensor, v: Tensor, q_offset: int, training: bool) -> Plan:
    """The plan for tensors of these shapes, made when they first come."""
    program = rule.program.at(q.shape[2]) if isinstance(rule.program, PerLength) else rule.program
    if planner.takes_any_offset(q.shape[2], training, rule.lowering):
        program.check(1, k.shape[2], q_offset)  # its plan may have been made for another position
    problem = problem_of(
        program, q.shape, k.shape, v.shape, q.dtype, q.device.type, q_offset, training, rule.score_mod is not None
    )
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
    return problem_of(program, q_shape, k_shape, v_shape, q.dtype, q.device.type, 0, False, rule.score_mod is not None)


def problem_of(
    program: Program,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    dtype: torch.dtype,
    device: str,
    q_offset: int,
    training: bool,
    score_mod: bool,
) -> Problem:
    """The problem that these shapes pose."""
    batch, heads, q_len, head_dim = q_shape
    return Problem(
        program, batch, heads, k_shape[1], q_len, k_shape[2], head_dim, v_shape[3], str(dtype).removeprefix("torch."), device,
        q_offset, training, score_mod,
    )  # fmt: skip


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
    """Without the caller's autocast, default dtype and dispatch modes, which would change what is computed."""
    default = torch.get_default_dtype()
    below_a_mode = _dispatch_tls_is_dispatch_key_excluded(DispatchKey.FuncTorchBatched)
    if not _is_any_autocast_enabled() and default is torch.float32 and not below_a_mode:
        yield
        return
    with ExitStack() as stack:
        if below_a_mode:
            excluded = _dispatch_tls_local_exclude_set()
            for key in _OF_VMAP:
                excluded = excluded.remove(key)
            stack.enter_context(_ForceDispatchKeyGuard(_dispatch_tls_local_include_set(), excluded))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(default)


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
    plan = plan_of(rule, q, k, v, options.q_offset, options.training)
    return execute.forward(plan, call, *map(_rows, (q, k, v)))


def _run(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None, options: Options
) -> tuple[Tensor, Tensor]:
    with _own_modes():
        return _forward(q, k, v, data, operands, options)


def _run_backward(
    saved: Saved, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, and those of the learned operands in one vector."""
    with _own_modes():
        rule = read_rule(options.rule, operands)
        ring = rule.ring if options.ring is None else options.ring
        call = rule.call(data, operands, options.scale, options.q_offset, options.learned)
        saved = saved.map(_rows)
        whole = None if ring is None else ring_problem(rule, options.rule, ring, saved.q, saved.k, saved.v)
        if _is_empty(whole, saved.q, saved.k, saved.v):
            gradients = [torch.zeros_like(x) for x in (saved.q, saved.k, saved.v)]
        elif ring is not None and whole is not None:
            gradients = [*ring.backward(whole, call, saved)]
        else:
            plan = plan_of(rule, saved.q, saved.k, saved.v, options.q_offset, True)
            gradients = [*execute.backward(plan, call, saved)]
        sums = () if call.score_mod is None else call.score_mod.sums
        learned = flat(sums, saved.q, _sums_dtype(operands, options.learned))
        # One by one: of what has been copied the original is freed.
        grad_q, grad_k, grad_v = (gradients.pop(0).contiguous() for _ in range(3))
        return grad_q, grad_k, grad_v, learned


def _sums_dtype(operands: Sequence[Tensor] | None, learned: Sequence[int]) -> torch.dtype:
    wide = any((operands or ())[number].dtype == torch.float64 for number in learned)
    return torch.float64 if wide else torch.float32


@torch.library.custom_op(
    "compiled_dilated::attend", mutates_args=(), schema=f"({_INPUTS}, bool training, bool by_token) -> (Tensor, Tensor)"
)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, training: bool, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = Options(rule, scale, q_offset, training, True, (), len(data or ()))
    out, lse = _run(q, k, v, data, operands, options)
    return laid_out(out, by_token), lse.contiguous()  # as the compiler was told


@_attend.register_fake
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
def _attend_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, learned: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options(rule, scale, q_offset, True, True, tuple(learned), len(data or ()))
    return _run_backward(Saved(q, k, v, out, lse, grad_out, grad_lse), data, operands, options)


@_attend_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    data: Sequence[Tensor] | None, operands: Sequence[Tensor] | None,
    rule: str, scale: float, q_offset: int, learned: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = sum((operands or ())[number].numel() for number in learned)
    gradients = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return *gradients, q.new_empty((numbers,), dtype=_sums_dtype(operands, learned))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, data, operands, ctx.rule, ctx.scale, ctx.q_offset, _, _ = inputs
    ctx.data, ctx.operands = len(data or ()), len(operands or ())
    ctx.save_for_backward(q, k, v, *output, *(data or ()), *(operands or ()))


def _differentiated(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    data, operands = tensors[: ctx.data], tensors[ctx.data :]
    wanted = ctx.needs_input_grad[4] if operands else ()
    slots = read_rule(ctx.rule, operands).slots
    learned = [slot for slot in slots if wanted[slot]]
    grad_q, grad_k, grad_v, vector = _attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, data or None, operands or None, ctx.rule, ctx.scale, ctx.q_offset, learned
    )
    grads: list[Tensor | None] = [None] * ctx.operands
    for slot, grad in zip(learned, unflat(vector, operands, learned), strict=True):
        grads[slot] = grad
    of_data = [None] * ctx.data if ctx.data else None
    return grad_q, grad_k, grad_v, of_data, grads or None, None, None, None, None, None


# Of the operator by itself, as an exported graph holds it; calls from Python come through the functions below.
torch.library.register_autograd("compiled_dilated::attend", _differentiated, setup_context=_save)


# Autograd -------------------------------------------------------------------------------------------------------------------


def _apply(function: Any, *inputs: Any) -> Any:
    """function.apply of an autograd function, whose apply torch leaves untyped."""
    return function.apply(*inputs)


class _Gradients(torch.autograd.Function):
    """The backward as a function of its own, so that differentiating it once more raises instead of giving zeros."""

    @staticmethod
    def forward(
        options: Options, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *tensors: Tensor,
    ) -> Any:  # fmt: skip
        return _gradients(options, grad_out, grad_lse, q, k, v, out, lse, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "attention is not twice differentiable here: its gradient came from a fused backward kernel. "
            "Use compiled_dilated.reference, which is dense, where second derivatives are needed"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        options, *tensors = inputs
        # Of learned operands every entry has a gradient of its own.
        if _operands_vary(options, in_dims[8:]) or options.learned:
            return _one_by_one(_Gradients, info.batch_size, in_dims, inputs)
        batch = _batch_of(tensors[2], in_dims[3])
        folded = [None if x is None else _fold(x, dim, info.batch_size) for x, dim in zip(tensors[:7], in_dims[1:8], strict=True)]
        others = _fold_others(options, tensors[7:], in_dims[8:], info.batch_size, batch)
        *grads, learned = _apply(_Gradients, options, *folded, *others)
        return (*(x.unflatten(0, (info.batch_size, -1)) for x in grads), learned), (0, 0, 0, None)


def _gradients(
    options: Options, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *tensors: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    data, operands = options.split(tensors)
    if are_plain(grad_out, q, k, v, *tensors):
        return _run_backward(Saved(q, k, v, out, lse, grad_out, grad_lse), data, operands, options)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = _attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, data, operands,
        options.rule, options.scale, options.q_offset, list(options.learned),
    )  # fmt: skip
    return gradients


class _Attention(torch.autograd.Function):
    """attend with its gradient: merged out and lse are saved, nothing else of size."""

    @staticmethod
    def forward(options: Options, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        data, operands = options.split(tensors)
        if are_plain(q, k, v, *tensors):
            return _run(q, k, v, data, operands, options)
        return _attend(q, k, v, data, operands, options.rule, options.scale, options.q_offset, options.training, is_by_token(q))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, q, k, v, *tensors = inputs
        ctx.save_for_backward(q, k, v, *output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        options, (q, k, v, out, lse, *tensors) = ctx.options, ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if not options.wants_lse:
            grad_lse = None
        inputs = (options, grad_out, grad_lse, q, k, v, out, lse, *tensors)
        # torch.compile itself refuses to differentiate a compiled backward.
        *grads, vector = _gradients(*inputs) if is_compiling() else _apply(_Gradients, *inputs)
        operands = tensors[options.data :]
        others: list[Tensor | None] = [None] * len(tensors)
        for number, grad in zip(options.learned, unflat(vector, operands, options.learned), strict=True):
            others[options.data + number] = grad
        return None, *grads, *others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        options, q, k, v, *tensors = inputs
        if _operands_vary(options, in_dims[4:]) or options.learned:
            return _one_by_one(_Attention, info.batch_size, in_dims, inputs)
        batch = _batch_of(q, in_dims[1])
        folded = [_fold(x, dim, info.batch_size) for x, dim in zip((q, k, v), in_dims[1:4], strict=True)]
        others = _fold_others(options, tensors, in_dims[4:], info.batch_size, batch)
        out, lse = _apply(_Attention, options, *folded, *others)
        return (out.unflatten(0, (info.batch_size, -1)), lse.unflatten(0, (info.batch_size, -1))), (0, 0)


class _EagerAttention(_Attention):
    """The same outside of torch.compile, which refuses functions that define a jvp, even one that only explains."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attention has no forward-mode derivative here; "
            "use reverse mode (torch.func.grad, vjp), or compiled_dilated.reference"
        )


def _operands_vary(options: Options, dims: Sequence[int | None]) -> bool:
    """Whether torch.vmap maps over operands: then each entry has a rule of its own."""
    return any(dim is not None for dim in dims[options.data :])


def _one_by_one(function: Any, size: int, dims: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """The entries of a vmap one after the other."""
    results = []
    for entry in range(size):
        chosen = [x if dim is None else x.select(dim, entry) for x, dim in zip(inputs, dims, strict=True)]
        results.append(_apply(function, *chosen))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _batch_of(x: Tensor, dim: int | None) -> int:
    """The batch of x without its vmapped dimension."""
    return x.shape[1 if dim == 0 else 0]


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped dimension becomes part of the batch."""
    moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return moved.flatten(0, 1)


def _fold_others(options: Options, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, batch: int) -> list[Tensor]:
    """Data folded like q, k and v; operands as they are."""
    folded = []
    for x, dim in zip(tensors[: options.data], dims, strict=False):
        moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        folded.append(moved.expand(size, batch, *moved.shape[2:]).flatten(0, 1))
    return [*folded, *tensors[options.data :]]


# Callers --------------------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N) of checked inputs, differentiable. tensors: data, then operands."""
    if not options.training:
        data, operands = options.split(tensors)
        if is_compiling():
            out, lse = _attend(q, k, v, data, operands, options.rule, options.scale, options.q_offset, False, is_by_token(q))
            return out, lse
        if are_plain(q, k, v, *tensors):
            return _run(q, k, v, data, operands, options)
    if is_compiling():  # which takes no tensor twice
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    function = _Attention if is_compiling() else _EagerAttention
    results: tuple[Tensor, Tensor] = _apply(function, options, q, k, v, *tensors)
    return results


def attend_bound(
    bound: tuple[str, tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    data: Sequence[Tensor],
    scale: float,
    q_offset: Any,
    wants_lse: bool,
    ring: Ring | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of a rule as text and its operands."""
    rule, operands = bound
    slots = read_rule(rule, operands).slots if operands else ()
    learned = tuple(slot for slot in slots if operands[slot].is_floating_point() and trains(operands[slot]))
    training = trains(q, k, v) or bool(learned)
    options = Options(rule, scale, q_offset, training, wants_lse, learned, len(data), ring)
    return attend(q, k, v, options, *data, *operands)


def trains(*tensors: Tensor) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_plain_call(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nobody traces or transforms the call.

    Then the operator's own dispatch, longer than one query takes, is not needed.
    """
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not is_compiling()
        and not _len_torch_dispatch_stack()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def are_plain(*tensors: Tensor) -> bool:
    """The same of any tensors, which have data."""
    q, k, v, *others = tensors
    return is_plain_call(q, k, v) and q.device.type != "meta" and all(type(x) in _PLAIN for x in others)


def part(q: Tensor, k: Tensor, v: Tensor, q_offset: int, rule: str, scale: float) -> Tensor:
    """out of some queries of a sequence, the first at q_offset, without a gradient."""
    if are_plain(q, k, v):
        return _run(q, k, v, None, None, Options(rule, scale, q_offset, False, False, (), 0))[0]
    out: Tensor = _attend(q, k, v, None, None, rule, scale, q_offset, False, is_by_token(q))[0]
    return out
