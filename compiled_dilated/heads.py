"""Heads as ranges: query heads with equal masks, and the key heads that they read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from .masks import Mask
from .programs import Branch


@dataclass(frozen=True)
class HeadRange:
    """`count` heads: start, start + step, ..."""

    start: int
    step: int
    count: int

    def of(self, x: Tensor) -> Tensor:
        """These heads of x (B, H, ...), as a view."""
        return x[:, self.start : self.start + (self.count - 1) * self.step + 1 : self.step]

    def indices(self) -> range:
        return range(self.start, self.start + self.count * self.step, self.step)


def head_ranges(heads: tuple[int, ...], group: int) -> list[tuple[HeadRange, HeadRange]]:
    """Query heads and their key heads, as ranges that a grouped kernel accepts.

    A kernel maps query head i to key head i // (count_q / count_k), both counted within the range.

    heads: query heads, ascending.
    group: query heads per key head.
    """
    # Greedily take the longest prefix that is one range on both sides.
    for length in range(len(heads), 0, -1):
        prefix = heads[:length]
        step = prefix[1] - prefix[0] if length > 1 else 1
        if any(b - a != step for a, b in itertools.pairwise(prefix)):
            continue
        keys = [head // group for head in prefix]
        distinct = sorted(set(keys))
        shared, uneven = divmod(length, len(distinct))
        key_step = distinct[1] - distinct[0] if len(distinct) > 1 else 1
        even = not uneven and all(
            key == distinct[0] + i // shared * key_step for i, key in enumerate(keys)
        )
        if even:
            rest = head_ranges(heads[length:], group)
            return [
                (
                    HeadRange(prefix[0], step, length),
                    HeadRange(distinct[0], key_step, len(distinct)),
                ),
                *rest,
            ]
    return []


def head_groups(
    branch: Branch, heads: int, kv_heads: int
) -> list[tuple[Mask, HeadRange, HeadRange]]:
    """Heads of a branch with equal masks, as ranges of query heads and key heads."""
    groups: dict[Mask, tuple[int, ...]] = {}
    for head in branch.head_range(heads):
        mask = branch.mask_at(head, heads)
        groups[mask] = (*groups.get(mask, ()), head)
    return [
        (mask, *ranges)
        for mask, same in groups.items()
        for ranges in head_ranges(same, heads // kv_heads)
    ]
