"""Stage benchmark: whole programs by each lowering.

The GPU's time and the host's are measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import compiled_dilated as cd
from compiled_dilated import masks, planner

from .calls import inputs, rates
from .stage import Stage

_HEADS, _HEAD_DIM = 8, 64
_RADIUS = 12


def run(stage: Stage) -> None:
    """Dense attention, then programs from short to long, `auto` first."""
    rows = stage.size(8192, 64)
    stage.case(f"dense {rows}", _dense(stage, rows))
    for name, program, tokens in _programs(stage):
        for lowering in ("auto", "lanes", "strided", "flex"):
            stage.case(f"{name} {lowering}", _case(stage, program, tokens, lowering))


def _programs(stage: Stage) -> Iterator[tuple[str, Any, int]]:
    """Names, programs and tokens."""
    longnet = stage.size(((2048, 4096, 8192), (1, 2, 4)), ((32, 64), (1, 2)))
    window = masks.window(stage.size(256, 20))
    for tokens in stage.size((2**14, 2**17), (128,)):
        yield f"longnet {tokens}", cd.longnet(*longnet), tokens
    for tokens in stage.size((2**14, 2**16), (128,)):
        yield f"window {tokens}", window, tokens
    for side in stage.size((64, 256), (12,)):
        radius = stage.size(_RADIUS, 2)
        yield f"hilbert {side}x{side}", cd.hilbert_window((side, side), radius), side**2


def _dense(stage: Stage, rows: int) -> Callable[[], dict[str, Any]]:
    """torch's own choice for as many heads, without a mask."""

    def case() -> dict[str, Any]:
        tensors = inputs(stage.device, torch.bfloat16, 1, _HEADS, rows, stage.size(_HEAD_DIM, 16))
        return rates(scaled_dot_product_attention, tensors, float(_HEADS * rows**2))

    return case


def _case(stage: Stage, program: Any, tokens: int, lowering: str) -> Callable[[], dict[str, Any]]:
    def case() -> dict[str, Any]:
        heads, head_dim = stage.size((_HEADS, _HEAD_DIM), (2, 16))
        tensors = inputs(stage.device, torch.bfloat16, 1, heads, tokens, head_dim)
        attend = cd.compile(program, lowering=lowering)
        try:
            plan = attend.plan(*tensors)
        except ValueError as refusal:
            return {"refused": str(refusal)[:200]}
        useful = planner.counted(plan).useful_pairs
        pairs = float(plan.cost.pairs if useful is None else useful)
        about = {"lowering": plan.lowering, "pairs_counted": useful is not None}
        return about | rates(attend, tensors, pairs)

    return case
