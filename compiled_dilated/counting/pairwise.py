"""Masks evaluated at pairs of rectangles: at all, or at a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..masks import Mask
from ..masks.explicit import splitmix64
from ..rectangles import Rectangles
from ..regions import IntArray
from ..tiles import Flags

# Few enough for one thread: many short parallel regions are slow beside other work.
_PAIRS_AT_ONCE = 2**15
# Pairs of all samples together, and the least of one rectangle.
_MOST_SAMPLES = 2**22
_LEAST_SAMPLES = 16


def add_pairs(mask: Mask, rectangles: Rectangles, totals: Any) -> None:
    """Evaluate the mask at all pairs; add the allowed ones in place."""
    mask = mask.on("cpu")  # its tables as tensors once, not at each chunk
    # Rectangles of one shape together, some of them at a time.
    shapes = np.stack([rectangles.rows, rectangles.columns], axis=1)
    distinct, shape_of = np.unique(shapes, axis=0, return_inverse=True)
    for number, (rows, columns) in enumerate(distinct.tolist()):
        group = rectangles[shape_of.reshape(-1) == number]
        at_once = max(1, _PAIRS_AT_ONCE // (rows * columns))
        for start in range(0, len(group), at_once):
            chunk = group[start : start + at_once]
            q = chunk.q[:, None, None] + np.arange(rows)[None, :, None]
            kv = chunk.kv[:, None, None] + np.arange(columns)[None, None, :]
            allowed = _allowed(mask, q, kv).reshape(len(chunk), rows * columns)
            np.add.at(totals, chunk.owner, allowed.sum(axis=1).astype(object) * chunk.times)


def add_estimates(mask: Mask, rectangles: Rectangles, totals: Any) -> Any:
    """The totals with pairs estimated from a repeatable sample."""
    mask = mask.on("cpu")
    samples = max(_LEAST_SAMPLES, _MOST_SAMPLES // len(rectangles))
    estimates = np.zeros(len(totals), dtype=np.float64)
    draws = np.arange(samples, dtype=np.uint64)
    at_once = max(1, _PAIRS_AT_ONCE // samples)
    for start in range(0, len(rectangles), at_once):
        chunk = rectangles[start : start + at_once]
        seeds = np.arange(start, start + len(chunk), dtype=np.uint64)[:, None]
        random = splitmix64(splitmix64(seeds) ^ draws)
        # The two halves of a number are independent: one draws the query, the other the key.
        high, low = random >> np.uint64(32), random & np.uint64(0xFFFFFFFF)
        row = (high % chunk.rows[:, None].astype(np.uint64)).astype(np.int64)
        column = (low % chunk.columns[:, None].astype(np.uint64)).astype(np.int64)
        share = _allowed(mask, chunk.q[:, None] + row, chunk.kv[:, None] + column).mean(axis=1)
        np.add.at(estimates, chunk.owner, share * chunk.pairs.astype(np.float64))
    return totals + estimates


def _allowed(mask: Mask, q: IntArray, kv: IntArray) -> Flags:
    """Whether pairs are allowed, for batch entry 0 and head 0.

    q, kv: positions that broadcast.
    """
    zero = torch.zeros((), dtype=torch.int64)
    allowed = torch.as_tensor(mask.allows(zero, zero, torch.from_numpy(q), torch.from_numpy(kv)))
    flags: Flags = allowed.broadcast_to(np.broadcast_shapes(q.shape, kv.shape)).numpy()
    return flags
