"""The largest difference of two results, perhaps NaN, as JSON and text."""

from __future__ import annotations

import math


def as_json(difference: float) -> float | None:
    """A difference, or None for NaN and infinity, which JSON lacks."""
    if math.isfinite(difference):
        return difference
    return None


def as_text(difference: float | None) -> str:
    """A difference as the end of "they differ"; None as for `as_json`."""
    if difference is None:
        return "by NaN or infinity"
    return f"by {difference:.1e} at most"
