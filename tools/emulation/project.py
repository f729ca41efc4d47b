"""The project on the pretended GPU: cuda's plans for CPU tensors."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

from . import aten, pretended  # isort: skip

import torch
import triton
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
from torch._library.triton import is_wrap_triton_enabled

import compiled_dilated as cd
from compiled_dilated import attend, execution, graphs
from compiled_dilated.lowerings.tiling import kernels as tiles
from compiled_dilated.plans import Problem

_of_tensors = execution.problem_of
_backward_tiles = CUDAConfigHeuristic.get_flex_attn_bwd_configs
_kernel_of = tiles._kernel_of


def _of_gpu(program: Any, q: Any, k: Any, v: Any, dtype: Any, device: str, *more: Any) -> Problem:
    """The problem of CPU tensors, as one of a GPU."""
    return _of_tensors(program, q, k, v, dtype, "cuda", *more)


def _larger_tiles(self: Any, head_dim: int, dtype: Any) -> Any:
    """Use the tiles of float16 for float32's backward.

    Its own tiles of 16 x 16 take the interpreter minutes.
    """
    return _backward_tiles(self, head_dim, torch.float16)


def _kernel_of_gpu(q: Any, inputs: Any) -> Any:
    """The kernel of tiles of a GPU, in place of the CPU's."""
    kernel = _kernel_of(q, inputs)
    if kernel is not tiles.FlashCPU:
        return kernel
    return tiles.Math if q.dtype == torch.float64 else tiles.EfficientCUDA


def _interpret_lanes() -> None:
    """Launch the kernels of lanes in the interpreter.

    Graphs contain the kernels unchanged.
    """
    # Under TRITON_INTERPRET every triton.jit makes a function that only the interpreter takes.
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        from compiled_dilated.lowerings.lanes import kernels, running
    spec = importlib.util.spec_from_file_location("interpreted_lanes", kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    interpreted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpreted)
    record = running._launch

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if is_wrap_triton_enabled():
            record(kernel, grid, *arguments, **options)
        else:
            getattr(interpreted, kernel.__name__)[grid](*arguments, **options)

    running._launch = launch


execution.problem_of = _of_gpu
attend.gives_lse = lambda device: True
graphs._is_on_cpu = lambda q: False
tiles._kernel_of = _kernel_of_gpu
tiles.backward_dtype = lambda q: q.dtype
# Kernels of the CPU take the place of flash and cuDNN.
torch.nn.attention.sdpa_kernel = lambda backends: contextlib.nullcontext()
if pretended.MODE == "interpret":
    CUDAConfigHeuristic.get_flex_attn_bwd_configs = _larger_tiles
    _interpret_lanes()

__all__ = ["aten", "cd"]
