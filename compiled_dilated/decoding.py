"""Decoding token by token, with the checks of the first call only.

token   q (B, Hq, 1, D), k and v (B, Hkv, M, D)      only M and the position change
first   every check, a plan, a lowering              then `learn` stores the mask
next    one range of keys, two slices, SDPA          for tensors of the same kind
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
    """Attention of single queries by SDPA on a slice of the cache.

    Per kind of tensors it stores the mask and whether that is bounded; None where a call needs the
    lowerings: heads differ, or data decides. It runs beside a kernel of tens of microseconds, so
    that every attribute it reads counts.
    """

    def __init__(self, program: Program | PerLength) -> None:
        self._program = program
        self._masks: dict[tuple[Any, ...] | None, tuple[Mask, bool] | None] = {}

    def learn(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the kind of tensors that passed every check.

        Tensors of the same kind pass the checks too, for any length of the cache.
        """
        if q.shape[2] != 1 or not _are_plain(q, k, v):
            return
        kind = _kind(q, k, v)
        if kind is None or kind in self._masks:
            return
        # The cache is bounded: a new kind in a full one drops all, which only costs their checks.
        if len(self._masks) >= _MOST_KINDS:
            self._masks.clear()
        program = self._program
        if isinstance(program, PerLength):
            program = program.at(1)
        groups = []
        for branch in program.branches:
            groups += head_groups(branch, q.shape[1], k.shape[1])
        self._masks[kind] = None
        # SDPA on one slice: one branch, the same mask for all heads, and no data.
        if len(groups) == 1:
            mask, head_range = groups[0][:2]
            if head_range.count == q.shape[1] and not mask.per_call:
                mask = conjunction(narrowed(conjuncts(mask)))
                self._masks[kind] = mask, mask.is_bounded

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: Any, q_offset: Any) -> Tensor | None:
        """out by SDPA on a slice; None if that does not suffice.

        q, k, v: (B, Hq, 1, D), (B, Hkv, M, D) and (B, Hkv, M, D).
        """
        if type(q_offset) is not int or not 0 <= q_offset <= MOST:
            return None
        if not _is_plain_scale(scale) or not _are_plain(q, k, v):
            return None
        try:
            entry = self._masks.get(_kind(q, k, v))
        except RuntimeError:  # nested tensors have no shape: the checks refuse them
            return None
        if entry is None:
            return None
        mask, is_bounded = entry
        kv_len = k.shape[2]
        # The only check that depends on the position and on the length of the cache.
        if is_bounded:
            mask.check(range(q_offset, q_offset + 1), kv_len)
        ranges = mask.keys_of(q_offset, kv_len)
        if ranges is None or len(ranges) != 1 or not ranges[0]:
            return None
        # A strided range is a view of the cache too.
        (keys,) = ranges
        seen = slice(keys.start, keys.stop, keys.step)
        is_grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(
            q, k[:, :, seen], v[:, :, seen], scale=scale, enable_gqa=is_grouped
        )


def _is_plain_scale(scale: Any) -> bool:
    """Whether SDPA accepts the scale: None, or a finite positive float."""
    return scale is None or (type(scale) is float and 0.0 < scale < math.inf)


def _kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...] | None:
    """Shapes, dtype and device of a call, without the cache's length.

    Checks depend on nothing else.

    None where k and v differ in shape, dtype or device.
    """
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
    """Whether the call is not traced, transformed, autocast or differentiated."""
    if not autograd.is_plain_call(q, k, v) or _is_any_autocast_enabled():
        return False
    return not autograd.trains(q, k, v)
