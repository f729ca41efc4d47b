"""Blocks of the kernels of lanes by the widths of heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The work of one program of the GPU.

    rows: of a tile.
    columns: of a block.
    warps, stages: of Triton.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def forward_blocks(width: int, itemsize: int) -> Blocks:
    """Forward blocks that fit 227 KiB of shared memory without spills.

    width: of a head, as `padded`.
    itemsize: bytes of a number.
    """
    if itemsize == 4:
        if width <= 64:
            return Blocks(32, 32, 4, 2)
        if width <= 128:
            return Blocks(32, 16, 4, 2)
        return Blocks(16, 16, 4, 1)
    if width <= 64:
        return Blocks(128, 64, 4, 3)
    return Blocks(128, 64, 8, 2)


def backward_blocks(width: int, itemsize: int) -> Blocks:
    """Blocks of both kernels of the backward; arguments as of `forward_blocks`."""
    if itemsize == 4:
        if width <= 64:
            return Blocks(32, 16, 4, 1)
        return Blocks(16, 16, 4, 1)
    if width <= 64:
        return Blocks(64, 64, 4, 2)
    if width <= 128:
        return Blocks(64, 64, 8, 2)
    return Blocks(64, 32, 8, 1)


def padded(width: int) -> int:
    """Width that a kernel computes: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def widest(q: Tensor, v: Tensor) -> int:
    """The larger padded width of keys and values, for `forward_blocks`."""
    return max(padded(q.shape[3]), padded(v.shape[3]))
