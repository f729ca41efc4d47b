"""Masks of blocks of tokens: block windows and dilated blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import arguments
from ..regions import Regions, Verdicts, verdicts
from .core import MOST_RANGES, Data, Mask, Positions
from .differences import classify_difference, pairs_up_to
from .ranges import NOTHING, clip


@dataclass(frozen=True, repr=False)
class BlockWindow(Mask):
    """-left <= kv // block - q // block <= right."""

    block: int
    left: int
    right: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        ahead = kv // self.block - q // self.block
        return (ahead >= -self.left) & (ahead <= self.right)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        least = kv.first // self.block - q.last // self.block
        most = kv.last // self.block - q.first // self.block
        return verdicts(
            (least >= -self.left) & (most <= self.right),
            (least > self.right) | (most < -self.left),
        )

    @property
    def period(self) -> int | None:
        return self.block

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        start, stop = self._keys(q // self.block, q // self.block)
        return (range(min(start, kv_len), min(stop, kv_len)),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        kv = clip(kv, *self._keys(q[0] // self.block, q[-1] // self.block))
        if not kv:
            return NOTHING
        first, last = kv[0] // self.block - self.right, kv[-1] // self.block + self.left
        return clip(q, first * self.block, (last + 1) * self.block), kv

    def _keys(self, first: int, last: int) -> tuple[int, int]:
        """Start and stop of the keys that blocks first .. last see."""
        return max(first - self.left, 0) * self.block, (last + self.right + 1) * self.block

    def pairs(self, q: range, kv: range) -> int | None:
        # Count pairs of blocks, weighted by the tokens in each; blocks at the ends may be short.
        total = 0
        for q_blocks, rows in self._blocks(q):
            for kv_blocks, columns in self._blocks(kv):
                visible = pairs_up_to(self.right, q_blocks, kv_blocks)
                visible -= pairs_up_to(-self.left - 1, q_blocks, kv_blocks)
                total += rows * columns * visible
        return total

    def _blocks(self, side: range) -> list[tuple[range, int]]:
        """Runs of blocks with equal numbers of positions, and that number.

        The first and the last block of a range may be short.
        """
        first, last = side.start // self.block, (side.stop - 1) // self.block
        if first == last:
            return [(range(first, last + 1), len(side))]
        return [
            (range(first, first + 1), (first + 1) * self.block - side.start),
            (range(first + 1, last), self.block),
            (range(last, last + 1), side.stop - last * self.block),
        ]

    def __repr__(self) -> str:
        if self.right == self.left:
            return f"block_window({self.block}, {self.left})"
        return f"block_window({self.block}, {self.left}, {self.right})"


def block_window(block: int, left: int, right: int | None = None) -> Mask:
    """Keys from `left` blocks before the query's block to `right` after it.

    A window made of complete tiles; `window` counts single tokens (BigBird, arXiv 2007.14062).

    block: tokens per block.
    left, right: in blocks; `right` defaults to `left`.
    """
    left = arguments.integer("left", left, 0)
    if right is None:
        right = left
    right = arguments.integer("right", right, 0)
    block = arguments.integer("block", block, 1)
    arguments.integer("the tokens of the window", block * (max(left, right) + 1))
    return BlockWindow(block, left, right)


@dataclass(frozen=True, repr=False)
class DilatedBlocks(Mask):
    """(kv // block - q // block) % stride == 0."""

    block: int
    stride: int

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return (kv // self.block - q // self.block) % self.stride == 0

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        least = kv.first // self.block - q.last // self.block
        most = kv.last // self.block - q.first // self.block
        step = np.where(least == most, 0, 1)
        return classify_difference(least, most, step, self.stride, None, np.iinfo(np.int64).max)

    @property
    def period(self) -> int | None:
        return self.block

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return self.block * self.stride, self.block * self.stride

    def pairs(self, q: range, kv: range) -> int | None:
        borders = sorted({0, self.stride, *self._borders(q), *self._borders(kv)})
        total = 0
        # Classes of blocks between two borders have equal numbers of queries, and of keys.
        for start, stop in itertools.pairwise(borders):
            pairs_of_class = self._tokens_of_class(start, q) * self._tokens_of_class(start, kv)
            total += (stop - start) * pairs_of_class
        return total

    def _borders(self, side: range) -> Iterator[int]:
        """Residue classes of blocks at which the number of tokens may change."""
        for end in (side.start, side.stop):
            residue = end // self.block % self.stride
            yield residue
            yield residue + 1

    def _tokens_of_class(self, residue: int, side: range) -> int:
        """Number of tokens of a range in blocks of one residue class."""
        period = self.block * self.stride
        counts = []
        # Tokens of the class before either end.
        for end in (side.start, side.stop):
            periods, remainder = divmod(end, period)
            in_period = min(max(remainder - residue * self.block, 0), self.block)
            counts.append(periods * self.block + in_period)
        return counts[1] - counts[0]

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        first = q // self.block % self.stride * self.block
        starts = range(first, kv_len, self.stride * self.block)
        if len(starts) > MOST_RANGES:
            return None
        return tuple(range(start, min(start + self.block, kv_len)) for start in starts)

    def __repr__(self) -> str:
        return f"dilated_blocks({self.block}, {self.stride})"


def dilated_blocks(block: int, stride: int) -> Mask:
    """Every `stride`-th block of `block` tokens, counted from the query's own block.

    The share of visible pairs is 1 / stride.
    """
    block = arguments.integer("block", block, 1)
    return DilatedBlocks(block, arguments.integer("stride", stride, 1))
