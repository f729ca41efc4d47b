"""The dense reference in float64, against which every lowering is tested.

No fast path imports it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import arguments, call_checks, checks
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
    """Attention by its definition, in float64 and O(N M) memory.

        out[h,i] = sum_j c exp(s_ij) v_j / sum_j c exp(s_ij),   lse[h,i] = log sum_j c exp(s_ij),
        c = number of branches that link i and j

    Differentiable by plain autograd, twice too. A row without keys is 0, its lse -inf, its
    gradients 0. A key that is not finite makes the rows that see it NaN, a value only its column
    of them.

    Args:
        q: (B, Hq, N, D), Hq a multiple of Hkv.
        k: (B, Hkv, M, D).
        v: (B, Hkv, M, Dv).
        scale: of q . k, default 1 / sqrt(D).
        q_offset: position of the first query, or (B,) of them.
        data: tensors that the masks read, by name.
        score_mod: called as by FlexAttention, with scalars under vmap.
        sink_logits: (Hq,), logits that join the softmax with value 0.

    Returns out (B, Hq, N, Dv); with `return_lse` also lse (B, Hq, N).

    Raises the errors of a compiled program for the same arguments.
    """
    program = as_program(program)
    _check(program, q, k, v, scale, q_offset, data, score_mod, sink_logits, return_lse, options)
    counts = multiplicity(program, q, k, q_offset=q_offset, data=data)
    # 1. Heads of k and v repeated for their query heads; numbers that are not finite set aside.
    group_size = q.shape[1] // max(1, k.shape[1])
    q = q.double()
    k = k.double().repeat_interleave(group_size, dim=1)
    v = v.double().repeat_interleave(group_size, dim=1)
    bad_k, bad_v = ~k.isfinite(), ~v.isfinite()
    k, v = k.masked_fill(bad_k, 0.0), v.masked_fill(bad_v, 0.0)
    # 2. Scores, with the logarithm of the multiplicity: c exp(s) = exp(s + log c).
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if score_mod is not None and scores.numel():
        # A function's result for a hidden pair, NaN or infinity, must have no gradient.
        scores = torch.where(counts > 0, scores, 0.0)
        batch, heads, q_len, kv_len = scores.shape
        indices = _indices(batch, heads, q_len, kv_len, q_offset, q.device)
        scores = over_pairs(score_mod, scores, *indices).expand(scores.shape)
    logs = counts.clamp(min=1).double().log()
    scores = torch.where(counts > 0, scores + logs, -math.inf)
    # 3. Softmax, then NaN for the rows that see a number that is not finite.
    out, lse = _softmax(scores, v, sink_logits)
    seen = (counts > 0).double()
    sees_bad_k = seen @ bad_k.any(dim=-1, keepdim=True).double() > 0
    sees_bad_v = seen @ bad_v.double() > 0
    out = torch.where(sees_bad_k | sees_bad_v, math.nan, out)
    lse = torch.where(sees_bad_k.squeeze(-1), math.nan, lse)
    if return_lse:
        return out, lse
    return out


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
    """Raise the errors of a compiled program, but for different dtypes."""
    call_checks.no_options_of_sdpa(options)
    if scale is not None:
        checks.scale("scale", scale)
    arguments.flag("return_lse", return_lse)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x)
    checks.devices(q, k, v)
    checks.shapes(q.shape, k.shape, v.shape)
    offset = call_checks.last_offset(q_offset, q.shape[0], q.device)
    program.check(q.shape[2], k.shape[2], offset)
    shape = checks.Shape(q.shape[0], offset + q.shape[2], k.shape[2], q.device)
    checks.data(program.names, query_names_of(program), data, shape)
    check_data(program, data or {})
    for function in mask_mods_of(program):
        trace_mask_mod(function)
    if score_mod is not None:
        trace_score_mod(score_mod, torch.float64)
    if sink_logits is not None:
        call_checks.sinks(sink_logits, q.shape[1], q.device)


def _softmax(scores: Tensor, v: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """out and lse of scores (B, H, N, M).

    Rows without a finite score are (0, -inf).
    """
    if sink_logits is not None:
        # One more key with value 0.
        sink = sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    if scores.shape[-1] == 0:
        out = scores.new_zeros(*scores.shape[:3], v.shape[-1])
        return out, scores.new_full(scores.shape[:3], -math.inf)
    # Finite numbers in place of -inf and 0, so that rows without keys have gradients of 0.
    peak = scores.detach().amax(dim=-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = (scores - peak).exp()
    total = weights.sum(dim=-1, keepdim=True)
    is_empty = total == 0
    total = torch.where(is_empty, 1.0, total)
    lse = torch.where(is_empty, -math.inf, total.log() + peak).squeeze(-1)
    return weights @ v / total, lse


def multiplicity(
    program: Program,
    q: Tensor,
    k: Tensor,
    *,
    q_offset: int | Tensor = 0,
    data: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Number of branches that link query and key, (B, Hq, N, M)."""
    batch, heads, q_len, _ = q.shape
    b, _, i, j = _indices(batch, heads, q_len, k.shape[2], q_offset, q.device)
    counts = torch.zeros(batch, heads, q_len, k.shape[2], dtype=torch.int64, device=q.device)
    for branch in program.branches:
        for head in branch.head_range(heads):
            h = torch.full((), head, device=q.device)
            mask = branch.mask_at(head, heads)
            counts[:, head : head + 1] += mask.allows(b, h, i, j, data)
    return counts


def _indices(
    batch: int, heads: int, q_len: int, kv_len: int, q_offset: int | Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b, h, q and kv, which broadcast to (B, H, N, M)."""
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[:, None, None]
    i = torch.arange(q_len, device=device)[:, None]
    j = torch.arange(kv_len, device=device)
    first = q_offset
    if isinstance(q_offset, Tensor):
        first = q_offset[:, None, None, None]
    return b, h[None], i[None, None] + first, j[None, None, None]
