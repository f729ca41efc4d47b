"""Heads as ranges: which query heads see the same, and the key heads that they read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from .masks import Mask
from .programs import Branch


@dataclass(frozen=True)
class HeadRange:
    """Heads start, start + step, ...: `count` of them."""

    start: int
    step: int
    count: int

    def of(self, x: Tensor) -> Tensor:
        """These heads of x (B, H, ...), as a view."""
        return x[:, self.start : self.start + (self.count - 1) * self.step + 1 : self.step]

    def indices(self) -> range:
        return range(self.start, self.start + self.count * self.step, self.step)


def head_ranges(heads: tuple[int, ...], group: int) -> list[tuple[HeadRange, HeadRange]]:
    """Query heads, and the key heads that they read (`group` query heads share one), as ranges that a grouped kernel accepts.

    A kernel maps its i-th query head to its i // (count_q / count_k)-th key head.
    """
    for length in range(len(heads), 0, -1):
        taken = heads[:length]
        step = taken[1] - taken[0] if length > 1 else 1
        if any(b - a != step for a, b in itertools.pairwise(taken)):
            continue
        keys = [head // group for head in taken]
        distinct = sorted(set(keys))
        shared, uneven = divmod(length, len(distinct))
        key_step = distinct[1] - distinct[0] if len(distinct) > 1 else 1
        even = not uneven and all(key == distinct[0] + i // shared * key_step for i, key in enumerate(keys))
        if even:
            rest = head_ranges(heads[length:], group)
            return [(HeadRange(taken[0], step, length), HeadRange(distinct[0], key_step, len(distinct))), *rest]
    return []


def head_groups(branch: Branch, heads: int, kv_heads: int) -> list[tuple[Mask, HeadRange, HeadRange]]:
    """The heads of a branch that see the same, as ranges of query heads and of key heads."""
    groups: dict[Mask, tuple[int, ...]] = {}
    for head in branch.head_range(heads):
        mask = branch.mask_at(head, heads)
        groups[mask] = (*groups.get(mask, ()), head)
    return [(mask, *ranges) for mask, alike in groups.items() for ranges in head_ranges(alike, heads // kv_heads)]
