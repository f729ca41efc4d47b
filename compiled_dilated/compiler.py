"""The two entry points, `compile` and `plan`.

`compile` returns a callable, `plan` its plan with the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from . import arguments, checks, fitting, planner, text
from .attend import Attend
from .masks import Mask
from .model_compiler import NOT_PASSED, compiled_model
from .plans import Plan, Problem, problem_of
from .programs import Program, as_program
from .ring.distributed import Distributed
from .ring.plans import RingPlan
from .ring.rings import Ring
from .ring.streamed import Streamed

TRANSPORTS = ("simulated", "streamed", "distributed")


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
@overload
def compile(
    program: nn.Module,
    *,
    attention: Any = ...,
    memory_budget: int | str | None = ...,
    dynamic: bool | None = ...,
) -> Any: ...
def compile(
    program: Program | Mask | nn.Module,
    *,
    lowering: str = "auto",
    ranks: int | None = None,
    mesh: DeviceMesh | ProcessGroup | None = None,
    layout: str | None = None,
    transport: str | None = None,
    device: str | torch.device | None = None,
    attention: Any = NOT_PASSED,
    memory_budget: int | str | None = None,
    dynamic: bool | None = None,
) -> Attend | Streamed | Any:
    """A callable that computes attention by `program`, or a model that does.

    program: a program, a bare mask (a program of one branch), or a model.

    Arguments of a program:

    lowering: "auto", the cheapest by `plan`; or "native", "dense", "strided", "tiled", "flex" or
        "lanes", which is used or refused.
    ranks: number of ranks of a ring (arXiv 2310.01889).
    transport: "simulated" (default), all ranks one after the other in this process, each step
        executed on its rank's own tensors; "streamed", out of core: a `Streamed`, which reads and
        writes files and computes on `device`; "distributed", over torch.distributed.
    mesh: a DeviceMesh of one dimension or a process group, for transport "distributed". Each
        process passes its own shards, the tokens `plan(..., ranks=...).positions(rank)`; their
        rows of the output are returned.
    layout: how ranks share the tokens: "auto" (default), "contiguous", "zigzag", "striped",
        "residue" or "hilbert".
    device: of transport "streamed".

    Arguments of a model:

    attention: the program of all layers, {pattern of layer paths: program}, a function of a
        `wrapping.layers.Layer`, or None for the model's own masks. It is replaced in place in a
        transformers model. Programs that read data get it in a call, model(x, data={...}). After
        a call `print(sites(model))` shows each layer's program.
    memory_budget: "6GiB", or bytes, for the peak of a step: torch.compile of the model by the
        passes of `passes.compile`.
    dynamic: as in torch.compile.

    >>> attend = compile(masks.causal() & masks.window(256))
    >>> out = attend(q, k, v)
    """
    if isinstance(program, nn.Module):
        of_programs = {
            "ranks": ranks,
            "mesh": mesh,
            "layout": layout,
            "transport": transport,
            "device": device,
        }
        unused = [name for name, value in of_programs.items() if value is not None]
        if lowering != "auto":
            unused.append("lowering")
        return compiled_model(program, unused, attention, memory_budget, dynamic)
    is_of_model = memory_budget is not None or dynamic is not None or attention is not NOT_PASSED
    if is_of_model and not isinstance(program, (Program, Mask)):
        raise TypeError(
            "attention, memory_budget and dynamic are for models, torch.nn.Module; "
            f"got {type(program).__name__}. Wrap a function in a module"
        )
    if is_of_model:
        raise ValueError(
            "attention, memory_budget and dynamic are for models; a program is planned for every "
            "call. Leave them out"
        )
    return _compiled_program(program, lowering, ranks, mesh, layout, transport, device)


def _compiled_program(
    program: Program | Mask,
    lowering: str,
    ranks: int | None,
    mesh: DeviceMesh | ProcessGroup | None,
    layout: str | None,
    transport: str | None,
    device: str | torch.device | None,
) -> Attend | Streamed:
    """Attention by a program, on one device or by a ring."""
    _check_transport(transport, ranks, mesh)
    if transport == "streamed" and ranks is not None:
        if layout not in (None, "contiguous") or lowering != "auto":
            raise ValueError(
                "a streamed ring is contiguous and lowers each block as it is best; "
                f"got layout={layout!r} and lowering={lowering!r}. Leave them out"
            )
        return Streamed(as_program(program), ranks, "cpu" if device is None else device)
    if device is not None:
        raise ValueError(
            f"device={device!r} is for transport='streamed'; elsewhere the tensors' own device "
            "computes"
        )
    return Attend(program, lowering, _ring(ranks, layout, mesh))


def _check_transport(
    transport: str | None, ranks: int | None, mesh: DeviceMesh | ProcessGroup | None
) -> None:
    """Raise ValueError unless a transport has its ranks or mesh."""
    if transport is None:
        return
    arguments.choice("transport", transport, TRANSPORTS)
    if transport == "distributed" and mesh is None:
        raise ValueError(
            "transport='distributed' needs a mesh, mesh=DeviceMesh(...) or a process group"
        )
    if transport != "distributed" and (ranks is None or mesh is not None):
        raise ValueError(
            f"transport={transport!r} needs ranks, and no mesh; "
            f"got ranks={ranks!r} and mesh={mesh!r}"
        )


def _ring(
    ranks: int | None, layout: str | None, mesh: DeviceMesh | ProcessGroup | None = None
) -> Ring | None:
    """The ring of these arguments; None for one device."""
    if layout is not None and ranks is None and mesh is None:
        raise ValueError(
            f"layout={layout!r} says how ranks share a sequence; say which, ranks=... or mesh=..."
        )
    if layout is None:
        layout = "auto"
    if mesh is not None:
        group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
        if not isinstance(group, ProcessGroup):
            raise TypeError(
                "mesh must be a DeviceMesh of one dimension or a process group; "
                f"got {type(mesh).__name__}"
            )
        if ranks not in (None, group.size()):
            raise ValueError(
                f"the mesh has {group.size()} ranks; got ranks={ranks!r}. Leave ranks out"
            )
        return Ring(group.size(), layout, Distributed(group))
    if ranks is None:
        return None
    return Ring(ranks, layout)


def _device_type(device: object) -> str:
    """The type of a device, as "cpu", whether present or not."""
    if not isinstance(device, (str, torch.device)):
        came = arguments.kind_and_text(device)
        raise TypeError(f"device must be a torch.device or its name, as 'cpu'; got {came}")
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f"device must be a device that torch knows, as 'cpu' or 'cuda'; got {device!r}"
        ) from error


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
    memory_limit: int | str | None = ...,
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
    memory_limit: int | str | None = None,
) -> Plan | RingPlan:
    """The plan of attention of a shape, with reasons; nothing is computed.

    `print(plan(...).explain())` prints it.

    q_shape: (B, Hq, N, D).
    kv_heads, kv_len, value_dim: of k and v; those of q by default.
    training: plan a forward with its backward.
    q_offset: position of the first query.
    ranks, layout: as in `compile`; the plan is then that of a ring: what each rank receives,
        computes and stores, under every layout.
    memory_limit: "8GiB", or bytes, for the tensors and the workspace of a call. `plan.fit` has the
        largest batch and the longest sequence within it; ValueError where no batch row fits.
    """
    # 1. Shapes and options, checked.
    shape, k_shape, v_shape = _shapes(q_shape, kv_heads, kv_len, value_dim)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"dtype must be a torch.dtype; got {arguments.kind_and_text(dtype)}. "
            "Write torch.float32, say"
        )
    checks.dtype("dtype", dtype)
    arguments.flag("training", training)
    arguments.choice("lowering", lowering, planner.LOWERINGS)
    q_offset = arguments.integer("q_offset", q_offset, 0)
    limit = None
    if memory_limit is not None:
        limit = fitting.read_limit("memory_limit", memory_limit, ranks)
    # 2. The program with its functions as graphs; `operands`, which the functions capture, must
    # live as long as the graphs are evaluated.
    operands: list[Tensor] = []
    _, traced = text.traced(as_program(program), operands)
    problem = problem_of(
        traced, shape, k_shape, v_shape, dtype, _device_type(device), q_offset, training
    )
    # 3. The plan, of a ring or of one device.
    ring = _ring(ranks, layout)
    if ring is not None:
        return replace(_ring_plan(ring, problem, lowering), operands=tuple(operands))
    chosen = planner.exact_plan_for(problem, lowering)
    fit = None
    if limit is not None:
        fit = fitting.fit(chosen, lowering, limit)
    return replace(planner.counted(chosen), fit=fit)


def _ring_plan(ring: Ring, problem: Problem, lowering: str) -> RingPlan:
    """The plan of a ring, for a problem of one sequence."""
    q_len, kv_len, q_offset = problem.q_len, problem.kv_len, problem.q_offset
    if q_len != kv_len or q_offset or lowering != "auto":
        raise ValueError(
            "a ring deals out one sequence and lowers each block as it is best; "
            f"got {q_len} queries at offset {q_offset}, {kv_len} keys and "
            f"lowering={lowering!r}. Leave out ranks, or these"
        )
    return ring.plan(problem)


def _shapes(
    q_shape: Sequence[int], kv_heads: int | None, kv_len: int | None, value_dim: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The checked shapes of q, k and v.

    kv_heads, kv_len, value_dim: of k and v; None for those of q.
    """
    shape = arguments.integers("q_shape", q_shape, 1)
    if len(shape) != 4:
        raise ValueError(
            f"q_shape must be (batch, heads, tokens, head_dim); got {tuple(q_shape)!r}"
        )
    batch, heads, q_len, head_dim = shape
    kv_heads = heads if kv_heads is None else arguments.integer("kv_heads", kv_heads, 1)
    checks.groups(heads, kv_heads)
    kv_len = q_len if kv_len is None else arguments.integer("kv_len", kv_len, 1)
    value_dim = head_dim if value_dim is None else arguments.integer("value_dim", value_dim, 1)
    of_keys = (batch, kv_heads, kv_len)
    return shape, (*of_keys, head_dim), (*of_keys, value_dim)
