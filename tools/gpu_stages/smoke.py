"""Stage smoke: every lowering forward and backward once.

It detects a broken machine at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import compiled_dilated as cd

from .calls import inputs, worst_error
from .stage import Stage, check

LOWERINGS = ("strided", "tiled", "dense", "lanes", "flex", "auto")
_ROUNDINGS = 8


def run(stage: Stage) -> None:
    """A LongNet program of two branches in bfloat16, by each lowering."""
    for lowering in LOWERINGS:
        stage.case(lowering, _case(stage, lowering))


def _case(stage: Stage, lowering: str) -> Callable[[], dict[str, Any]]:
    tokens = stage.size(512, 200)
    program = cd.longnet((128, 256), (1, 2), causal=True)

    def case() -> dict[str, Any]:
        attend = cd.compile(program, lowering=lowering)
        head_dim = stage.size(64, 16)
        tensors = inputs(stage.device, torch.bfloat16, 1, 4, tokens, head_dim, kv_heads=2)
        roundings = worst_error(program, attend, tensors)
        plan = attend.plan(*tensors)
        check(roundings <= _ROUNDINGS, f"off by {roundings:.1f} roundings; {_ROUNDINGS} allowed")
        return {"roundings": round(roundings, 2), "lowering": plan.lowering}

    return case
