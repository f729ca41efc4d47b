"""Errors of results in low precision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def largest_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of several tensors, by the norm."""
    errors: list[float] = []
    for result, expected_result in zip(results, expected, strict=True):
        error = (result - expected_result).norm() / expected_result.norm()
        errors.append(float(error))
    return max(errors)
