"""The Hilbert curve of a grid, as numpy arrays."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..masks.coordinates import coordinates

AnyInts = npt.NDArray[Any]
SmallInts = npt.NDArray[np.int32]


def _hilbert_index(axes: list[AnyInts], bits: int) -> AnyInts:
    """Index of cells along the curve of a cube of side 2**bits.

    axes: coordinates of the cells, per axis; the list is overwritten.

    J. Skilling, Programming the Hilbert curve, 2004.
    """
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for axis in range(len(axes)):
            # Cells of the upper half are mirrored along axis 0, those of the lower half swapped
            # between axis 0 and this one.
            upper = -(axes[axis] >> bit & 1)
            swap = (axes[0] ^ axes[axis]) & below & ~upper
            axes[0] = axes[0] ^ (swap | (upper & below))
            if axis:
                axes[axis] = axes[axis] ^ swap
    # Gray code of the coordinates, along the axes and then along the bits.
    for axis in range(1, len(axes)):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    parity = axes[-1] >> 1
    for shift in (1, 2, 4, 8, 16):
        parity = parity ^ parity >> shift
    # Interleave the bits of all axes, the highest first.
    index = np.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for coordinate in axes:
            index = index << 1 | ((coordinate ^ parity) >> bit & 1)
    return index


@lru_cache(maxsize=16)
def curve(grid: tuple[int, ...]) -> SmallInts:
    """Row-major position of each cell along the curve."""
    n, sizes = math.prod(grid), [size for size in grid if size > 1]
    if len(sizes) < 2:
        return np.arange(n, dtype=np.int32)
    bits = (max(sizes) - 1).bit_length()
    dtype = np.int32 if bits * len(sizes) < 32 else np.int64
    index = _hilbert_index([axis.reshape(-1) for axis in np.indices(sizes, dtype=dtype)], bits)
    # A complete cube needs no sort: its indices are a permutation.
    if n == 1 << bits * len(sizes):
        return inverse(index)
    return np.argsort(index).astype(np.int32)


def inverse(permutation: AnyInts) -> SmallInts:
    """The inverse of a permutation, (n,)."""
    out = np.empty(len(permutation), dtype=np.int32)
    out[permutation] = np.arange(len(permutation), dtype=np.int32)
    return out


@lru_cache(maxsize=16)
def curve_coordinates(grid: tuple[int, ...]) -> tuple[SmallInts, ...]:
    """Coordinates along the curve, per axis, with the last entry repeated.

    The extra entry lets a run end at the last cell.
    """
    return tuple(np.append(c, c[-1:]).astype(np.int32) for c in coordinates(grid, curve(grid)))
