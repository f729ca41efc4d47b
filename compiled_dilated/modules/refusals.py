"""Dropout of attention weights, which the kernels do not have."""

from __future__ import annotations

import math


def is_finite_number(value: object) -> bool:
    """Whether a value is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse_dropout(name: str, value: float) -> None:
    """Raise ValueError unless the dropout is 0."""
    if not is_finite_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1]; got {value!r}. Pass 0.0")
    if value:
        raise ValueError(
            f"{name}={value} cannot be honoured: the fused attention kernels have no dropout. "
            "Pass 0.0, which for inference is the same; "
            f"for training put torch.nn.Dropout({value}) behind the module"
        )
