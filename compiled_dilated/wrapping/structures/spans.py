"""Causal masks and windows as spans left and right of queries.

causal()                     FAR tokens to the left, 0 to the right
causal() & window(9)         one span: window(9, 0)
block_window(8, 1, 0)        a span of blocks of 8 tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ... import masks
from ...masks import Mask
from ...masks.bands import Causal, Window
from ...masks.blocks import BlockWindow

# A span without an end, beyond any sequence.
FAR = 2**30


@dataclass(frozen=True)
class Span:
    """Tokens, or blocks, that a query sees on both sides.

    block: tokens of a block; 1 for a span of tokens.
    left, right: number of blocks before and after the query's own.
    """

    block: int
    left: int
    right: int

    @staticmethod
    def of(mask: Mask) -> Span | None:
        """The span of a window without gaps; None for other masks."""
        if isinstance(mask, Causal):
            return Span(1, FAR, 0)
        if isinstance(mask, Window) and mask.dilation == 1:
            return Span(1, mask.left, mask.right)
        if isinstance(mask, BlockWindow):
            return Span(mask.block, mask.left, mask.right)
        return None

    def intersection(self, span: Span) -> Span:
        """What both spans of the same block allow."""
        return Span(self.block, min(self.left, span.left), min(self.right, span.right))

    def mask(self) -> Mask:
        """The span as a mask."""
        if self.block > 1:
            return masks.block_window(self.block, self.left, self.right)
        if self.left >= FAR and self.right == 0:
            return masks.causal()
        return masks.window(self.left, self.right)


def merged(conjuncts: Sequence[Mask]) -> list[Mask]:
    """An equivalent list of masks: spans of one block merged, duplicates removed."""
    flat: dict[Mask, None] = {}
    for mask in conjuncts:
        flat |= dict.fromkeys(masks.conjuncts(mask))
    # Spans by block, other masks by themselves, in the order of their first appearance.
    spans: dict[int, Span] = {}
    result: dict[Mask | int, Mask] = {}
    for part in flat:
        span = Span.of(part)
        if span is None:
            result[part] = part
            continue
        if span.block in spans:
            span = span.intersection(spans[span.block])
        spans[span.block] = span
        result[span.block] = span.mask()
    return list(result.values())


def up_to(number: int) -> Mask:
    """kv - q <= number."""
    if number == 0:
        return masks.causal()
    return _one_sided(1, FAR, number)


def from_on(number: int) -> Mask:
    """kv - q >= -number."""
    return _one_sided(1, number, FAR)


def blocks_up_to(block: int, number: int) -> Mask:
    """kv // block - q // block <= number."""
    return _one_sided(block, FAR, number)


def blocks_from_on(block: int, number: int) -> Mask:
    """kv // block - q // block >= -number."""
    return _one_sided(block, number, FAR)


def _one_sided(block: int, left: int, right: int) -> Mask:
    """A span with one end.

    One with a negative end is the complement of a span to the other side.
    """
    if right < 0:
        return ~_window(block, -right - 1, FAR)
    if left < 0:
        return ~_window(block, FAR, -left - 1)
    return _window(block, left, right)


def _window(block: int, left: int, right: int) -> Mask:
    if block > 1:
        return masks.block_window(block, left, right)
    return masks.window(left, right)
