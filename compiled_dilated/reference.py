"""Any program, dense, in float64: slow, readable, the judge of everything else. No fast path imports it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .masks import Mask
from .programs import Program, as_program

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reference(
    program: Program | Mask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    q_offset: int = 0,
    data: Mapping[str, Tensor] | None = None,
    score_mod: ScoreMod | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by its definition, in float64 and O(N M) memory; differentiable by plain autograd.

        out[h,i] = sum_j c exp(s_ij) v_j / sum_j c exp(s_ij),   lse[h,i] = log sum_j c exp(s_ij),
        c = number of branches that link i and j

    q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), Hq a multiple of Hkv. Returns out (B, Hq, N, Dv), with `return_lse` also
    lse (B, Hq, N). A row that nothing links is 0, its lse -inf, its gradients 0. `sink_logits` (Hq,) join the denominator.
    """
    counts = multiplicity(as_program(program), q, k, q_offset=q_offset, data=data)
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, q_len, head_dim = q.shape
    groups = heads // max(1, k.shape[1])
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(head_dim) if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, *_indices(batch, heads, q_len, k.shape[2], q_offset, q.device))
    scores = torch.where(counts > 0, scores + counts.clamp(min=1).double().log(), -math.inf)
    if sink_logits is not None:
        sink = sink_logits.double()[None, :, None, None].expand(batch, heads, q_len, 1)
        scores, v = torch.cat([scores, sink], dim=-1), torch.nn.functional.pad(v, (0, 0, 0, 1))
    if scores.shape[-1] == 0:
        out, lse = q.new_zeros(batch, heads, q_len, v.shape[-1]), q.new_full((batch, heads, q_len), -math.inf)
        return (out, lse) if return_lse else out
    peak = scores.detach().amax(dim=-1, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    weights = (scores - peak).exp()
    total = weights.sum(dim=-1, keepdim=True)
    dead = total == 0
    alive_total = torch.where(dead, 1.0, total)
    out = weights @ v / alive_total
    lse = torch.where(dead, -math.inf, alive_total.log() + peak).squeeze(-1)
    return (out, lse) if return_lse else out


def multiplicity(
    program: Program, q: Tensor, k: Tensor, *, q_offset: int = 0, data: Mapping[str, Tensor] | None = None
) -> Tensor:
    """c (B, Hq, N, M): how many branches link each query and key."""
    batch, heads, q_len, _ = q.shape
    b, _, i, j = _indices(batch, heads, q_len, k.shape[2], q_offset, q.device)
    counts = torch.zeros(batch, heads, q_len, k.shape[2], dtype=torch.int64, device=q.device)
    for branch in program.branches:
        for head in branch.head_range(heads):
            h = torch.full((), head, device=q.device)
            counts[:, head : head + 1] += branch.mask_at(head, heads).allows(b, h, i, j, data)
    return counts


def _indices(
    batch: int, heads: int, q_len: int, kv_len: int, q_offset: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def arange(size: int, axis: int) -> Tensor:
        return torch.arange(size, device=device).reshape([-1 if each == axis else 1 for each in range(4)])

    return arange(batch, 0), arange(heads, 1), arange(q_len, 2) + q_offset, arange(kv_len, 3)
