"""Decoding token by token, with the checks of the first call only.

token   q (B, Hq, 1, D), k and v (B, Hkv, M, D)      only M and the position change
first   every check, a plan, a lowering              then `learn` stores how the next are computed
next    on a CPU the native kernel                   for tensors of the same kind
        else SDPA on a slice of the cache
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.nn.functional import scaled_dot_product_attention

from . import autograd
from .arguments import MOST
from .heads import head_groups
from .lowerings import native
from .masks import Mask, conjunction, conjuncts, narrowed
from .native import library
from .programs import PerLength, Program

_MOST_KINDS = 64


@dataclass(frozen=True)
class _Kernel:
    """Single queries by the native kernel.

    program: checked at every position and length; None if the check passes for all.
    """

    code: tuple[int, ...]
    program: Program | None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, q_offset: int
    ) -> Tensor | None:
        """out; None where the kernel does not reach."""
        kv_len = k.shape[2]
        if not kv_len or max(kv_len, q_offset + 1) > native.MOST_POSITIONS:
            return None
        if self.program is not None:
            self.program.check(1, kv_len, q_offset)
        if scale is None:
            scale = q.shape[3] ** -0.5
        out: Tensor = library.operators.native.default(
            q, k, v, None, None, self.code, scale, q_offset, None, False
        )[0]
        return out


@dataclass(frozen=True)
class _Slice:
    """Single queries by SDPA on one range of keys.

    mask: of all heads.
    is_bounded: whether it is undefined for some positions and lengths.
    """

    mask: Mask
    is_bounded: bool

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, q_offset: int
    ) -> Tensor | None:
        """out; None where SDPA on a slice may differ.

        The keys are several ranges or none, or all scores of a head may be NaN.
        """
        kv_len = k.shape[2]
        if self.is_bounded:
            self.mask.check(range(q_offset, q_offset + 1), kv_len)
        ranges = self.mask.keys_of(q_offset, kv_len)
        if ranges is None or len(ranges) != 1 or not ranges[0]:
            return None
        # A strided range is a view of the cache too.
        (keys,) = ranges
        seen = slice(keys.start, keys.stop, keys.step)
        is_grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(
            q, k[:, :, seen], v[:, :, seen], scale=scale, enable_gqa=is_grouped
        )
        # ATen's kernel returns 0 where all scores are NaN.
        if out.device.type == "cpu" and not out.any(dim=-1).all():
            return None
        return out


class Decoder:
    """Attention of single queries whose kind of tensors passed every check before.

    It runs beside a kernel of tens of microseconds, so that every attribute it reads counts.
    """

    def __init__(self, program: Program | PerLength) -> None:
        self._program = program
        # None where a call needs the lowerings.
        self._ways: dict[tuple[Any, ...] | None, _Kernel | _Slice | None] = {}

    def learn(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the kind of tensors that passed every check.

        Tensors of the same kind pass the checks too, for any length of the cache.
        """
        if q.shape[2] != 1 or not _are_plain(q, k, v):
            return
        kind = _kind(q, k, v)
        if kind is None or kind in self._ways:
            return
        # The cache is bounded: a new kind in a full one drops all, which only costs their checks.
        if len(self._ways) >= _MOST_KINDS:
            self._ways.clear()
        program = self._program
        if isinstance(program, PerLength):
            program = program.at(1)
        self._ways[kind] = _by_kernel(program, q, k, v) or _by_slice(program, q, k)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: Any, q_offset: Any) -> Tensor | None:
        """out of a call that needs no checks; None for all others.

        q, k, v: (B, Hq, 1, D), (B, Hkv, M, D) and (B, Hkv, M, D).
        """
        if type(q_offset) is not int or not 0 <= q_offset <= MOST:
            return None
        if not _is_plain_scale(scale) or not _are_plain(q, k, v):
            return None
        try:
            way = self._ways.get(_kind(q, k, v))
        except RuntimeError:  # nested tensors have no shape: the checks refuse them
            return None
        if way is None:
            return None
        return way(q, k, v, scale, q_offset)


def _by_kernel(program: Program, q: Tensor, k: Tensor, v: Tensor) -> _Kernel | None:
    """The native kernel; None for programs that it does not compute.

    Programs that read data are among these.
    """
    work = native.work_of_graph(program, "auto", None, q, k, v)
    if work is None or work.names or work.slots:
        return None
    is_bounded = any(
        branch.mask.is_bounded or branch.order is not None for branch in program.branches
    )
    return _Kernel(work.code, program if is_bounded else None)


def _by_slice(program: Program, q: Tensor, k: Tensor) -> _Slice | None:
    """SDPA on a slice; None for programs that need more.

    It computes one branch without data, the same mask for all heads.
    """
    groups = []
    for branch in program.branches:
        groups += head_groups(branch, q.shape[1], k.shape[1])
    if len(groups) != 1:
        return None
    mask, head_range = groups[0][:2]
    if head_range.count != q.shape[1] or mask.per_call:
        return None
    mask = conjunction(narrowed(conjuncts(mask)))
    return _Slice(mask, mask.is_bounded)


def _is_plain_scale(scale: Any) -> bool:
    """Whether SDPA accepts the scale: None, or a finite positive float."""
    return scale is None or (type(scale) is float and 0.0 < scale < math.inf)


def _kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...] | None:
    """Shapes, dtype and device of a call, without the cache's length.

    Checks depend on nothing else.

    None where k and v differ in shape, dtype or device, and for sparse tensors.
    """
    shape, dtype, device = k.shape, q.dtype, q.device
    if (
        len(shape) != 4
        or v.shape != shape
        or k.dtype is not dtype
        or v.dtype is not dtype
        or k.device != device
        or v.device != device
        or not (q.layout is k.layout is v.layout is torch.strided)
    ):
        return None
    batch, heads, _, head_dim = shape
    return q.shape, batch, heads, head_dim, dtype, device


def _are_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the call is not traced, transformed, autocast or differentiated."""
    if not autograd.is_plain_call(q, k, v) or _is_any_autocast_enabled():
        return False
    return not autograd.trains(q, k, v)
