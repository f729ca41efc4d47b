"""A tensor of biases, or a mask tensor, as a score_mod."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mods import ScoreMod


def added(bias: Tensor, q_offset: int | Tensor = 0) -> ScoreMod:
    """A score_mod that adds a bias, or hides by a bool mask.

    bias: (B or 1, Hq or 1, N or 1, M or 1), N and M tokens of the call; a bool one is False where
        it hides.
    q_offset: position of the first query, or one per sequence (B,).
    """
    # Along a dimension of size 1 the index is multiplied by 0.
    of_batch, of_head, of_query, of_key = (int(size != 1) for size in bias.shape)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        first = q_offset
        if isinstance(q_offset, Tensor):
            first = q_offset[b]
        row = q - first
        entry = bias[b * of_batch, h * of_head, row * of_query, kv * of_key]
        if bias.dtype == torch.bool:
            return torch.where(entry, score, -torch.inf)
        return score + entry

    return score_mod
