"""Stage constants: rates of kernels, bytes and calls, for devices.py.

Outcomes carry flops per second of the GPU's own time. The last case derives the constants of
compiled_dilated/lowerings/devices.py from all outcomes of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.lowerings.tiling.kernels import EfficientCUDA, Tiles
from compiled_dilated.lowerings.tiling.lattice import Lattice
from compiled_dilated.partials import merge_

from .calls import inputs, rates
from .records import Event
from .stage import Stage, check
from .timing import measured

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# Rows of the dense kernel whose rate is 1.
_LARGE = 8192
_WINDOW = 256


def run(stage: Stage) -> None:
    """Measure, the numbers that the planner needs most first."""
    large = stage.size(_LARGE, 64)
    for way in ("flash", "efficient", "cudnn"):
        stage.case(
            f"dense {way} bfloat16 64 {large}", _dense(stage, way, torch.bfloat16, 64, large)
        )
    stage.case(
        f"dense efficient float32 64 {large}",
        _dense(stage, "efficient", torch.float32, 64, large),
    )
    stage.case("merge bfloat16", _merge(stage))
    stage.case("host efficient", _host_of_call(stage))
    stage.case("host lattice", _host_of_lattice(stage))
    for lowering, kind, dtype in _sparse():
        stage.case(f"{lowering} {kind} {dtype} 64", _program(stage, lowering, kind, dtype, 64))
    # Then the entries of a finer table.
    for way, head_dim, rows in _table(stage):
        name = f"dense {way} bfloat16 {head_dim} {rows}"
        stage.case(name, _dense(stage, way, torch.bfloat16, head_dim, rows))
    for lowering in ("lanes", "flex"):
        stage.case(
            f"{lowering} partial bfloat16 128",
            _program(stage, lowering, "partial", "bfloat16", 128),
        )
    stage.case("constants", lambda: _constants(stage))


def _sparse() -> Iterator[tuple[str, str, str]]:
    """Lowerings, FULL or PARTIAL blocks, and dtypes whose rates devices.py has."""
    for dtype in ("bfloat16", "float32"):
        for lowering in ("lanes", "flex"):
            yield lowering, "partial", dtype
            if dtype == "bfloat16":
                yield lowering, "full", dtype


def _table(stage: Stage) -> Iterator[tuple[str, int, int]]:
    """Kernels, widths and rows."""
    for rows in stage.size((256, 512, 1024, 2048, 4096), (32,)):
        for way in ("efficient", "flash", "cudnn"):
            for head_dim in stage.size((64, 128), (64,)):
                yield way, head_dim, rows


def _tensors(stage: Stage, dtype: torch.dtype, head_dim: int, rows: int) -> list[Tensor]:
    """Problems of some rows that fill the GPU.

    They have 2**18 rows in all.
    """
    problems = stage.size(max(1, 2**18 // rows), 2)
    heads = min(problems, 16)
    return inputs(stage.device, dtype, problems // heads, heads, rows, head_dim)


def _dense(
    stage: Stage, way: str, dtype: torch.dtype, head_dim: int, rows: int
) -> Callable[[], dict[str, Any]]:
    """Attention without a mask, by a kernel of torch."""

    def case() -> dict[str, Any]:
        tensors = _tensors(stage, dtype, head_dim, rows)
        pairs = float(tensors[0].shape[0] * tensors[0].shape[1] * rows**2)
        if way == "efficient":
            return rates(_efficient, tensors, pairs)
        with sdpa_kernel([_BACKENDS[way]]):
            return rates(scaled_dot_product_attention, tensors, pairs)

    return case


class _Efficient(torch.autograd.Function):
    """The kernel of tiles with its backward, as lowerings call them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.tiles = Tiles(q.shape[3] ** -0.5)
        out, lse = EfficientCUDA.forward(q, k, v, ctx.tiles)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return EfficientCUDA.backward(grads[0], q, k, v, out, lse, ctx.tiles)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Efficient.apply
    return apply(q, k, v)


def _merge(stage: Stage) -> Callable[[], dict[str, Any]]:
    """Measure the merge of two partial results.

    Its size is in bytes of out and lse, read and written.
    """

    def case() -> dict[str, Any]:
        shape = stage.size((1, 16, 2**17, 64), (1, 2, 64, 16))
        out, part = (torch.randn(shape, device=stage.device).bfloat16() for _ in range(2))
        lse, part_lse = (torch.randn(shape[:3], device=stage.device) for _ in range(2))
        numbers = measured(lambda: merge_(out, lse, part, part_lse))
        moved = 3 * (out.nbytes + lse.nbytes)
        return numbers | {"bytes_per_second": moved / (numbers["gpu_us"] * 1e-6)}

    return case


def _host_of_call(stage: Stage) -> Callable[[], dict[str, Any]]:
    """Host time of one small call of the kernel of tiles."""

    def case() -> dict[str, Any]:
        q, k, v = inputs(stage.device, torch.bfloat16, 1, 2, 64, 16)
        with torch.no_grad():
            return measured(lambda: EfficientCUDA.forward(q, k, v, Tiles(0.25)))

    return case


def _host_of_lattice(stage: Stage) -> Callable[[], dict[str, Any]]:
    """Host time to read a batch's tiles and to merge a result."""

    def case() -> dict[str, Any]:
        out, part = (torch.randn(1, 2, 64, 16, device=stage.device) for _ in range(2))
        lse, part_lse = (torch.zeros(1, 2, 64, device=stage.device) for _ in range(2))
        tiles = Lattice(0, 4, 16, 16, 1)

        def call() -> None:
            tiles.merge(out, lse, tiles.read(part), tiles.read(part_lse))

        return measured(call)

    return case


def _program(
    stage: Stage, lowering: str, kind: str, dtype: str, head_dim: int
) -> Callable[[], dict[str, Any]]:
    """A lowering on FULL blocks alone, or on a window's blocks.

    Most blocks of the window are PARTIAL.
    """

    def case() -> dict[str, Any]:
        mask, rows = masks.window(stage.size(_WINDOW, 16)), 2**16
        if kind == "full":
            mask, rows = masks.full(), 8192
        attend = cd.compile(mask, lowering=lowering)
        shape = (1, stage.size(8, 1), stage.size(rows, 128), stage.size(head_dim, 16))
        tensors = inputs(stage.device, getattr(torch, dtype), *shape)
        pairs = attend.plan(*tensors).cost.pairs
        return rates(attend, tensors, float(pairs))

    return case


def _constants(stage: Stage) -> dict[str, Any]:
    """The constants of devices.py by the outcomes so far."""
    derived = derive(stage.records.outcomes(stage.name), stage.size(_LARGE, 64))
    print("gpu_check: for compiled_dilated/lowerings/devices.py:", flush=True)
    for name, value in derived.items():
        print(f"    {name}={value:.3g},", flush=True)
    return {"constants": derived}


def derive(outcomes: Mapping[str, Event], large: int) -> dict[str, float]:
    """The measured fields of `devices.Constants`.

    large: rows of the dense problem. Raises AssertionError that names an outcome that is missing.
    """

    def rate(name: str) -> float:
        outcome = outcomes.get(name)
        check(outcome is not None and outcome["ok"], f"the case {name!r} has no rate")
        assert outcome is not None
        return float(outcome["forward"]["flops"])

    def number(name: str, field: str) -> float:
        outcome = outcomes.get(name)
        check(outcome is not None and outcome["ok"], f"the case {name!r} has no number")
        assert outcome is not None
        return float(outcome[field])

    # The rate that is 1: the best dense kernel of torch.
    names = [f"dense {way} bfloat16 64 {large}" for way in ("flash", "cudnn", "efficient")]
    dense = max(rate(name) for name in names if outcomes.get(name, {}).get("ok"))
    tiles = rate(f"dense efficient bfloat16 64 {large}") / dense
    # In float32 the kernel of tiles is the dense one.
    float32 = rate(f"dense efficient float32 64 {large}") / tiles
    host = number("host efficient", "host_us") + number("host lattice", "host_us")
    return {
        "flops_per_byte": dense / number("merge bfloat16", "bytes_per_second"),
        "flops_per_call": dense * host * 1e-6,
        "tiles": tiles,
        "flex": rate("flex partial bfloat16 64") / dense,
        "lanes_full": rate("lanes full bfloat16 64") / dense,
        "lanes_partial": rate("lanes partial bfloat16 64") / dense,
        "flex_float32": rate("flex partial float32 64") / float32,
        "lanes_float32": rate("lanes partial float32 64") / float32,
    }
