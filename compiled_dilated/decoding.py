"""Decoding token after token: one query against a cache, where nothing but the cache's length and the position is new.

token   q (B, Hq, 1, D), k and v (B, Hkv, M, D)      M grows, the rest stays
first   every check, a plan, a lowering              then `learn` keeps what stays
next    one range of keys, two slices, SDPA          as soon as the tensors are seen to be alike
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.nn.functional import scaled_dot_product_attention

from . import autograd
from .arguments import MOST
from .heads import head_groups
from .masks import Mask, conjunction, conjuncts, narrowed
from .programs import PerLength, Program

_MOST_KINDS = 64


class Decoder:
    """The mask of single queries, by the kind of their tensors.

    A mask and whether it is bounded, where all heads see the same and no data decides; None where each call goes through the
    lowerings. It runs beside a kernel of tens of microseconds, so that each attribute that it reads counts.
    """

    def __init__(self, program: Program | PerLength) -> None:
        self._program = program
        self._known: dict[tuple[Any, ...] | None, tuple[Mask, bool] | None] = {}

    def learn(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Remember tensors that passed every check: others of their kind pass them too, whatever the cache's length."""
        if q.shape[2] != 1 or not _are_plain(q, k, v) or (kind := _kind(q, k, v)) is None or kind in self._known:
            return
        if len(self._known) >= _MOST_KINDS:
            self._known.clear()
        program = self._program.at(1) if isinstance(self._program, PerLength) else self._program
        groups = [group for branch in program.branches for group in head_groups(branch, q.shape[1], k.shape[1])]
        self._known[kind] = None
        if len(groups) == 1 and groups[0][1].count == q.shape[1] and not groups[0][0].per_call:
            mask = conjunction(narrowed(conjuncts(groups[0][0])))
            self._known[kind] = mask, mask.is_bounded

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: Any, q_offset: Any) -> Tensor | None:
        """out (B, Hq, 1, D); None where a check is due or the keys are no one range."""
        if type(q_offset) is not int or not 0 <= q_offset <= MOST or not _is_plain_scale(scale) or not _are_plain(q, k, v):
            return None
        known = self._known.get(_kind(q, k, v))
        if known is None:
            return None
        (mask, is_bounded), kv_len = known, k.shape[2]
        if is_bounded:
            mask.check(range(q_offset, q_offset + 1), kv_len)
        spans = mask.keys_of(q_offset, kv_len)
        if spans is None or len(spans) != 1 or not spans[0]:
            return None
        (span,) = spans
        seen = slice(span.start, span.stop, span.step)
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen], scale=scale, enable_gqa=grouped)


def _is_plain_scale(scale: Any) -> bool:
    """Whether SDPA takes the scale as it is: none, or a finite positive number."""
    return scale is None or (type(scale) is float and 0.0 < scale < math.inf)


def _kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...] | None:
    """All that a check looks at and that stays from token to token; None of a cache of two kinds."""
    shape, dtype, device = k.shape, q.dtype, q.device
    if (
        len(shape) != 4
        or v.shape != shape
        or k.dtype is not dtype
        or v.dtype is not dtype
        or k.device != device
        or v.device != device
    ):
        return None
    batch, heads, _, head_dim = shape
    return q.shape, batch, heads, head_dim, dtype, device


def _are_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are tensors that nobody traces, transforms, casts or differentiates."""
    return autograd.is_plain_call(q, k, v) and not _is_any_autocast_enabled() and not autograd.trains(q, k, v)
