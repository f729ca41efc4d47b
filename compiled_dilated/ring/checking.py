"""Single rows of a result recomputed in float64, for sequences too long for the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..heads import HeadRange
from ..programs import Program
from . import sources
from .sources import Source

# Keys of a row are read in parts of at most this many.
_KEYS_AT_ONCE = 2**20


def exact_row(program: Program, q: Source, k: Source, v: Source, row: int, scale: float) -> Tensor:
    """out[:, :, row] in float64, (B, Hq, Dv), by an online softmax over the visible keys."""
    batch, heads, tokens, _ = q.shape
    group = heads // k.shape[1]
    entries = torch.arange(batch)[:, None]
    out = torch.zeros((batch, heads, v.shape[3]), dtype=torch.float64)
    for head in range(heads):
        query = sources.read(q, HeadRange(head, 1, 1), range(row, row + 1))[:, 0, 0].double()
        top = torch.full((batch, 1), -math.inf, dtype=torch.float64)
        total, value = torch.zeros_like(top), torch.zeros_like(out[:, head])
        for branch in program.branches:
            if head not in branch.head_range(heads):
                continue
            mask = branch.mask_at(head, heads)
            _, keys_of_row = mask.shrink(range(row, row + 1), range(tokens))
            for start in range(0, len(keys_of_row), _KEYS_AT_ONCE):
                part = keys_of_row[start : start + _KEYS_AT_ONCE]
                at = torch.arange(part.start, part.stop, part.step)
                allowed = mask.allows(
                    entries,
                    torch.tensor(head),
                    torch.tensor(row),
                    at,
                ).expand(batch, len(at))
                keys, values = (
                    sources.read(x, HeadRange(head // group, 1, 1), part)[:, 0].double()
                    for x in (k, v)
                )
                scores = torch.einsum("bd,bnd->bn", query, keys) * scale
                scores = scores.masked_fill(~allowed, -math.inf)
                # Online softmax: rescale the sums by the change of the maximum.
                higher = torch.maximum(top, scores.amax(dim=1, keepdim=True))
                anchor = torch.where(higher == -math.inf, 0.0, higher)
                weights, before = (scores - anchor).exp(), (top - anchor).exp()
                value = value * before + torch.einsum("bn,bnd->bd", weights, values)
                total, top = total * before + weights.sum(dim=1, keepdim=True), higher
        out[:, head] = torch.where(total == 0, 0.0, value / torch.where(total == 0, 1.0, total))
    return out
