"""Precision and scale of a call's q, k and v."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tracing import is_traced


def scaled(q: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
    """q and the constant factor of q . k.

    A scale that is a tensor, or symbolic in a compiled graph, multiplies q itself.
    """
    if isinstance(scale, Tensor):
        return q * scale.to(q.dtype), 1.0
    if scale is not None:
        if _varies(scale):
            return q * scale, 1.0
        return q, float(scale)
    # Without dimensions every score is 0.
    if q.shape[3] == 0:
        return q, 1.0
    return q, 1 / math.sqrt(q.shape[3])


def _varies(number: float) -> bool:
    """Whether a number is symbolic in the graph that is being traced."""
    if not is_traced():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # For a constant one of the two is known. The threshold is odd, since comparisons elsewhere
    # with round numbers are known of symbols too.
    is_above = statically_known_true(number > 0.0123)
    return not (is_above or statically_known_true(number <= 0.0123))


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the precision of autocast, as in SDPA."""
    if not isinstance(q, Tensor) or q.device.type == "meta":
        return q, k, v
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return _cast(q, dtype), _cast(k, dtype), _cast(v, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Values that are no tensors are refused by the checks that follow.
    if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(dtype)
    return x
