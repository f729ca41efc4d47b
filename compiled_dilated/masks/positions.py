"""Masks over a line of tokens: what depends on the positions of query and key alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import arguments
from ..regions import EMPTY, FULL, PARTIAL, IntArray, Regions, Verdicts, verdicts
from .core import NOTHING, Data, Mask, Positions, clip, intersection

# A query that sees more separate ranges of keys than this is served by evaluating its mask.
_MOST_RANGES = 64


def classify_difference(lo: IntArray, hi: IntArray, step: IntArray, dilation: int, left: int | None, right: int) -> Verdicts:
    """Tiles of `-left <= kv - q <= right and (kv - q) % dilation == 0`, from what kv - q can be: lo .. hi in steps of `step`.

    `step` may be too small for the real differences (sound), 0 where lo == hi. `left` None: no bound.
    """
    least = lo if left is None else np.maximum(lo, -left)
    most = np.minimum(hi, right)
    inside = (hi <= right) & (True if left is None else lo >= -left)
    shared = np.gcd(step, dilation)
    constant = step % dilation == 0  # one residue only
    # The first value >= least that the residues admit: exact where one of step and dilation divides the other.
    stride = np.where(constant, np.maximum(step, 1), dilation)
    origin = np.where(constant, lo, 0)
    nearest = least + (origin - least) % stride
    exact = constant | (shared == step)
    empty = (least > most) | (lo % shared.clip(1) != 0) | (constant & (lo % dilation != 0)) | (exact & (nearest > most))
    return verdicts(inside & constant & (lo % dilation == 0), empty)


def _differences(q: Regions, kv: Regions) -> tuple[IntArray, IntArray, IntArray]:
    return kv.first - q.last, kv.last - q.first, np.gcd(q.step, kv.step)


def pairs_up_to(right: int, q: range, kv: range) -> int:
    """Number of pairs with kv - q <= right, of two runs of positions."""
    columns = kv.stop - kv.start
    # The query at position i sees i - kv.start + right + 1 keys, but no fewer than none and no more than all.
    least = q.start - kv.start + right + 1
    return _clipped_sum(least + q.stop - q.start - 1, columns) - _clipped_sum(least - 1, columns)


def _clipped_sum(last: int, most: int) -> int:
    """The sum of min(x, most) over 1 <= x <= last."""
    rising = min(max(last, 0), most)
    return rising * (rising + 1) // 2 + max(last - most, 0) * most


def _overlap(a: range, start: int, stop: int) -> int:
    return max(0, min(a.stop, stop) - max(a.start, start))


@dataclass(frozen=True, repr=False)
class Causal(Mask):
    """kv <= q."""

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return kv <= q

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return classify_difference(*_differences(q, kv), dilation=1, left=None, right=0)

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
    """A query sees keys at its own position and before."""
    return Causal()


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """-left <= kv - q <= right, and kv - q a multiple of `dilation`."""

    left: int
    right: int
    dilation: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        near = (kv - q >= -self.left) & (kv - q <= self.right)
        return near if self.dilation == 1 else near & ((kv - q) % self.dilation == 0)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return classify_difference(*_differences(q, kv), dilation=self.dilation, left=self.left, right=self.right)

    @property
    def period(self) -> int | None:
        return 1

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        first = q - self.left // self.dilation * self.dilation
        first += max(0, -(first // self.dilation)) * self.dilation
        return (range(first, min(q + self.right + 1, kv_len), self.dilation),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        kv = clip(kv, q[0] - self.left, q[-1] + self.right + 1)
        if not kv:
            return NOTHING
        q = clip(q, kv[0] - self.right, kv[-1] + self.left + 1)
        if q.step % self.dilation == 0:
            kv = intersection(kv, range(q.start % self.dilation, kv.stop, self.dilation))
        elif kv.step % self.dilation == 0:
            q = intersection(q, range(kv.start % self.dilation, q.stop, self.dilation))
        return q, kv

    def expanded(self) -> Mask:
        return self if self.dilation == 1 else Window(self.left, self.right, 1) & DilatedBlocks(1, self.dilation)

    def pairs(self, q: range, kv: range) -> int | None:
        return None if self.dilation > 1 else pairs_up_to(self.right, q, kv) - pairs_up_to(-self.left - 1, q, kv)

    def __repr__(self) -> str:
        right = "" if self.right == self.left else f", {self.right}"
        dilation = "" if self.dilation == 1 else f", dilation={self.dilation}"
        return f"window({self.left}{right}{dilation})"


def window(left: int, right: int | None = None, dilation: int = 1) -> Mask:
    """Keys from `left` tokens before the query to `right` after it (default: as many), every `dilation`-th.

    Longformer, arXiv 2004.05150.
    """
    left = arguments.integer("left", left, 0)
    right = left if right is None else arguments.integer("right", right, 0)
    return Window(left, right, arguments.integer("dilation", dilation, 1))


def narrowed(masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """Masks that allow together what these do: windows are cut where `causal()` cuts them, which is then not needed."""
    if Causal() not in masks or not any(isinstance(mask, Window) for mask in masks):
        return masks
    return tuple(
        replace(mask, right=min(mask.right, 0)) if isinstance(mask, Window) else mask for mask in masks if mask != Causal()
    )


@dataclass(frozen=True, repr=False)
class Segments(Mask):
    """q and kv in the same run of `length` tokens."""

    length: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return q // self.length == kv // self.length

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return _same_group(q.first // self.length, q.last // self.length, kv.first // self.length, kv.last // self.length)

    @property
    def period(self) -> int | None:
        return self.length

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        start = q // self.length * self.length
        return (range(start, min(start + self.length, kv_len)),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        kv = clip(kv, q[0] // self.length * self.length, (q[-1] // self.length + 1) * self.length)
        return (clip(q, kv[0] // self.length * self.length, (kv[-1] // self.length + 1) * self.length), kv) if kv else NOTHING

    def pairs(self, q: range, kv: range) -> int | None:
        length = self.length
        first, last = max(q.start, kv.start) // length, (min(q.stop, kv.stop) - 1) // length
        total = max(0, last - first - 1) * length**2
        # The first and the last common segment may be cut; those between them are whole on both sides.
        for segment in {first, last}:
            if first <= last:
                span = segment * length, (segment + 1) * length
                total += _overlap(q, *span) * _overlap(kv, *span)
        return total

    def __repr__(self) -> str:
        return f"segments({self.length})"


def _same_group(q_first: IntArray, q_last: IntArray, kv_first: IntArray, kv_last: IntArray) -> Verdicts:
    empty = (q_last < kv_first) | (kv_last < q_first)
    return verdicts((q_first == q_last) & (kv_first == kv_last) & (q_first == kv_first), empty)


def segments(length: int) -> Mask:
    """Blocks of `length` tokens that see themselves alone; the last may be short."""
    return Segments(arguments.integer("length", length, 1))


OFFSET_RULES = ("cyclic", "grouped")


@dataclass(frozen=True, repr=False)
class Congruent(Mask):
    """(i % period) % modulus == offset, for the query and for the key; `offset` is one number, one per head, or a rule."""

    modulus: int
    offset: int | tuple[int, ...] | str
    within: int | None

    def residue(self, i: Positions) -> Positions:
        return (i if self.within is None else i % self.within) % self.modulus

    def offset_of(self, head: int, heads: int) -> int:
        if isinstance(self.offset, int):
            return self.offset
        if isinstance(self.offset, tuple):
            if len(self.offset) != heads:
                raise ValueError(
                    f"{self} names {len(self.offset)} offsets for {heads} heads; give one per head or a single number"
                )
            return self.offset[head]
        return head % self.modulus if self.offset == "cyclic" else head // math.ceil(heads / self.modulus)

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        if isinstance(self.offset, int):
            offset: Any = self.offset
        elif self.offset == "cyclic":
            offset = h % self.modulus
        elif isinstance(self.offset, tuple):
            offset = sum((h == head) * value for head, value in enumerate(self.offset))
        else:
            raise ValueError(f"{self} depends on the number of heads; say it by heads=..., or ask mask.for_heads(heads)")
        return (self.residue(q) == offset) & (self.residue(kv) == offset)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        if isinstance(self.offset, int):
            return np.minimum(self._classify_side(q, self.offset), self._classify_side(kv, self.offset))
        offsets = range(self.modulus) if isinstance(self.offset, str) else sorted(set(self.offset))
        answers = [np.minimum(self._classify_side(q, offset), self._classify_side(kv, offset)) for offset in offsets]
        return np.where(np.ptp(answers, axis=0) == 0, answers[0], PARTIAL)

    def _classify_side(self, side: Regions, offset: int) -> Verdicts:
        first, step = side.first, side.step
        one_period = np.ones(len(side), dtype=bool)
        if self.within is not None and self.within % self.modulus:
            one_period = (first // self.within == side.last // self.within) | (step % self.within == 0)
            first = first % self.within
        constant = (step % self.modulus == 0) & one_period
        shared = np.gcd(step, self.modulus)
        reachable = (first - offset) % shared.clip(1) == 0
        steps_away = (offset - first) % self.modulus  # how far the next match is, where the region is contiguous
        contiguous = (step == 1) & side.dense
        empty = one_period & (~reachable | (constant & (first % self.modulus != offset)))
        empty |= one_period & contiguous & (steps_away > side.last - side.first)
        return verdicts(constant & (first % self.modulus == offset), empty)

    @property
    def period(self) -> int | None:
        return self.modulus if self.within is None or self.within % self.modulus == 0 else self.within

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return self.period, self.period

    def pairs(self, q: range, kv: range) -> int | None:
        if not isinstance(self.offset, int):
            return None
        q_matches, kv_matches = (self._matches_before(side.stop) - self._matches_before(side.start) for side in (q, kv))
        return q_matches * kv_matches

    def _matches_before(self, position: int) -> int:
        """Number of matching positions from 0 on; of those before 0 the negative number."""
        assert isinstance(self.offset, int)
        assert self.period is not None
        in_period = len(range(self.offset, self.period, self.modulus))
        periods, rest = divmod(position, self.period)
        return periods * in_period + len(range(self.offset, rest, self.modulus))

    def at_head(self, head: int, heads: int) -> Mask:
        return replace(self, offset=self.offset_of(head, heads))

    def for_heads(self, heads: int) -> Mask:
        if isinstance(self.offset, int):
            return self
        return replace(self, offset=tuple(self.offset_of(head, heads) for head in range(heads)))

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        if not isinstance(self.offset, int):
            return None
        if self.residue(q) != self.offset:
            return ()
        if self.within is None or self.within % self.modulus == 0:
            return (range(self.offset, kv_len, self.modulus),)
        starts = range(0, kv_len, self.within)
        if len(starts) > _MOST_RANGES:
            return None
        return tuple(range(at + self.offset, min(at + self.within, kv_len), self.modulus) for at in starts)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return self._matching(q), self._matching(kv)

    def _matching(self, span: range) -> range:
        if not isinstance(self.offset, int):
            return span
        if self.within is None or self.within % self.modulus == 0:
            return intersection(span, range(self.offset, span.stop, self.modulus))
        start = span[0] // self.within * self.within
        if span[-1] >= start + self.within:
            return span
        return intersection(span, range(start + self.offset, start + self.within, self.modulus))

    def __repr__(self) -> str:
        within = "" if self.within is None else f", period={self.within}"
        return f"congruent({self.modulus}, {self.offset!r}{within})"


def congruent(modulus: int, offset: int | tuple[int, ...] | str = 0, period: int | None = None) -> Mask:
    """Queries and keys whose (position % period) % modulus is `offset`; all other queries see nothing.

    offset: a number; one number per head; "cyclic": head % modulus (LongNet, arXiv 2307.02486);
    "grouped": head // ceil(heads / modulus) (its authors' code). period: positions start anew every `period` tokens.
    """
    modulus = arguments.integer("modulus", modulus, 1)
    if isinstance(offset, str):
        arguments.choice("offset", offset, OFFSET_RULES)
    else:
        by_head = arguments.is_iterable(offset)
        values = arguments.integers("offset", offset, 0) if by_head else (arguments.integer("offset", offset, 0),)
        if max(values) >= modulus:
            raise ValueError(f"offset must be below the modulus {modulus}; got {offset!r}")
        offset = values if by_head else values[0]
    return Congruent(modulus, offset, None if period is None else arguments.integer("period", period, 1))


@dataclass(frozen=True, repr=False)
class Sinks(Mask):
    """kv < count."""

    count: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return (kv < self.count) & (q == q)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return verdicts(kv.last < self.count, kv.first >= self.count)

    @property
    def period(self) -> int | None:
        return None

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return 1, None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(min(self.count, kv_len)),)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return q, clip(kv, kv.start, self.count)

    def pairs(self, q: range, kv: range) -> int | None:
        return (q.stop - q.start) * max(0, min(kv.stop, self.count) - kv.start)

    def __repr__(self) -> str:
        return f"sinks({self.count})"


def sinks(count: int) -> Mask:
    """The first `count` keys, seen by every query (arXiv 2309.17453); join `causal()` where the future must stay hidden."""
    return Sinks(arguments.integer("count", count, 0))


@dataclass(frozen=True, repr=False)
class LeadingQueries(Mask):
    """q < count. Part of `prefix` and `global_tokens`."""

    count: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return (q < self.count) & (kv == kv)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return verdicts(q.last < self.count, q.first >= self.count)

    @property
    def period(self) -> int | None:
        return None

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return None, 1

    def pairs(self, q: range, kv: range) -> int | None:
        return max(0, min(q.stop, self.count) - q.start) * (kv.stop - kv.start)

    def __repr__(self) -> str:
        return f"leading_queries({self.count})"


@dataclass(frozen=True, repr=False)
class Prefix(Mask):
    """q < count and kv < count."""

    count: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return (q < self.count) & (kv < self.count)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return verdicts((q.last < self.count) & (kv.last < self.count), (q.first >= self.count) | (kv.first >= self.count))

    @property
    def period(self) -> int | None:
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(min(self.count, kv_len)),) if q < self.count else ()

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return clip(q, q.start, self.count), clip(kv, kv.start, self.count)

    def expanded(self) -> Mask:
        return LeadingQueries(self.count) & Sinks(self.count)

    def __repr__(self) -> str:
        return f"prefix({self.count})"


def prefix(count: int) -> Mask:
    """The first `count` tokens see each other both ways; `causal() | prefix(n)` is a prefix language model."""
    return Prefix(arguments.integer("count", count, 0))


@dataclass(frozen=True, repr=False)
class GlobalTokens(Mask):
    """q < count or kv < count."""

    count: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return (q < self.count) | (kv < self.count)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        full = (q.last < self.count) | (kv.last < self.count)
        return np.where(full, FULL, np.where((q.first >= self.count) & (kv.first >= self.count), EMPTY, PARTIAL))

    @property
    def period(self) -> int | None:
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        return (range(kv_len if q < self.count else min(self.count, kv_len)),)

    def expanded(self) -> Mask:
        return LeadingQueries(self.count) | Sinks(self.count)

    def __repr__(self) -> str:
        return f"global_tokens({self.count})"


@dataclass(frozen=True, repr=False)
class DilatedBlocks(Mask):
    """(kv // block - q // block) % stride == 0."""

    block: int
    stride: int

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return (kv // self.block - q // self.block) % self.stride == 0

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        lo = kv.first // self.block - q.last // self.block
        hi = kv.last // self.block - q.first // self.block
        step = np.where(lo == hi, 0, 1)
        return classify_difference(lo, hi, step, self.stride, None, np.iinfo(np.int64).max)

    @property
    def period(self) -> int | None:
        return self.block

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return self.block * self.stride, self.block * self.stride

    def pairs(self, q: range, kv: range) -> int | None:
        borders = sorted({0, self.stride, *self._borders(q), *self._borders(kv)})
        # Between two borders all classes of blocks have equally many queries, and equally many keys.
        return sum(
            (stop - start) * self._tokens_of_class(start, q) * self._tokens_of_class(start, kv)
            for start, stop in itertools.pairwise(borders)
        )

    def _borders(self, side: range) -> Iterator[int]:
        for end in (side.start, side.stop):
            class_ = end // self.block % self.stride
            yield class_
            yield class_ + 1

    def _tokens_of_class(self, class_: int, side: range) -> int:
        period = self.block * self.stride
        counts = []
        for end in (side.start, side.stop):
            periods, rest = divmod(end, period)
            counts.append(periods * self.block + min(max(rest - class_ * self.block, 0), self.block))
        return counts[1] - counts[0]

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        first = q // self.block % self.stride * self.block
        starts = range(first, kv_len, self.stride * self.block)
        return None if len(starts) > _MOST_RANGES else tuple(range(at, min(at + self.block, kv_len)) for at in starts)

    def __repr__(self) -> str:
        return f"dilated_blocks({self.block}, {self.stride})"


def dilated_blocks(block: int, stride: int) -> Mask:
    """Every `stride`-th block of `block` tokens, counted from the query's own: a share 1 / stride of all pairs."""
    return DilatedBlocks(arguments.integer("block", block, 1), arguments.integer("stride", stride, 1))
