"""Isolation of results and gradients from NaN and infinity in hidden keys.

Kernels compute hidden pairs of a tile with weight 0, and 0 * NaN is NaN. If a result is not finite,
the call is repeated with zeros in place of NaN and infinity. Rows that see such a number are then
set to NaN. A further call determines these rows: all scores are equal, and its values indicate the
keys with such numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calls import Call
from ..partials import Saved

Forward = Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Backward = Callable[[Call, Saved], tuple[Tensor, Tensor, Tensor]]


def has_nan(x: Tensor) -> bool:
    """Whether a tensor has a NaN, or infinities of both signs.

    One pass without a copy. Hidden numbers always leave NaN: weight 0 times infinity is NaN.
    """
    return math.isnan(x.sum().item())


def is_finite(x: Tensor) -> bool:
    """Whether a tensor and its sum are finite."""
    return math.isfinite(x.sum().item())


@dataclass(frozen=True)
class Bad:
    """Keys and values with non-finite numbers.

    k, v: with zeros in place of these numbers.
    indicator: (B, Hkv, M, Dv + 1), 1 where a query that sees the key gets NaN. Column d is for
        column d of out, the last one for lse. A bad key spoils all columns, a bad value its own.
    """

    k: Tensor
    v: Tensor
    indicator: Tensor

    @staticmethod
    def of(k: Tensor, v: Tensor) -> Bad | None:
        """Bad numbers of k and v; None if all are finite."""
        bad_k, bad_v = ~k.isfinite(), ~v.isfinite()
        if not bad_k.any() and not bad_v.any():
            return None
        rows = bad_k.any(dim=-1, keepdim=True)
        indicator = torch.cat([bad_v | rows, rows], dim=-1).to(torch.float32)
        return Bad(k.masked_fill(bad_k, 0.0), v.masked_fill(bad_v, 0.0), indicator)


def forward(run: Forward, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of run(call, q, k, v), unaffected by hidden keys.

    A query that is not finite gets NaN if it sees a key.
    """
    out, lse = run(call, q, k, v)
    # ATen's kernel returns 0 for a query whose scores are all NaN, hence the checks of q and k.
    if is_finite(q) and is_finite(k) and not has_nan(out):
        return out, lse
    bad, rows = Bad.of(k, v), ~q.isfinite().all(dim=-1)
    has_bad_rows = bool(rows.any())
    if bad is None and not has_bad_rows:
        return out, lse
    # 1. Results of finite queries, keys and values.
    if bad is not None:
        k, v = bad.k, bad.v
    if has_bad_rows:
        q = q.masked_fill(rows[..., None], 0.0)
    out, lse = run(call, q, k, v)
    # 2. NaN for queries that see a bad number, and for bad queries that see anything.
    if bad is not None:
        spoil(run, call, q, bad, out, lse)
    if has_bad_rows:
        rows &= lse != -math.inf
        out.masked_fill_(rows[..., None], math.nan)
        lse.masked_fill_(rows, math.nan)
    return out, lse


def spoil(run: Forward, call: Call, q: Tensor, bad: Bad, out: Tensor, lse: Tensor) -> None:
    """Set results of queries that see bad numbers to NaN, in place."""
    # With zeros as q and k all scores are equal, and the result is the share of bad keys.
    zeros_q = torch.zeros_like(q, dtype=torch.float32)
    zeros_k = torch.zeros_like(bad.k, dtype=torch.float32)
    share, _ = run(replace(call, score_mod=None), zeros_q, zeros_k, bad.indicator)
    out.masked_fill_(share[..., :-1] > 0, math.nan)
    lse.masked_fill_(share[..., -1] > 0, math.nan)


def backward(run: Backward, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, unaffected by hidden keys.

    Rows with a non-finite query, result or gradient get NaN, and so do the keys that they see; all
    other gradients are finite.
    """
    sums: tuple[Tensor, ...] = ()
    if call.score_mod is not None:
        sums = call.score_mod.sums
    # 1. The usual case: all gradients are finite.
    before = [total.clone() for total in sums]
    grads = run(call, saved)
    if not has_nan(grads[0]):
        return grads
    bad, spoiled = Bad.of(saved.k, saved.v), _spoiled_rows(saved)
    if bad is None and not spoiled.any():
        return grads
    # 2. Repeat from the earlier sums, with clean keys and without the spoiled rows.
    for total, start in zip(sums, before, strict=True):
        total.copy_(start)
    if bad is not None:
        saved = replace(saved, k=bad.k, v=bad.v)
    grad_q, grad_k, grad_v = run(call, _without_rows(saved, spoiled))
    # 3. NaN in the spoiled rows, in the keys that they see, and in all learned operands.
    if spoiled.any():
        keys = _visible_keys(run, call, saved, spoiled)
        grad_q = grad_q.masked_fill(spoiled[..., None], math.nan)
        grad_k, grad_v = grad_k.masked_fill(keys, math.nan), grad_v.masked_fill(keys, math.nan)
        for total in sums:
            total.fill_(math.nan)
    return grad_q, grad_k, grad_v


def _spoiled_rows(saved: Saved) -> Tensor:
    """Rows whose query, result or gradient is not finite, (B, Hq, N)."""
    spoiled = saved.lse.isnan()
    for x in (saved.q, saved.out, saved.grad_out):
        spoiled = spoiled | ~x.isfinite().all(dim=-1)
    if saved.grad_lse is None:
        return spoiled
    return spoiled | ~saved.grad_lse.isfinite()


def _without_rows(saved: Saved, rows: Tensor) -> Saved:
    """Saved tensors without gradients from some rows.

    lse = +inf makes all of their weights 0.
    """
    tensors = (saved.q, saved.out, saved.grad_out)
    q, out, grad_out = (x.masked_fill(rows[..., None], 0.0) for x in tensors)
    grad_lse = saved.grad_lse
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(rows, 0.0)
    lse = saved.lse.masked_fill(rows, math.inf)
    return Saved(q, saved.k, saved.v, out, lse, grad_out, grad_lse)


def _visible_keys(run: Backward, call: Call, saved: Saved, rows: Tensor) -> Tensor:
    """Keys that some rows see, (B, Hkv, M, 1).

    Computed as the gradient of values, from an indicator of the rows.
    """
    grad_out = rows[..., None].to(torch.float32)
    tensors = (saved.q, saved.k, saved.v[..., :1], grad_out)
    q, k, v, out = (torch.zeros_like(x, dtype=torch.float32) for x in tensors)
    # Weights are exp(0 - lse): 1 in the rows, 0 in all others.
    lse = torch.where(rows, 0.0, math.inf).to(torch.float32)
    indicator = Saved(q, k, v, out, lse, grad_out, None)
    return run(replace(call, score_mod=None), indicator)[2] > 0
