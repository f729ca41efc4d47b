"""The project on the pretended GPU: plans of cuda for tensors of the CPU."""

from __future__ import annotations

from typing import Any

from . import pretended  # isort: skip

from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

import compiled_dilated as cd
from compiled_dilated import attend, operators
from compiled_dilated.plans import Problem

_of_tensors = operators.problem_of
_backward_tiles = CUDAConfigHeuristic.get_flex_attn_bwd_configs


def _of_gpu(program: Any, q: Any, k: Any, v: Any, dtype: Any, device: str, *rest: Any) -> Problem:
    return _of_tensors(program, q, k, v, dtype, "cuda", *rest)


def _larger_tiles(self: Any, head_dim: int, dtype: Any) -> Any:
    """Tiles of float16 for float32's backward, whose own of 16 x 16 take the interpreter minutes."""
    return _backward_tiles(self, head_dim, pretended.torch.float16)


operators.problem_of = _of_gpu
attend.gives_lse = lambda device: True
if pretended.MODE == "interpret":
    CUDAConfigHeuristic.get_flex_attn_bwd_configs = _larger_tiles

__all__ = ["cd"]
