"""Windows of whole blocks (BigBird, arXiv 2007.14062)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import arguments
from ..regions import Regions, Verdicts, verdicts
from .core import NOTHING, Data, Mask, Positions, clip
from .positions import pairs_up_to


@dataclass(frozen=True, repr=False)
class BlockWindow(Mask):
    """-left <= kv // block - q // block <= right."""

    block: int
    left: int
    right: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        ahead = kv // self.block - q // self.block
        return (ahead >= -self.left) & (ahead <= self.right)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        least = kv.first // self.block - q.last // self.block
        most = kv.last // self.block - q.first // self.block
        return verdicts((least >= -self.left) & (most <= self.right), (least > self.right) | (most < -self.left))

    @property
    def period(self) -> int | None:
        return self.block

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(*(min(end, kv_len) for end in self._keys(q // self.block, q // self.block))),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        kv = clip(kv, *self._keys(q[0] // self.block, q[-1] // self.block))
        if not kv:
            return NOTHING
        return clip(q, (kv[0] // self.block - self.right) * self.block, (kv[-1] // self.block + self.left + 1) * self.block), kv

    def _keys(self, first: int, last: int) -> tuple[int, int]:
        """Where what some blocks see starts and stops."""
        return max(first - self.left, 0) * self.block, (last + self.right + 1) * self.block

    def pairs(self, q: range, kv: range) -> int | None:
        # A pair of short blocks is a share of a whole one; the first and the last block of each side may be short.
        return sum(
            rows * columns * (pairs_up_to(self.right, a, b) - pairs_up_to(-self.left - 1, a, b))
            for a, rows in self._blocks(q)
            for b, columns in self._blocks(kv)
        )

    def _blocks(self, side: range) -> list[tuple[range, int]]:
        """Runs of blocks that hold equally many positions of a run each, and how many."""
        first, last = side.start // self.block, (side.stop - 1) // self.block
        if first == last:
            return [(range(first, last + 1), len(side))]
        return [
            (range(first, first + 1), (first + 1) * self.block - side.start),
            (range(first + 1, last), self.block),
            (range(last, last + 1), side.stop - last * self.block),
        ]

    def __repr__(self) -> str:
        right = "" if self.right == self.left else f", {self.right}"
        return f"block_window({self.block}, {self.left}{right})"


def block_window(block: int, left: int, right: int | None = None) -> Mask:
    """Keys whose block of `block` tokens is the query's own, one of `left` before it or of `right` after it (default: as many).

    A window that is made of whole tiles; `window` counts single tokens. BigBird, arXiv 2007.14062.
    """
    left = arguments.integer("left", left, 0)
    right = left if right is None else arguments.integer("right", right, 0)
    block = arguments.integer("block", block, 1)
    arguments.integer("the tokens of the window", block * (max(left, right) + 1))
    return BlockWindow(block, left, right)
