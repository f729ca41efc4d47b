"""Stage edges: behaviour that no emulation can judge.

torch's own kernels or the GPU decide it.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.lowerings.tiling.kernels import (
    EfficientCUDA,
    Tiles,
    attention,
    attention_backward,
)

from .calls import inputs, worst_error
from .stage import Stage, check

_ROUNDINGS = 8


def run(stage: Stage) -> None:
    """Dead rows, widths, strides, short queries, many masks, graphs, and memory errors."""
    stage.case("dead rows of the kernel of tiles", lambda: _dead_rows(stage))
    for lowering in ("tiled", "lanes", "flex"):
        for head_dim in (60, 72):
            name = f"{lowering} of heads of {head_dim}"
            stage.case(name, _width(stage, lowering, head_dim))
    stage.case("flex of 100 grouped queries", lambda: _grouped(stage))
    stage.case("flex of ten masks", lambda: _many_masks(stage))
    stage.case("lanes keeps hidden NaN out", lambda: _hidden(stage))
    stage.case("lanes in a compiled graph", lambda: _compiled(stage))
    stage.case("lanes in a CUDA graph", lambda: _captured(stage))
    for lowering in ("lanes", "flex"):
        stage.case(f"{lowering} past 2**31 elements", _far(stage, lowering))
    stage.case("compute-sanitizer", lambda: _sanitized(stage))


def sanitized(device: str) -> None:
    """One forward and backward of lanes: what compute-sanitizer watches."""
    tensors = inputs(device, torch.bfloat16, 1, 2, 300, 64)
    attend = cd.compile(cd.longnet((64, 128), (1, 2), causal=True), lowering="lanes")
    torch.autograd.grad(attend(*tensors).float().sum(), tensors)
    torch.cuda.synchronize()


def _checked(program: Any, attend: Any, tensors: list[Tensor]) -> dict[str, Any]:
    """The error of a program against the reference, within bounds."""
    roundings = worst_error(program, attend, tensors)
    check(roundings <= _ROUNDINGS, f"off by {roundings:.1f} roundings; {_ROUNDINGS} allowed")
    return {"roundings": round(roundings, 2)}


def _dead_rows(stage: Stage) -> dict[str, Any]:
    """Check rows without keys: ATen's results, and this library's (0, -inf)."""
    q, k, v = (x.detach() for x in inputs(stage.device, torch.bfloat16, 1, 2, 64, 32))
    bias = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=stage.device)
    bias[..., 7, :] = -math.inf
    tiles = Tiles(0.2, bias=bias)
    raw_out, raw_lse = EfficientCUDA.forward(q, k, v, tiles)
    out, lse = attention(q, k, v, tiles)
    check(bool((out[..., 7, :] == 0).all()), "out of a dead row is not 0")
    check(bool((lse[..., 7] == -math.inf).all()), "lse of a dead row is not -inf")
    alive = lse.masked_fill(lse == -math.inf, math.inf)
    grads = attention_backward(torch.ones_like(out), None, q, k, v, out, alive, tiles)
    check(all(bool(grad.isfinite().all()) for grad in grads), "a gradient is not finite")
    check(bool((grads[0][..., 7, :] == 0).all()), "the gradient of a dead row is not 0")
    return {
        "out": str(raw_out[0, 0, 7, 0].item()),
        "lse": str(raw_lse[0, 0, 7].item()),
    }


def _width(stage: Stage, lowering: str, head_dim: int) -> Callable[[], dict[str, Any]]:
    """Check widths unaligned to 16 bytes, or no power of two."""

    def case() -> dict[str, Any]:
        tensors = inputs(stage.device, torch.bfloat16, 1, 2, stage.size(512, 160), head_dim)
        program = masks.window(40)
        return _checked(program, cd.compile(program, lowering=lowering), tensors)

    return case


def _grouped(stage: Stage) -> dict[str, Any]:
    """More rows than torch's kernel for decoding has a tile for."""
    keys = stage.size(1024, 256)
    q, _, _ = inputs(stage.device, torch.bfloat16, 1, 4, 100, 64)
    _, k, v = inputs(stage.device, torch.bfloat16, 1, 2, keys, 64)
    program = masks.causal() & masks.window(50)
    attend = cd.compile(program, lowering="flex")
    with torch.no_grad():
        out = attend(q, k, v, q_offset=keys - 100)
        true = cd.reference(program, q, k, v, q_offset=keys - 100)
    error = float((out.double() - true).abs().max())
    check(error <= 0.05, f"off by {error:.2e}")
    return {"largest_error": error}


def _many_masks(stage: Stage) -> dict[str, Any]:
    """More masks than torch compiles for one function."""
    tensors = inputs(stage.device, torch.bfloat16, 1, 1, stage.size(256, 130), 16)
    for width in range(stage.size(10, 3)):
        with torch.no_grad():
            cd.compile(masks.window(20 + width), lowering="flex")(*tensors)
    return {}


def _hidden(stage: Stage) -> dict[str, Any]:
    """Check that a NaN reaches only the rows that see it.

    Forward and backward are checked.
    """
    tokens = stage.size(512, 200)
    tensors = inputs(stage.device, torch.bfloat16, 1, 2, tokens, 32)
    q, k, v = (x.detach().clone() for x in tensors)
    k[:, :, 100] = math.nan
    v[:, :, 100] = math.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = cd.compile(masks.window(9, 0), lowering="lanes")(*leaves, return_lse=True)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    rows = out.isnan().all(dim=-1)[0, 0].nonzero().flatten().tolist()
    check(rows == list(range(100, 110)), f"out is NaN in rows {rows}")
    check(lse.isnan()[0, 0].nonzero().flatten().tolist() == rows, "lse is NaN elsewhere")
    for name, grad, first in zip("qkv", grads, (100, 91, 91), strict=True):
        rows = grad.isnan().any(dim=-1)[0, 0].nonzero().flatten().tolist()
        check(rows == list(range(first, 110)), f"the gradient of {name} is NaN in rows {rows}")
    return {}


def _compiled(stage: Stage) -> dict[str, Any]:
    """Check that a compiled graph of lanes equals the eager call.

    Sums of delta may differ.
    """
    tensors = inputs(stage.device, torch.bfloat16, 1, 2, stage.size(1024, 150), 32)
    attend = cd.compile(masks.window(50), lowering="lanes")
    compiled = torch.compile(attend, fullgraph=True)
    out, eager = compiled(*tensors), attend(*tensors)
    grads = torch.autograd.grad(out.float().sum(), tensors)
    expected = torch.autograd.grad(eager.float().sum(), tensors)
    check(torch.equal(out, eager), "out differs")
    for name, grad, right in zip("qkv", grads, expected, strict=True):
        error = float((grad - right).abs().max()) / float(right.abs().max())
        check(error <= 0.02, f"the gradient of {name} is off by {error:.1e} of its largest number")
    return {}


def _captured(stage: Stage) -> dict[str, Any]:
    """A CUDA graph refuses whatever waits for the GPU."""
    q, k, v = (x.detach() for x in inputs(stage.device, torch.bfloat16, 1, 2, 256, 32))
    attend = cd.compile(masks.window(50), lowering="lanes")
    eager = attend(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    graph.replay()
    torch.cuda.synchronize()
    check(torch.equal(out, eager), "out differs")
    return {}


def _far(stage: Stage, lowering: str) -> Callable[[], dict[str, Any]]:
    """Check two heads of a cache whose offsets exceed 32 bits."""

    def case() -> dict[str, Any]:
        tokens, heads = stage.size((2**18 + 512, 128), (640, 4))
        free, _ = torch.cuda.mem_get_info()
        needed = 2 * tokens * heads * 64 * 2
        if free < 2 * needed:
            return {"skipped": f"needs {2 * needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"}
        k = torch.zeros(1, tokens, heads, 64, dtype=torch.bfloat16, device=stage.device)
        v = torch.zeros_like(k)
        last = torch.randn(2, 512, heads, 64, device=stage.device)
        k[:, -512:], v[:, -512:] = last[0].to(k.dtype), last[1].to(v.dtype)
        k, v = (x.transpose(1, 2)[:, :2] for x in (k, v))
        q = torch.randn(1, 2, 128, 64, dtype=torch.bfloat16, device=stage.device)
        program = masks.causal() & masks.window(200)
        attend = cd.compile(program, lowering=lowering)
        with torch.no_grad():
            out = attend(q, k, v, q_offset=tokens - 128)
            # Only the last 512 keys are seen.
            near = (x[:, :, -512:] for x in (k, v))
            true = cd.reference(program, q, *near, q_offset=512 - 128)
        error = float((out.double() - true).abs().max())
        check(error <= 0.05, f"off by {error:.2e}")
        return {"largest_error": error}

    return case


def _sanitized(stage: Stage) -> dict[str, Any]:
    """Check a forward and backward of lanes for memory errors.

    The check needs compute-sanitizer to be installed.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on PATH"}
    code = f"from gpu_stages import edges; edges.sanitized({stage.device!r})"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    check(run.returncode == 0, f"exit code {run.returncode}: {run.stdout[-500:]}")
    return {}
