"""Ranges of query heads with equal masks, and of their key heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
        """Numbers of the heads."""
        return range(self.start, self.start + self.count * self.step, self.step)


def head_ranges(heads: Sequence[int], group: int) -> list[tuple[HeadRange, HeadRange]]:
    """Query heads and their key heads as ranges for grouped kernels.

    A kernel maps query head i to key head i // (count_q / count_k), both counted within the range.

    heads: query heads, ascending.
    group: query heads per key head.
    """
    ranges = []
    while heads:
        # Greedy: the longest prefix that is one range on both sides; a single head always is.
        for length in range(len(heads), 0, -1):
            pair = _as_ranges(heads[:length], group)
            if pair is not None:
                ranges.append(pair)
                heads = heads[length:]
                break
    return ranges


def _as_ranges(heads: Sequence[int], group: int) -> tuple[HeadRange, HeadRange] | None:
    """Query heads and their key heads, if both are one range."""
    step = _step_of(heads)
    if any(b - a != step for a, b in itertools.pairwise(heads)):
        return None
    keys = [head // group for head in heads]
    distinct = sorted(set(keys))
    key_step = _step_of(distinct)
    # Every key head must serve the same number of query heads, in order.
    shared, uneven = divmod(len(heads), len(distinct))
    expected = [distinct[0] + i // shared * key_step for i in range(len(heads))]
    if uneven or keys != expected:
        return None
    key_heads = HeadRange(distinct[0], key_step, len(distinct))
    return HeadRange(heads[0], step, len(heads)), key_heads


def _step_of(heads: Sequence[int]) -> int:
    """The distance of the first two heads; 1 for a single head."""
    if len(heads) < 2:
        return 1
    return heads[1] - heads[0]


def head_groups(
    branch: Branch, heads: int, kv_heads: int
) -> list[tuple[Mask, HeadRange, HeadRange]]:
    """Ranges of query heads and key heads with equal masks, per branch."""
    groups: dict[Mask, list[int]] = {}
    for head in branch.head_range(heads):
        groups.setdefault(branch.mask_at(head, heads), []).append(head)
    masks_and_ranges = []
    for mask, same_heads in groups.items():
        for query_heads, key_heads in head_ranges(same_heads, heads // kv_heads):
            masks_and_ranges.append((mask, query_heads, key_heads))
    return masks_and_ranges
