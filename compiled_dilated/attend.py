"""A program or mask as a callable: checks what it is given, then runs as one operator. And its plan, without running anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from . import arguments, operators, planner
from .decoding import Decoder
from .masks import Mask
from .partials import merge
from .plans import BYTES, Plan
from .programs import PerLength, Program, as_program
from .ring.distributed import Distributed
from .ring.plans import RingPlan
from .ring.rings import Ring
from .ring.streamed import Streamed

ScoreMod = Callable[..., Any]

TRANSPORTS = ("simulated", "streamed", "distributed")
_DTYPES = frozenset(getattr(torch, name) for name in BYTES)


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

        The lse is float32 (float64 for float64 inputs). scale: of q . k, default 1 / sqrt(D). q_offset: the position of the first
        query, for decoding against a cache. data: tensors that the masks read, by name. score_mod: FlexAttention's
        score_mod(score, b, h, q_idx, kv_idx); tensors that it captures get no gradient. sink_logits: (Hq,), one learned logit per
        head that joins the softmax with value 0.
        """
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
        out, lse = operators.attend(q, k, v, handle, float(scale), offset, tensors)
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


@overload
def compile(
    program: Program | Mask,
    *,
    lowering: str = ...,
    ranks: int | None = ...,
    mesh: DeviceMesh | ProcessGroup | None = ...,
    layout: str | None = ...,
    transport: Literal["simulated", "distributed"] | None = ...,
) -> Attend: ...
@overload
def compile(
    program: Program | Mask,
    *,
    ranks: int,
    transport: Literal["streamed"],
    layout: str | None = ...,
    device: str | torch.device | None = ...,
) -> Streamed: ...
def compile(
    program: Program | Mask,
    *,
    lowering: str = "auto",
    ranks: int | None = None,
    mesh: DeviceMesh | ProcessGroup | None = None,
    layout: str | None = None,
    transport: str | None = None,
    device: str | torch.device | None = None,
) -> Attend | Streamed:
    """A callable that computes attention by `program` (or a bare mask, a program of one branch).

    lowering: "auto" takes the cheapest by `plan`; "dense", "strided", "tiled" and "flex" are used or refused, never replaced.
    ranks: compute as a ring of so many ranks (arXiv 2310.01889). transport: "simulated" (the default), all ranks in this process
    one after the other, every step of each executed on what that rank may hold; or "streamed", out of core: a `Streamed`, which
    reads and writes files and computes on `device`.
    mesh: a DeviceMesh of one dimension, or a process group, of torch.distributed (transport "distributed"): each process passes
    its own shards, whose tokens are those that `plan(..., ranks=...).positions(rank)` names, and gets its own rows of the output.
    layout: which tokens each rank holds; "auto" (the default), "contiguous", "zigzag", "striped", "residue" or "hilbert".

    >>> attend = compile(masks.causal() & masks.window(256))
    >>> out = attend(q, k, v)
    """
    if transport is not None:
        arguments.choice("transport", transport, TRANSPORTS)
        if transport == "distributed" and mesh is None:
            raise ValueError("transport='distributed' needs a mesh, mesh=DeviceMesh(...) or a process group")
        if transport != "distributed" and (ranks is None or mesh is not None):
            raise ValueError(f"transport={transport!r} needs ranks, and no mesh; got ranks={ranks!r} and mesh={mesh!r}")
    if transport == "streamed" and ranks is not None:
        if layout not in (None, "contiguous") or lowering != "auto":
            raise ValueError(
                f"a streamed ring is contiguous and lowers each block as it is best; got layout={layout!r} and "
                f"lowering={lowering!r}. Leave them out"
            )
        return Streamed(as_program(program), ranks, "cpu" if device is None else device)
    if device is not None:
        raise ValueError(f"device={device!r} is for transport='streamed'; elsewhere the tensors' own device computes")
    return Attend(program, lowering, _ring(ranks, layout, mesh))


def _ring(ranks: int | None, layout: str | None, mesh: DeviceMesh | ProcessGroup | None = None) -> Ring | None:
    if mesh is not None:
        group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
        if not isinstance(group, ProcessGroup):
            raise TypeError(f"mesh must be a DeviceMesh of one dimension or a process group; got {type(mesh).__name__}")
        if ranks not in (None, group.size()):
            raise ValueError(f"the mesh has {group.size()} ranks; got ranks={ranks!r}. Leave ranks out")
        return Ring(group.size(), "auto" if layout is None else layout, Distributed(group))
    if ranks is None:
        if layout is not None:
            raise ValueError(f"layout={layout!r} says how ranks share a sequence; say which, ranks=... or mesh=...")
        return None
    return Ring(ranks, "auto" if layout is None else layout)


@overload
def plan(
    program: Program | Mask,
    q_shape: Sequence[int],
    kv_heads: int | None = ...,
    kv_len: int | None = ...,
    value_dim: int | None = ...,
    dtype: torch.dtype = ...,
    device: str | torch.device = ...,
    training: bool = ...,
    lowering: str = ...,
    q_offset: int = ...,
    *,
    ranks: None = ...,
    layout: None = ...,
) -> Plan: ...
@overload
def plan(
    program: Program | Mask,
    q_shape: Sequence[int],
    kv_heads: int | None = ...,
    kv_len: int | None = ...,
    value_dim: int | None = ...,
    dtype: torch.dtype = ...,
    device: str | torch.device = ...,
    training: bool = ...,
    lowering: str = ...,
    q_offset: int = ...,
    *,
    ranks: int,
    layout: str | None = ...,
) -> RingPlan: ...
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
    *,
    ranks: int | None = None,
    layout: str | None = None,
) -> Plan | RingPlan:
    """How attention of this shape would be computed, and why; nothing is computed. `print(plan(...).explain())`.

    q_shape: (B, Hq, N, D). kv_heads, kv_len, value_dim: of k and v, those of q by default.
    ranks, layout: as in `compile`; then the plan says what each rank receives, computes and holds, under every layout.
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
    kind = torch.device(device).type
    problem = operators.problem_of(as_program(program), shape, k_shape, v_shape, dtype, kind, q_offset, training, False)
    ring = _ring(ranks, layout)
    if ring is not None:
        if q_len != kv_len or q_offset or lowering != "auto":
            raise ValueError(
                f"a ring deals out one sequence and lowers each block as it is best; got {q_len} queries at offset {q_offset}, "
                f"{kv_len} keys and lowering={lowering!r}. Leave out ranks, or these"
            )
        return ring.plan(problem)
    return planner.counted(planner.choose(problem, lowering))


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
        _check_dtype(name, x.dtype)
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
    _check_groups(q.shape[1], k.shape[1])


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}. Cast it first")


def _check_groups(heads: int, kv_heads: int) -> None:
    if (kv_heads == 0 and heads != 0) or (kv_heads != 0 and heads % kv_heads):
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key heads, so that they share evenly")


def _check_scale(scale: float | None) -> None:
    if scale is None:
        return
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
