"""Arithmetic of kv - q: verdicts of tiles, numbers of pairs."""

from __future__ import annotations

import numpy as np

from ..regions import IntArray, Regions, Verdicts, verdicts


def classify_difference(
    lo: IntArray,
    hi: IntArray,
    step: IntArray,
    dilation: int,
    left: int | None,
    right: int,
) -> Verdicts:
    """Verdicts of a dilated band around the diagonal.

    The mask is -left <= kv - q <= right and (kv - q) % dilation == 0.

    lo, hi: the least and the greatest value of kv - q in a tile.
    step: the values are lo, lo + step, ...; a divisor of the true step is sound; 0 if lo == hi.
    dilation: in tokens.
    left: None for no lower bound.
    right: the upper bound, in tokens.
    """
    # Values of the tile within the bounds, and whether all of them are.
    least, most = lo, np.minimum(hi, right)
    inside = hi <= right
    if left is not None:
        least = np.maximum(lo, -left)
        inside = inside & (lo >= -left)
    shared = np.gcd(step, dilation)
    # A step that is a multiple of the dilation leaves a single residue in the tile.
    constant = step % dilation == 0
    # The first value >= least of a residue in the tile; exact if step divides dilation or vice
    # versa.
    stride = np.where(constant, np.maximum(step, 1), dilation)
    origin = np.where(constant, lo, 0)
    nearest = least + (origin - least) % stride
    exact = constant | (shared == step)
    # Empty: out of bounds, or no value of the tile has residue 0.
    empty = (
        (least > most)
        | (lo % shared.clip(1) != 0)
        | (constant & (lo % dilation != 0))
        | (exact & (nearest > most))
    )
    return verdicts(inside & constant & (lo % dilation == 0), empty)


def differences(q: Regions, kv: Regions) -> tuple[IntArray, IntArray, IntArray]:
    """Least and greatest kv - q of region pairs, and their step."""
    return kv.first - q.last, kv.last - q.first, np.gcd(q.step, kv.step)


def pairs_up_to(right: int, q: range, kv: range) -> int:
    """Number of pairs of contiguous ranges with kv - q <= right."""
    columns = kv.stop - kv.start
    # The query at position i sees i - kv.start + right + 1 keys, clipped to 0 .. columns.
    least = q.start - kv.start + right + 1
    return _clipped_sum(least + q.stop - q.start - 1, columns) - _clipped_sum(least - 1, columns)


def _clipped_sum(last: int, most: int) -> int:
    """Sum of min(x, most) over 1 <= x <= last."""
    rising = min(max(last, 0), most)
    return rising * (rising + 1) // 2 + max(last - most, 0) * most
