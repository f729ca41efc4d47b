"""Partial results of one softmax, and their merge.

A partial is (out, lse) over some of a row's keys; its identity is (0, -inf). Merging is associative
and commutative up to rounding:

    lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

passes/rewrites/rows/attentions.py merges two parts of SDPA by the same formula: passes import
nothing of compiled_dilated, and their parts have no empty rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements that a merge in low precision converts to float32 at once.
_MOST_WIDE = 2**19


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result into (out, lse) in place.

    out, part_out: (..., Dv). lse, part_lse: (...). Rows without keys on both sides stay (0, -inf).
    """
    # The part's share of the joint weights; 0 for a part without keys, where -inf - -inf is NaN.
    share = (part_lse - lse).sigmoid_().masked_fill_(part_lse == -math.inf, 0.0).unsqueeze_(-1)
    if out.dtype == share.dtype:
        out.lerp_(part_out, share)
    else:
        _merge_rounded_(out, part_out, share)
    torch.logaddexp(lse, part_lse, out=lse)


def _merge_rounded_(out: Tensor, part_out: Tensor, share: Tensor) -> None:
    """Merge into a low-precision `out`, rounded once, some rows at a time."""
    rows = out.shape[-2]
    at_once = max(1, _MOST_WIDE // max(1, out.numel() // max(1, rows)))
    for start in range(0, rows, at_once):
        merged, part, weight = (x[..., start : start + at_once, :] for x in (out, part_out, share))
        wide = merged.to(weight.dtype)
        merged.copy_(wide.lerp_(part.to(weight.dtype), weight))


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results into new, differentiable tensors.

    Learned sink logits are joined as a partial of value 0. Rows without keys on both sides are
    (0, -inf) with zero gradients.
    """
    # Finite numbers in place of -inf and 0, so that empty rows have gradients of 0 and not NaN.
    peak = torch.maximum(lse, part_lse).detach()
    peak = torch.where(peak == -math.inf, 0.0, peak)
    old, new = (lse - peak).exp(), (part_lse - peak).exp()
    total = old + new
    alive = total != 0  # NaN, where a side is NaN, is not without keys
    total = torch.where(alive, total, 1.0)
    joint = torch.where(alive, total.log() + peak, -math.inf)
    weighed = out * (old / total).unsqueeze(-1) + part_out * (new / total).unsqueeze(-1)
    return weighed.to(out.dtype), joint


@dataclass(frozen=True)
class Saved:
    """Inputs of a backward.

    q, k, v: of the part.
    out, lse: the merged result of all parts.
    grad_out, grad_lse: gradients of out and lse; grad_lse may be None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Saved:
        """Apply `change` to every tensor."""
        tensors = self.q, self.k, self.v, self.out, self.lse, self.grad_out
        grad_lse = None if self.grad_lse is None else change(self.grad_lse)
        q, k, v, out, lse, grad_out = map(change, tensors)
        return Saved(q, k, v, out, lse, grad_out, grad_lse)


def is_by_token(q: Tensor) -> bool:
    """Whether q is stored token by token.

    q: (B, H, N, D), then stored as (B, N, H, D).
    """
    return bool(q.stride(1) < q.stride(2))


def with_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as kernels need.

    Kernels accept any other strides.
    """
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.contiguous()


def empty_out(q: Tensor, v: Tensor, by_token: bool) -> Tensor:
    """Uninitialized out (B, Hq, N, Dv).

    by_token: store it as (B, N, Hq, Dv), so that joining the heads needs no copy.
    """
    batch, heads, tokens, width = *q.shape[:3], v.shape[3]
    if by_token:
        return q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return q.new_empty((batch, heads, tokens, width))


def laid_out(out: Tensor, by_token: bool) -> Tensor:
    """out in the memory format of `empty_out`; a copy if it differs."""
    if by_token:
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of log-sum-exps: float64 for float64, else float32."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32
