"""Partial results of one softmax, and their merge.

A partial is (out, lse) over some of a row's keys; its identity is (0, -inf). Merging is associative and commutative to rounding:

    lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

passes/rewrites/rows/attentions.py merges two parts of SDPA by the same formula: passes import nothing from here, and their
parts have no empty rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers of a merge in low precision that are wide at once.
_MOST_WIDE = 2**19


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a part into (out, lse) in place: out (..., Dv), lse (...). Rows that neither side has seen stay (0, -inf)."""
    # The part's share of the joint weights; a part that saw nothing has none, where -inf - -inf would make NaN.
    share = (part_lse - lse).sigmoid_().masked_fill_(part_lse == -math.inf, 0.0).unsqueeze_(-1)
    if out.dtype == share.dtype:
        out.lerp_(part_out, share)
    else:
        _merge_rounded_(out, part_out, share)
    torch.logaddexp(lse, part_lse, out=lse)


def _merge_rounded_(out: Tensor, part_out: Tensor, share: Tensor) -> None:
    """The same in low precision, rounded once, at the end: some rows at a time, as the sums are wider than what they go to."""
    rows = out.shape[-2]
    at_once = max(1, _MOST_WIDE // max(1, out.numel() // max(1, rows)))
    for start in range(0, rows, at_once):
        to, of, weight = (x[..., start : start + at_once, :] for x in (out, part_out, share))
        to.copy_(to.to(weight.dtype).lerp_(of.to(weight.dtype), weight))


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a new value, differentiable: learned sink logits join this way, as a part of value 0.

    Where both sides saw nothing the result is (0, -inf), and the gradients are 0.
    """
    peak = torch.maximum(lse, part_lse).detach()
    peak = torch.where(peak == -math.inf, 0.0, peak)
    old, new = (lse - peak).exp(), (part_lse - peak).exp()
    total = old + new
    alive = total > 0
    total = torch.where(alive, total, 1.0)
    joint = torch.where(alive, total.log() + peak, -math.inf)
    weighed = out * (old / total).unsqueeze(-1) + part_out * (new / total).unsqueeze(-1)
    return weighed.to(out.dtype), joint


@dataclass(frozen=True)
class Saved:
    """What a backward starts from: q, k, v and their merged out and lse, and the gradients of these two (of lse, if any)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Saved:
        """All of them changed alike."""
        q, k, v, out, lse, grad_out = map(change, (self.q, self.k, self.v, self.out, self.lse, self.grad_out))
        return Saved(q, k, v, out, lse, grad_out, None if self.grad_lse is None else change(self.grad_lse))


def is_by_token(q: Tensor) -> bool:
    """Whether q (B, H, N, D) lies token by token, as a view of (B, N, H, D), and not head by head."""
    return bool(q.stride(1) < q.stride(2))


def empty_out(q: Tensor, v: Tensor, by_token: bool) -> Tensor:
    """out (B, Hq, N, Dv), not written yet. By token, as a model's q lies, its heads are joined without a copy."""
    batch, heads, tokens, width = *q.shape[:3], v.shape[3]
    if by_token:
        return q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return q.new_empty((batch, heads, tokens, width))


def laid_out(out: Tensor, by_token: bool) -> Tensor:
    """out as empty_out lays it: itself, or a copy."""
    return out.transpose(1, 2).contiguous().transpose(1, 2) if by_token else out.contiguous()


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Log-sum-exps are kept in float32, in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
