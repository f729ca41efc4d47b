"""Tensors that a model adds to its scores, or hides pairs by, as a score_mod."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mods import ScoreMod


def added(bias: Tensor, q_offset: int | Tensor = 0) -> ScoreMod:
    """A score_mod that adds a bias, or hides where a mask of bool is False.

    bias: (B or 1, Hq or 1, N or 1, M or 1), over the queries of a call. q_offset: the position of the first of them, a number
    or one for each sequence, (B,).
    """
    # A dimension of size 1 speaks for all: its index is multiplied by 0.
    of_batch, of_head, of_query, of_key = (int(size != 1) for size in bias.shape)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = q - (q_offset[b] if isinstance(q_offset, Tensor) else q_offset)
        entry = bias[b * of_batch, h * of_head, row * of_query, kv * of_key]
        return torch.where(entry, score, -torch.inf) if bias.dtype == torch.bool else score + entry

    return score_mod
