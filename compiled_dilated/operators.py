"""Attention by a program as one differentiable operator: opaque to torch.compile and torch.export, one node for any length.

    _Attention (autograd) -> compiled_dilated::attend (custom operator) -> planner -> lowerings.execute

A program is named in the operator by the code that makes it; plans are kept for the shapes that came last.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import planner
from .lowerings import execute
from .lowerings.batches import Call
from .partials import Saved, empty_out, is_by_token, laid_out, lse_dtype
from .plans import Plan, Problem
from .programs import PerLength, Program
from .ring.blocks import Given
from .ring.rings import Ring

ScoreMod = Callable[..., Any]
_MOST_PLANS = 64
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


@dataclass(frozen=True)
class Named:
    """What an operator's string argument stands for: operators take tensors, numbers and strings alone."""

    program: Program | PerLength
    lowering: str
    ring: Ring | None = None
    score_mod: ScoreMod | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The data tensors that the program reads."""
        return self.program.names


_programs: dict[str, Named] = {}
_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


def handle_of(program: Program | PerLength, lowering: str, ring: Ring | None = None) -> str:
    """The string that stands for a program, and for how it is executed, in an operator's arguments."""
    handle = f"{program!r} lowering={lowering}" + ("" if ring is None else f" {ring!r} #{id(ring)}")
    named = Named(program, lowering, ring)
    if _programs.setdefault(handle, named).program != program:  # two functions of one name inside from_mod
        handle = f"{handle} #{hash(program)}"
        _programs.setdefault(handle, named)
    return handle


def with_score_mod(handle: str, score_mod: ScoreMod) -> str:
    """The string that stands for a program and a score_mod."""
    joint = f"{handle} score_mod={id(score_mod)}"
    _programs[joint] = replace(_programs[handle], score_mod=score_mod)
    return joint


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: the score_mod has to be known before
# the traced graph runs, and what tracing itself writes to a dictionary is written after.
with_score_mod._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plan_of(handle: str, q: Tensor, k: Tensor, v: Tensor, q_offset: int, training: bool) -> Plan:
    """The plan for tensors of these shapes, made when they first come."""
    named = meaning_of(handle)
    program, lowering = named.program, named.lowering
    if isinstance(program, PerLength):
        program = program.at(q.shape[2])
    # One query is planned once for all positions and all lengths of a cache.
    alone = planner.takes_any_offset(q.shape[2], training, lowering)
    if alone:
        program.check(1, k.shape[2], q_offset)
    place = (0, 0) if alone else (k.shape[2], q_offset)
    key = (handle, q.shape, k.shape[1], place, v.shape[3], q.dtype, q.device.type, training)
    if key in _plans:
        _plans.move_to_end(key)
        return _plans[key]
    shapes = (q.shape, k.shape, v.shape)
    problem = problem_of(program, *shapes, q.dtype, q.device.type, place[1], training, named.score_mod is not None)
    plan = _plans[key] = planner.choose(problem, lowering)
    if len(_plans) > _MOST_PLANS:
        _plans.popitem(last=False)
    return plan


def meaning_of(handle: str) -> Named:
    """What a string stands for in this process."""
    if handle not in _programs:
        raise RuntimeError(
            f"the program {handle!r} is not known to this process. "
            "Build it with compiled_dilated.compile before running the graph"
        )
    return _programs[handle]


def ring_problem(handle: str, q: Tensor, k: Tensor, v: Tensor) -> Problem:
    """What all ranks together compute, given the tensors of this process; the same forward and backward."""
    named = meaning_of(handle)
    assert named.ring is not None
    tokens = named.ring.transport.tokens(q, k, v, f"{named.program!r} over {named.ring!r}")
    program = named.program.at(tokens) if isinstance(named.program, PerLength) else named.program
    whole = [(*x.shape[:2], tokens, x.shape[3]) for x in (q, k, v)]
    return problem_of(program, whole[0], whole[1], whole[2], q.dtype, q.device.type, 0, False, named.score_mod is not None)


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


def _call(handle: str, data: Sequence[Tensor], scale: float, q_offset: int) -> Call:
    named = _programs[handle]
    return Call(scale, q_offset, dict(zip(named.names, data, strict=True)), named.score_mod)


def _given(handle: str, data: Sequence[Tensor], scale: float) -> Given:
    named = _programs[handle]
    return Given(scale, dict(zip(named.names, data, strict=True)), named.score_mod)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as kernels read it; other strides may be any."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _is_empty(whole: Problem | None, *tensors: Tensor) -> bool:
    """Whether there is nothing to compute: for all ranks together, or for these tensors."""
    return whole.empty if whole is not None else not all(x.numel() for x in tensors)


def _run(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor], handle: str, scale: float, q_offset: int, training: bool
) -> tuple[Tensor, Tensor]:
    # A rank without tokens takes part in a ring: its problem is that of all ranks.
    ring = meaning_of(handle).ring
    whole = None if ring is None else ring_problem(handle, q, k, v)
    if _is_empty(whole, q, k, v):
        return empty_out(q, v, is_by_token(q)).zero_(), q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    if ring is not None and whole is not None:
        return ring.forward(whole, _given(handle, data, scale), *map(_rows, (q, k, v)))
    plan = plan_of(handle, q, k, v, q_offset, training)
    return execute.forward(plan, _call(handle, data, scale, q_offset), *map(_rows, (q, k, v)))


@torch.library.custom_op("compiled_dilated::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor],
    handle: str, scale: float, q_offset: int, training: bool, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _run(q, k, v, data, handle, scale, q_offset, training)
    return laid_out(out, by_token), lse.contiguous()  # as the compiler was told


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor],
    handle: str, scale: float, q_offset: int, training: bool, by_token: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_out(q, v, by_token), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


@torch.library.custom_op("compiled_dilated::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    data: Sequence[Tensor],
    handle: str,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = meaning_of(handle).ring
    whole = None if ring is None else ring_problem(handle, q, k, v)
    if _is_empty(whole, q, k, v):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, k, v, out, grad_out = map(_rows, (q, k, v, out, grad_out))
    saved = Saved(q, k, v, out, lse, grad_out, grad_lse)
    if ring is not None and whole is not None:
        grads = ring.backward(whole, _given(handle, data, scale), saved)
    else:
        plan = plan_of(handle, q, k, v, q_offset, True)
        grads = execute.backward(plan, _call(handle, data, scale, q_offset), saved)
    left = [*grads]
    del grads  # of what has been copied the original is not held
    return left.pop(0).contiguous(), left.pop(0).contiguous(), left.pop(0).contiguous()


@_attend_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    data: Sequence[Tensor],
    handle: str,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _apply(function: Any, *inputs: Any) -> Any:
    """function.apply of an autograd function, whose apply torch leaves untyped."""
    return function.apply(*inputs)


class _Gradients(torch.autograd.Function):
    """The backward as a function of its own, so that differentiating it once more raises instead of giving zeros."""

    @staticmethod
    def forward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        handle: str, scale: float, q_offset: int, *data: Tensor,
    ) -> Any:  # fmt: skip
        return _attend_backward(grad_out, grad_lse, q, k, v, out, lse, data, handle, scale, q_offset)

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
        grad_out, grad_lse, q, k, v, out, lse, handle, scale, q_offset, *data = inputs
        dims = in_dims[:7]
        tensors = [
            None if x is None else _fold(x, dim, info.batch_size)
            for x, dim in zip((grad_out, grad_lse, q, k, v, out, lse), dims, strict=True)
        ]
        folded = _fold_data(data, in_dims[10:], info.batch_size, q.shape[0 if dims[2] is None or dims[2] != 0 else 1])
        grads = _apply(_Gradients, *tensors, handle, scale, q_offset, *folded)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in grads), (0, 0, 0)


class _Attention(torch.autograd.Function):
    """attend with its gradient: merged out and lse are saved, nothing else of size.

    wants_lse: whether a gradient of lse may come; the compiler sends zeros where nothing uses it, which are work.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, handle: str, scale: float, q_offset: int, training: bool, wants_lse: bool, *data: Tensor
    ) -> Any:
        return _attend(q, k, v, data, handle, scale, q_offset, training, is_by_token(q))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, handle, scale, q_offset, _, wants_lse, *data = inputs
        ctx.handle, ctx.scale, ctx.q_offset, ctx.wants_lse, ctx.extra = handle, scale, q_offset, wants_lse, len(data)
        ctx.save_for_backward(q, k, v, *output, *data)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse, *data = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if not ctx.wants_lse:
            grad_lse = None
        if is_compiling():  # torch.compile itself refuses to differentiate a compiled backward
            grads = _attend_backward(grad_out, grad_lse, q, k, v, out, lse, data, ctx.handle, ctx.scale, ctx.q_offset)
        else:
            grads = _apply(_Gradients, grad_out, grad_lse, q, k, v, out, lse, ctx.handle, ctx.scale, ctx.q_offset, *data)
        return *grads, None, None, None, None, None, *[None] * ctx.extra

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        q, k, v, handle, scale, q_offset, training, wants_lse, *data = inputs
        size = q.shape[0 if in_dims[0] is None or in_dims[0] != 0 else 1]
        tensors = [_fold(x, dim, info.batch_size) for x, dim in zip((q, k, v), in_dims[:3], strict=True)]
        folded = _fold_data(data, in_dims[8:], info.batch_size, size)
        out, lse = _apply(_Attention, *tensors, handle, scale, q_offset, training, wants_lse, *folded)
        return (out.unflatten(0, (info.batch_size, -1)), lse.unflatten(0, (info.batch_size, -1))), (0, 0)


class _EagerAttention(_Attention):
    """The same outside of torch.compile, which refuses functions that define a jvp, even one that only explains."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attention has no forward-mode derivative here; "
            "use reverse mode (torch.func.grad, vjp), or compiled_dilated.reference"
        )


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped dimension becomes part of the batch."""
    moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return moved.flatten(0, 1)


def _fold_data(data: Sequence[Tensor], dims: Sequence[int | None], size: int, batch: int) -> list[Tensor]:
    out = []
    for x, dim in zip(data, dims, strict=True):
        moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        out.append(moved.expand(size, batch, *moved.shape[2:]).flatten(0, 1))
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, handle: str, scale: float, q_offset: int, data: Sequence[Tensor], wants_lse: bool
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N) of checked inputs, differentiable; lse if the caller wants it."""
    if not trains(q, k, v):
        if is_compiling():
            out, lse = _attend(q, k, v, data, handle, scale, q_offset, False, is_by_token(q))
            return out, lse
        if is_plain_call(q, k, v):
            return _run(q, k, v, data, handle, scale, q_offset, False)
    if is_compiling():  # which takes no tensor twice
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    function = _Attention if is_compiling() else _EagerAttention
    found: tuple[Tensor, Tensor] = _apply(function, q, k, v, handle, scale, q_offset, trains(q, k, v), wants_lse, *data)
    return found


def trains(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


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


def part(q: Tensor, k: Tensor, v: Tensor, q_offset: int, handle: str, scale: float) -> Tensor:
    """out of some queries of a sequence, the first at q_offset, without a gradient."""
    if is_plain_call(q, k, v):
        return _run(q, k, v, (), handle, scale, q_offset, False)[0]
    out: Tensor = _attend(q, k, v, (), handle, scale, q_offset, False, is_by_token(q))[0]  # its fake speaks for it without data
    return out
