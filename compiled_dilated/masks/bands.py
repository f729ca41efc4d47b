"""Causal and window masks: bands around the diagonal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import arguments
from ..regions import Regions, Verdicts
from .blocks import DilatedBlocks
from .core import Data, Mask, Positions
from .differences import classify_difference, differences, pairs_up_to
from .ranges import NOTHING, clip, intersection


@dataclass(frozen=True, repr=False)
class Causal(Mask):
    """kv <= q."""

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return kv <= q

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return classify_difference(*differences(q, kv), dilation=1, left=None, right=0)

    @property
    def period(self) -> int | None:
        return 1

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(min(q + 1, kv_len)),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return clip(q, kv[0], q.stop), clip(kv, kv.start, q[-1] + 1)

    def pairs(self, q: range, kv: range) -> int | None:
        return pairs_up_to(0, q, kv)

    def __repr__(self) -> str:
        return "causal()"


def causal() -> Mask:
    """Keys at the query's own position and before."""
    return Causal()


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """Every `dilation`-th key around the query.

    -left <= kv - q <= right, and kv - q is a multiple of `dilation`.
    """

    left: int
    right: int
    dilation: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        near = (kv - q >= -self.left) & (kv - q <= self.right)
        if self.dilation == 1:
            return near
        return near & ((kv - q) % self.dilation == 0)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return classify_difference(
            *differences(q, kv),
            dilation=self.dilation,
            left=self.left,
            right=self.right,
        )

    @property
    def period(self) -> int | None:
        return 1

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        first = q - self.left // self.dilation * self.dilation
        # The first key of the query's residue class that is not negative.
        first += max(0, -(first // self.dilation)) * self.dilation
        return (range(first, min(q + self.right + 1, kv_len), self.dilation),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        kv = clip(kv, q[0] - self.left, q[-1] + self.right + 1)
        if not kv:
            return NOTHING
        q = clip(q, kv[0] - self.right, kv[-1] + self.left + 1)
        # If one side is in a single residue class, so is the other.
        if q.step % self.dilation == 0:
            kv = intersection(kv, range(q.start % self.dilation, kv.stop, self.dilation))
        elif kv.step % self.dilation == 0:
            q = intersection(q, range(kv.start % self.dilation, q.stop, self.dilation))
        return q, kv

    def expanded(self) -> Mask:
        if self.dilation == 1:
            return self
        return Window(self.left, self.right, 1) & DilatedBlocks(1, self.dilation)

    def pairs(self, q: range, kv: range) -> int | None:
        if self.dilation > 1:
            return None
        return pairs_up_to(self.right, q, kv) - pairs_up_to(-self.left - 1, q, kv)

    def __repr__(self) -> str:
        options = ""
        if self.right != self.left:
            options += f", {self.right}"
        if self.dilation != 1:
            options += f", dilation={self.dilation}"
        return f"window({self.left}{options})"


def window(left: int, right: int | None = None, dilation: int = 1) -> Mask:
    """Keys from `left` tokens before the query to `right` after it.

    left, right: in tokens; `right` defaults to `left`.
    dilation: only every `dilation`-th key, counted from the query (Longformer, arXiv 2004.05150).
    """
    left = arguments.integer("left", left, 0)
    if right is None:
        right = left
    right = arguments.integer("right", right, 0)
    return Window(left, right, arguments.integer("dilation", dilation, 1))


def narrowed(masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """Replace `causal()` by windows that end at the query.

    The conjunction of the result equals that of `masks`, which is returned unchanged if it lacks
    `causal()` or a window.
    """
    if Causal() not in masks or not any(isinstance(mask, Window) for mask in masks):
        return masks
    out: list[Mask] = []
    for mask in masks:
        if isinstance(mask, Window):
            out.append(replace(mask, right=min(mask.right, 0)))
        elif mask != Causal():
            out.append(mask)
    return tuple(out)
