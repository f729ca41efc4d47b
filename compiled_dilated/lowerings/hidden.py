"""What keys hold that a query does not see (NaN, infinity, unwritten memory) never reaches its result, nor a gradient.

Kernels compute hidden pairs of a tile too and give them weight 0, and 0 * NaN is NaN. So where a result is not finite, keys and
values are cleaned and the work is done again; then the rows that see a bad number, and these alone, are set to NaN. Which rows do
is itself attention: that of an indicator of the bad numbers, with all scores equal.
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
    """Whether a tensor holds a NaN, or infinities of both signs. One pass, no copy.

    What hidden numbers leave behind is always NaN: weight 0 times infinity is.
    """
    return math.isnan(x.sum().item())


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds finite numbers alone; False too where their sum overflows."""
    return math.isfinite(x.sum().item())


@dataclass(frozen=True)
class Bad:
    """Keys and values of which some numbers are not finite.

    k, v: with zeros in their place. seen: (B, Hkv, M, Dv + 1), 1 where a query that sees the key gets NaN, by column of its
    result, and last whether its lse does: a bad key spoils all columns and the lse, a bad value its own column.
    """

    k: Tensor
    v: Tensor
    seen: Tensor

    @staticmethod
    def of(k: Tensor, v: Tensor) -> Bad | None:
        """None where all numbers are finite."""
        bad_k, bad_v = ~k.isfinite(), ~v.isfinite()
        if not bad_k.any() and not bad_v.any():
            return None
        rows = bad_k.any(dim=-1, keepdim=True)
        seen = torch.cat([bad_v | rows, rows], dim=-1).to(torch.float32)
        return Bad(k.masked_fill(bad_k, 0.0), v.masked_fill(bad_v, 0.0), seen)


def forward(run: Forward, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of run(call, q, k, v), clean of hidden keys."""
    out, lse = run(call, q, k, v)
    # Where all that a query sees of its keys is NaN, ATen's kernel gives it 0.
    if (is_finite(k) and not has_nan(out)) or (bad := Bad.of(k, v)) is None:
        return out, lse
    out, lse = run(call, q, bad.k, bad.v)
    spoil(run, call, q, bad, out, lse)
    return out, lse


def spoil(run: Forward, call: Call, q: Tensor, bad: Bad, out: Tensor, lse: Tensor) -> None:
    """Set to NaN what queries that see bad numbers get, in place."""
    same = torch.zeros_like(q, dtype=torch.float32)
    share, _ = run(replace(call, score_mod=None), same, torch.zeros_like(bad.k, dtype=torch.float32), bad.seen)
    out.masked_fill_(share[..., :-1] > 0, math.nan)
    lse.masked_fill_(share[..., -1] > 0, math.nan)


def backward(run: Backward, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of run(call, saved), clean of what is hidden.

    Rows whose query, result or gradient is not finite get NaN, and so do the keys that they see; no others.
    """
    before = () if call.score_mod is None else tuple(total.clone() for total in call.score_mod.sums)
    grads = run(call, saved)
    if not has_nan(grads[0]):
        return grads
    bad, spoiled = Bad.of(saved.k, saved.v), _spoiled_rows(saved)
    if bad is None and not spoiled.any():
        return grads
    k, v = (saved.k, saved.v) if bad is None else (bad.k, bad.v)
    if call.score_mod is not None:
        for total, start in zip(call.score_mod.sums, before, strict=True):
            total.copy_(start)
    grad_q, grad_k, grad_v = run(call, _without_rows(replace(saved, k=k, v=v), spoiled))
    if spoiled.any():
        seen = _keys_seen(run, call, saved, spoiled)
        grad_q = grad_q.masked_fill(spoiled[..., None], math.nan)
        grad_k, grad_v = grad_k.masked_fill(seen, math.nan), grad_v.masked_fill(seen, math.nan)
        if call.score_mod is not None:
            for total in call.score_mod.sums:
                total.fill_(math.nan)
    return grad_q, grad_k, grad_v


def _spoiled_rows(saved: Saved) -> Tensor:
    """(B, Hq, N) of rows with a number that is not finite."""
    spoiled = saved.lse.isnan()
    for x in (saved.q, saved.out, saved.grad_out):
        spoiled = spoiled | ~x.isfinite().all(dim=-1)
    return spoiled if saved.grad_lse is None else spoiled | ~saved.grad_lse.isfinite()


def _without_rows(saved: Saved, rows: Tensor) -> Saved:
    """The same, and rows that send no gradient: with lse = +inf all their weights are 0."""
    q, out, grad_out = (x.masked_fill(rows[..., None], 0.0) for x in (saved.q, saved.out, saved.grad_out))
    grad_lse = None if saved.grad_lse is None else saved.grad_lse.masked_fill(rows, 0.0)
    return Saved(q, saved.k, saved.v, out, saved.lse.masked_fill(rows, math.inf), grad_out, grad_lse)


def _keys_seen(run: Backward, call: Call, saved: Saved, rows: Tensor) -> Tensor:
    """(B, Hkv, M, 1): the keys that these rows see, as the gradient of values whose results are these rows' indicator."""

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=torch.float32)

    v = zeros(saved.v[..., :1])
    grad_out = rows[..., None].to(torch.float32)
    lse = torch.where(rows, 0.0, math.inf).to(torch.float32)
    indicator = Saved(zeros(saved.q), zeros(saved.k), v, torch.zeros_like(grad_out), lse, grad_out, None)
    return run(replace(call, score_mod=None), indicator)[2] > 0
