"""Any program, dense, in float64: slow, readable, the judge of everything else. No fast path imports it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import arguments, checks
from .masks import Mask
from .mods import ScoreMod, over_pairs, trace_mask_mod, trace_score_mod
from .programs import Program, as_program, check_data, mask_mods_of, query_names_of


def reference(
    program: Program | Mask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    q_offset: int | Tensor = 0,
    data: Mapping[str, Tensor] | None = None,
    score_mod: ScoreMod | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    **options: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by its definition, in float64 and O(N M) memory; differentiable by plain autograd.

        out[h,i] = sum_j c exp(s_ij) v_j / sum_j c exp(s_ij),   lse[h,i] = log sum_j c exp(s_ij),
        c = number of branches that link i and j

    q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), Hq a multiple of Hkv. Returns out (B, Hq, N, Dv), with `return_lse` also
    lse (B, Hq, N). A row that nothing links is 0, its lse -inf, its gradients 0. `sink_logits` (Hq,) join the denominator.

    A score_mod is called as FlexAttention calls it: with scalars, under vmap. A row that sees a key or a value that is not finite
    is NaN (of a value, in its column), and other rows do not notice it.

    Raises what a compiled program raises for the same arguments.
    """
    program = as_program(program)
    _check(program, q, k, v, scale, q_offset, data, score_mod, sink_logits, return_lse, options)
    counts = multiplicity(program, q, k, q_offset=q_offset, data=data)
    groups = q.shape[1] // max(1, k.shape[1])
    q, k, v = q.double(), k.double().repeat_interleave(groups, dim=1), v.double().repeat_interleave(groups, dim=1)
    bad_k, bad_v = ~k.isfinite(), ~v.isfinite()
    k, v = k.masked_fill(bad_k, 0.0), v.masked_fill(bad_v, 0.0)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if score_mod is not None and scores.numel():
        # What a function makes of a hidden pair, NaN or infinity, has no gradient.
        scores = torch.where(counts > 0, scores, 0.0)
        indices = _indices(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q_offset, q.device)
        scores = over_pairs(score_mod, scores, *indices).expand(scores.shape)
    scores = torch.where(counts > 0, scores + counts.clamp(min=1).double().log(), -math.inf)
    out, lse = _softmax(scores, v, sink_logits)
    seen = (counts > 0).double()
    spoiled = seen @ bad_k.any(dim=-1, keepdim=True).double() > 0
    out = torch.where(spoiled | (seen @ bad_v.double() > 0), math.nan, out)
    lse = torch.where(spoiled.squeeze(-1), math.nan, lse)
    return (out, lse) if return_lse else out


def _check(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: object,
    q_offset: object,
    data: Mapping[str, Tensor] | None,
    score_mod: ScoreMod | None,
    sink_logits: object,
    return_lse: object,
    options: Mapping[str, object],
) -> None:
    """Raise what a compiled program raises; q, k and v may be of several dtypes."""
    checks.no_options_of_sdpa(options)
    if scale is not None:
        checks.scale("scale", scale)
    arguments.flag("return_lse", return_lse)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x)
    checks.devices(q, k, v)
    checks.shapes(q.shape, k.shape, v.shape)
    offset = checks.last_offset(q_offset, q.shape[0], q.device)
    program.check(q.shape[2], k.shape[2], offset)
    shape = checks.Shape(q.shape[0], offset + q.shape[2], k.shape[2], q.device)
    checks.data(program.names, query_names_of(program), data, shape)
    check_data(program, data or {})
    for function in mask_mods_of(program):
        trace_mask_mod(function)
    if score_mod is not None:
        trace_score_mod(score_mod, torch.float64)
    if sink_logits is not None:
        checks.sinks(sink_logits, q.shape[1], q.device)


def _softmax(scores: Tensor, v: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """out and lse of scores (B, H, N, M); rows without a finite score are (0, -inf)."""
    if sink_logits is not None:
        sink = sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores, v = torch.cat([scores, sink], dim=-1), torch.nn.functional.pad(v, (0, 0, 0, 1))
    if scores.shape[-1] == 0:
        return scores.new_zeros(*scores.shape[:3], v.shape[-1]), scores.new_full(scores.shape[:3], -math.inf)
    peak = scores.detach().amax(dim=-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = (scores - peak).exp()
    total = weights.sum(dim=-1, keepdim=True)
    dead = total == 0
    alive_total = torch.where(dead, 1.0, total)
    lse = torch.where(dead, -math.inf, alive_total.log() + peak).squeeze(-1)
    return weights @ v / alive_total, lse


def multiplicity(
    program: Program, q: Tensor, k: Tensor, *, q_offset: int | Tensor = 0, data: Mapping[str, Tensor] | None = None
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
    batch: int, heads: int, q_len: int, kv_len: int, q_offset: int | Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def arange(size: int, axis: int) -> Tensor:
        return torch.arange(size, device=device).reshape([-1 if place == axis else 1 for place in range(4)])

    first = q_offset[:, None, None, None] if isinstance(q_offset, Tensor) else q_offset
    return arange(batch, 0), arange(heads, 1), arange(q_len, 2) + first, arange(kv_len, 3)
