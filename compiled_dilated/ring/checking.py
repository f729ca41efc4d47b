"""Single rows of a result, recomputed in float64.

For sequences that are too long for the dense reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..heads import HeadRange
from ..masks import Mask
from ..programs import Program
from . import sources
from .sources import Source

# Keys of a row are read in parts of at most this many.
_KEYS_AT_ONCE = 2**20


class _OnlineSoftmax:
    """Softmax of one row per batch entry, over keys in parts."""

    def __init__(self, batch: int, width: int) -> None:
        self.maximum = torch.full((batch, 1), -math.inf, dtype=torch.float64)
        self.total = torch.zeros_like(self.maximum)
        self.value = torch.zeros((batch, width), dtype=torch.float64)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Add keys by their scores (B, n) and values (B, n, Dv).

        Scores of hidden keys are -inf.
        """
        maximum = torch.maximum(self.maximum, scores.amax(dim=1, keepdim=True))
        anchor = torch.where(maximum == -math.inf, 0.0, maximum)
        weights = (scores - anchor).exp()
        # Rescale the sums by the change of the maximum.
        rescale = (self.maximum - anchor).exp()
        self.value = self.value * rescale + torch.einsum("bn,bnd->bd", weights, values)
        self.total = self.total * rescale + weights.sum(dim=1, keepdim=True)
        self.maximum = maximum

    def result(self) -> Tensor:
        """The row of out, (B, Dv); 0 without visible keys."""
        empty = self.total == 0
        return torch.where(empty, 0.0, self.value / torch.where(empty, 1.0, self.total))


def exact_row(program: Program, q: Source, k: Source, v: Source, row: int, scale: float) -> Tensor:
    """out[:, :, row] in float64, (B, Hq, Dv), by an online softmax."""
    batch, heads, tokens, _ = q.shape
    group = heads // k.shape[1]
    entries = torch.arange(batch)[:, None]
    out = torch.zeros((batch, heads, v.shape[3]), dtype=torch.float64)
    for head in range(heads):
        query = sources.read(q, HeadRange(head, 1, 1), range(row, row + 1))[:, 0, 0].double()
        kv_head = HeadRange(head // group, 1, 1)
        softmax = _OnlineSoftmax(batch, v.shape[3])
        # Keys in parts: those of a whole row need not fit into memory.
        for mask, part in _visible_keys(program, head, heads, row, tokens):
            keys, values = (sources.read(x, kv_head, part)[:, 0].double() for x in (k, v))
            scores = torch.einsum("bd,bnd->bn", query, keys) * scale
            places = torch.arange(part.start, part.stop, part.step)
            allowed = mask.allows(entries, torch.tensor(head), torch.tensor(row), places)
            softmax.add(scores.masked_fill(~allowed.expand(batch, len(part)), -math.inf), values)
        out[:, head] = softmax.result()
    return out


def _visible_keys(
    program: Program, head: int, heads: int, row: int, tokens: int
) -> Iterator[tuple[Mask, range]]:
    """Masks of a head, with keys that they may allow, in parts."""
    for branch in program.branches:
        if head not in branch.head_range(heads):
            continue
        mask = branch.mask_at(head, heads)
        _, keys = mask.shrink(range(row, row + 1), range(tokens))
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            yield mask, keys[start : start + _KEYS_AT_ONCE]
