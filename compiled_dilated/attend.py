"""A program or mask as a callable: checks its inputs, plans once per shape, and runs as one differentiable operator.

    attend(q, k, v) -> _Attention (autograd) -> compiled_dilated::attend (custom operator) -> planner -> lowerings.execute

The operator is opaque to torch.compile and torch.export: one node, any length, no graph break.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, planner
from .lowerings import execute
from .lowerings.batches import Call
from .masks import Mask
from .partials import lse_dtype, merge
from .plans import BYTES, Plan, Problem
from .programs import Program, as_program

ScoreMod = Callable[..., Any]
_MOST_PLANS = 64

# What an operator's string argument stands for: operators take tensors, numbers and strings alone.
_programs: dict[str, tuple[Program, str, ScoreMod | None]] = {}
_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


def _handle(program: Program, lowering: str, score_mod: ScoreMod | None = None) -> str:
    handle = f"{program!r} lowering={lowering}" + ("" if score_mod is None else f" score_mod={id(score_mod)}")
    known = _programs.setdefault(handle, (program, lowering, score_mod))
    if known[0] != program:  # two functions of one name inside from_mod
        handle = f"{handle} #{hash(program)}"
        _programs.setdefault(handle, (program, lowering, score_mod))
    return handle


def _plan_of(handle: str, q: Tensor, k: Tensor, v: Tensor, q_offset: int, training: bool) -> Plan:
    kv_len = k.shape[2]
    if q.shape[2] == 1 and not training:
        # One query is planned once for all positions and all lengths of a cache.
        q_offset = kv_len = 0
    key = (handle, q.shape, k.shape[1], kv_len, v.shape[3], q.dtype, q.device.type, q_offset, training)
    if key in _plans:
        _plans.move_to_end(key)
        return _plans[key]
    if handle not in _programs:
        raise RuntimeError(f"the program {handle!r} is not known to this process. Build it with compiled_dilated.compile before running the graph")
    program, lowering, score_mod = _programs[handle]
    plan = planner.choose(_problem(program, q.shape, k.shape, v.shape, q.dtype, q.device.type, q_offset, training, score_mod is not None), lowering)
    _plans[key] = plan
    if len(_plans) > _MOST_PLANS:
        _plans.popitem(last=False)
    return plan


def _problem(
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
    batch, heads, q_len, head_dim = q_shape
    return Problem(
        program, batch, heads, k_shape[1], q_len, k_shape[2], head_dim, v_shape[3], str(dtype).removeprefix("torch."), device,
        q_offset, training, score_mod,
    )  # fmt: skip


def _call(handle: str, data: Sequence[Tensor], scale: float, q_offset: int) -> Call:
    program, _, score_mod = _programs[handle]
    return Call(scale, q_offset, dict(zip(program.names, data, strict=True)), score_mod)


@torch.library.custom_op("compiled_dilated::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor], handle: str, scale: float, q_offset: int, training: bool
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[3])
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return q.new_zeros(shape), q.new_full(shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    plan = _plan_of(handle, q, k, v, q_offset, training)
    return execute.forward(plan, _call(handle, data, scale, q_offset), q, k, v)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor], handle: str, scale: float, q_offset: int, training: bool
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[3])
    return q.new_empty(shape), q.new_empty(shape[:3], dtype=lse_dtype(q.dtype))


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
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    plan = _plan_of(handle, q, k, v, q_offset, True)
    return execute.backward(plan, _call(handle, data, scale, q_offset), grad_out, grad_lse, q, k, v, out, lse)


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
        tensors = [None if x is None else _fold(x, dim, info.batch_size) for x, dim in zip((grad_out, grad_lse, q, k, v, out, lse), dims, strict=True)]
        folded = _fold_data(data, in_dims[10:], info.batch_size, q.shape[0 if dims[2] is None or dims[2] != 0 else 1])
        grads = _Gradients.apply(*tensors, handle, scale, q_offset, *folded)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in grads), (0, 0, 0)


class _Attention(torch.autograd.Function):
    """attend with its gradient: merged out and lse are saved, nothing else of size."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, handle: str, scale: float, q_offset: int, training: bool, *data: Tensor) -> Any:
        return _attend(q, k, v, data, handle, scale, q_offset, training)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, handle, scale, q_offset, _, *data = inputs
        ctx.handle, ctx.scale, ctx.q_offset, ctx.extra = handle, scale, q_offset, len(data)
        ctx.save_for_backward(q, k, v, *output, *data)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse, *data = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if torch.compiler.is_compiling():  # torch.compile itself refuses to differentiate a compiled backward
            grads = _attend_backward(grad_out, grad_lse, q, k, v, out, lse, data, ctx.handle, ctx.scale, ctx.q_offset)
        else:
            grads = _Gradients.apply(grad_out, grad_lse, q, k, v, out, lse, ctx.handle, ctx.scale, ctx.q_offset, *data)
        return *grads, None, None, None, None, *[None] * ctx.extra

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        q, k, v, handle, scale, q_offset, training, *data = inputs
        size = q.shape[0 if in_dims[0] is None or in_dims[0] != 0 else 1]
        tensors = [_fold(x, dim, info.batch_size) for x, dim in zip((q, k, v), in_dims[:3], strict=True)]
        folded = _fold_data(data, in_dims[7:], info.batch_size, size)
        out, lse = _Attention.apply(*tensors, handle, scale, q_offset, training, *folded)
        return (out.unflatten(0, (info.batch_size, -1)), lse.unflatten(0, (info.batch_size, -1))), (0, 0)


class _EagerAttention(_Attention):
    """The same outside of torch.compile, which refuses functions that define a jvp, even one that only explains."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attention has no forward-mode derivative here; use reverse mode (torch.func.grad, vjp), or compiled_dilated.reference"
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


class Attend:
    """Attention by a program. Called with q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv); Hq a multiple of Hkv."""

    def __init__(self, program: Program | Mask, lowering: str = "auto") -> None:
        self.program = as_program(program)
        self.lowering = arguments.choice("lowering", lowering, planner.LOWERINGS)
        self._bare = _handle(self.program, lowering)

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
        """out (B, Hq, N, Dv) in the dtype of q; with `return_lse` also lse (B, Hq, N) in float32 (float64 for float64), differentiable.

        scale: of q . k, default 1 / sqrt(D). q_offset: the position of the first query, for decoding against a cache. data: tensors
        that the masks read, by name. score_mod: FlexAttention's score_mod(score, b, h, q_idx, kv_idx); tensors that it captures get no
        gradient. sink_logits: (Hq,), one learned logit per head that joins the softmax with value 0.
        """
        q, k, v = _autocast(q, k, v)
        _check_tensors(q, k, v)
        tensors = _check_data(self.program, data, q, k, q_offset)
        scale = _check_scale(scale, q)
        offset = q_offset if isinstance(q_offset, torch.SymInt) else arguments.integer("q_offset", q_offset, 0)
        handle = self._bare if score_mod is None else _handle(self.program, self.lowering, _check_score_mod(score_mod))
        training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if self.lowering == "flex" and q.device.type == "cpu" and (return_lse or sink_logits is not None):
            raise ValueError(
                "lowering 'flex' gives no lse on a CPU, which return_lse and sink_logits need. Use lowering='auto', 'strided' or 'tiled'"
            )
        function = _Attention if torch.compiler.is_compiling() else _EagerAttention
        out, lse = function.apply(q, k, v, handle, scale, offset, training, *tensors)
        if sink_logits is not None:
            _check_sinks(sink_logits, q)
            logits = sink_logits.to(lse.dtype)[None, :, None].expand(lse.shape)
            out, lse = merge(out, lse, torch.zeros_like(out), logits)
        return (out, lse) if return_lse else out

    def plan(self, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int = 0) -> Plan:
        """The plan that a call with these tensors follows."""
        _check_tensors(q, k, v)
        training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return _plan_of(self._bare, q, k, v, arguments.integer("q_offset", q_offset, 0), training)

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew, because the process that unpickles it has not registered the program under its handle.
        return Attend, (self.program, self.lowering)

    def __repr__(self) -> str:
        return f"compile({self.program!r}{'' if self.lowering == 'auto' else f', lowering={self.lowering!r}'})"


def compile(program: Program | Mask, *, lowering: str = "auto") -> Attend:
    """A callable that computes attention by `program` (or a bare mask, a program of one branch).

    lowering: "auto" takes the cheapest by `plan`; "dense", "strided", "tiled" and "flex" are used or refused, never replaced.

    >>> attend = compile(masks.causal() & masks.window(256))
    >>> out = attend(q, k, v)
    """
    return Attend(program, lowering)


def plan(
    program: Program | Mask,
    q_shape: Sequence[int],
    kv_heads: int | None = None,
    kv_len: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    training: bool = False,
    lowering: str = "auto",
    q_offset: int = 0,
) -> Plan:
    """How attention of this shape would be computed, and why; nothing is computed. `print(plan(...).explain())`.

    q_shape: (B, Hq, N, D). kv_heads, kv_len, value_dim: of k and v, those of q by default.
    """
    shape = arguments.integers("q_shape", q_shape, 1)
    if len(shape) != 4:
        raise ValueError(f"q_shape must be (batch, heads, tokens, head_dim); got {tuple(q_shape)!r}")
    batch, heads, q_len, head_dim = shape
    kv_heads = heads if kv_heads is None else arguments.integer("kv_heads", kv_heads, 1)
    _check_groups(heads, kv_heads)
    kv_len = q_len if kv_len is None else arguments.integer("kv_len", kv_len, 1)
    value_dim = head_dim if value_dim is None else arguments.integer("value_dim", value_dim, 1)
    _check_dtype("dtype", dtype)
    k_shape, v_shape = (batch, kv_heads, kv_len, head_dim), (batch, kv_heads, kv_len, value_dim)
    q_offset = arguments.integer("q_offset", q_offset, 0)
    problem = _problem(as_program(program), shape, k_shape, v_shape, dtype, torch.device(device).type, q_offset, training, False)
    return planner.counted(planner.choose(problem, lowering))


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast attention runs in the lower precision, as torch's own does."""
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in (q, k, v))  # type: ignore[return-value]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}. Convert it with torch.as_tensor")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head_dim); got shape {tuple(x.shape)}. Add the missing dimensions")
        _check_dtype(name, x.dtype)
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype; got q {q.dtype} and {name} {x.dtype}. Cast with {name}.to(q.dtype)")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device; got q on {q.device} and {name} on {x.device}. Move it with {name}.to(q.device)")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, heads and tokens; got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size; got q {tuple(q.shape)} and k {tuple(k.shape)}. Expand the smaller one")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim; got q {tuple(q.shape)} and k {tuple(k.shape)}")
    _check_groups(q.shape[1], k.shape[1])


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if str(dtype).removeprefix("torch.") not in BYTES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}. Cast it first")


def _check_groups(heads: int, kv_heads: int) -> None:
    if (kv_heads == 0 and heads != 0) or (kv_heads != 0 and heads % kv_heads):
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key heads, so that they share evenly")


def _check_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number; got {type(scale).__name__} {scale!r}. Leave it out for 1 / sqrt(head_dim)")
    return float(scale)


def _check_data(program: Program, data: Mapping[str, Tensor] | None, q: Tensor, k: Tensor, q_offset: int) -> list[Tensor]:
    given = data or {}
    names = program.names
    if set(given) != set(names):
        raise ValueError(f"the program reads the data tensors {list(names)}; got {sorted(given)}. Pass data={{name: tensor}} with exactly those")
    out = []
    for name in names:
        x = given[name]
        if not isinstance(x, Tensor) or x.dtype.is_floating_point or x.dtype.is_complex:
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"data[{name!r}] must be a bool or integer tensor; got {came}")
        if x.dim() != 2 or x.shape[0] not in (1, q.shape[0]) or x.shape[1] < k.shape[2]:
            raise ValueError(
                f"data[{name!r}] must be (batch or 1, tokens) with batch {q.shape[0]} and at least {k.shape[2]} tokens; got shape {tuple(x.shape)}"
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
                "score_mod reads a tensor that requires grad, and would get none: only q, k, v and sink_logits are differentiated. "
                "Detach it, or use compiled_dilated.reference"
            )
    return score_mod


def _needs_grad(score: object) -> bool:
    return isinstance(score, Tensor) and score.requires_grad
