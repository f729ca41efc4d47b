"""Residue classes: the dilation of LongNet (arXiv 2307.02486)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import arguments
from ..regions import PARTIAL, Regions, Verdicts, verdicts
from .core import MOST_RANGES, Data, Mask, Positions
from .ranges import intersection

OFFSET_RULES = ("cyclic", "grouped")


@dataclass(frozen=True, repr=False)
class Congruent(Mask):
    """Queries and keys with (position % period) % modulus == offset.

    offset: one number, one per head, or a rule of OFFSET_RULES.
    within: the period in tokens; None if positions never start anew.
    """

    modulus: int
    offset: int | tuple[int, ...] | str
    within: int | None

    def residue(self, i: Positions) -> Positions:
        """Residue of a position within its period."""
        if self.within is not None:
            i = i % self.within
        return i % self.modulus

    def offset_of(self, head: int, heads: int) -> int:
        """Offset of one head out of `heads`."""
        if isinstance(self.offset, int):
            return self.offset
        if isinstance(self.offset, tuple):
            if len(self.offset) != heads:
                raise ValueError(
                    f"{self} names {len(self.offset)} offsets for {heads} heads; "
                    "give one per head or a single number"
                )
            return self.offset[head]
        if self.offset == "cyclic":
            return head % self.modulus
        return head // math.ceil(heads / self.modulus)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        if isinstance(self.offset, int):
            offset: Any = self.offset
        elif self.offset == "cyclic":
            offset = h % self.modulus
        elif isinstance(self.offset, tuple):
            offset = sum((h == head) * value for head, value in enumerate(self.offset))
        else:
            raise ValueError(
                f"{self} depends on the number of heads; "
                "say it by heads=..., or ask mask.for_heads(heads)"
            )
        return (self.residue(q) == offset) & (self.residue(kv) == offset)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        if isinstance(self.offset, int):
            of_q, of_kv = self._classify_side(q, self.offset), self._classify_side(kv, self.offset)
            return np.minimum(of_q, of_kv)
        # Heads differ in their offset: a verdict is certain only if it is the same for all offsets.
        offsets: Iterable[int] = range(self.modulus)
        if isinstance(self.offset, tuple):
            offsets = sorted(set(self.offset))
        candidates = []
        for offset in offsets:
            of_q, of_kv = self._classify_side(q, offset), self._classify_side(kv, offset)
            candidates.append(np.minimum(of_q, of_kv))
        return np.where(np.ptp(candidates, axis=0) == 0, candidates[0], PARTIAL)

    def _classify_side(self, side: Regions, offset: int) -> Verdicts:
        """Whether all, some or no positions match one offset."""
        first, step = side.first, side.step
        # A period that is no multiple of the modulus shifts the residues where it starts anew, so
        # that only regions within one period can be decided.
        one_period = np.ones(len(side), dtype=bool)
        if self.within is not None and self.within % self.modulus:
            one_period = first // self.within == side.last // self.within
            one_period |= step % self.within == 0
            first = first % self.within
        # All positions of the region have the same residue.
        constant = (step % self.modulus == 0) & one_period
        # A step with a common divisor with the modulus reaches only some residues.
        shared = np.gcd(step, self.modulus)
        reachable = (first - offset) % shared.clip(1) == 0
        # A contiguous region may end before its first match.
        steps_away = (offset - first) % self.modulus
        contiguous = (step == 1) & side.dense
        empty = one_period & (~reachable | (constant & (first % self.modulus != offset)))
        empty |= one_period & contiguous & (steps_away > side.last - side.first)
        return verdicts(constant & (first % self.modulus == offset), empty)

    @property
    def period(self) -> int | None:
        if self.within is None or self.within % self.modulus == 0:
            return self.modulus
        return self.within

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        return self.period, self.period

    def pairs(self, q: range, kv: range) -> int | None:
        if not isinstance(self.offset, int):
            return None
        return self._matches(q) * self._matches(kv)

    def _matches(self, side: range) -> int:
        """Number of matches in a contiguous range."""
        return self._matches_before(side.stop) - self._matches_before(side.start)

    def _matches_before(self, position: int) -> int:
        """Number of matches in [0, position); negative for a negative position."""
        assert isinstance(self.offset, int)
        assert self.period is not None
        in_period = len(range(self.offset, self.period, self.modulus))
        periods, remainder = divmod(position, self.period)
        return periods * in_period + len(range(self.offset, remainder, self.modulus))

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
        # The residues start anew in every period: one range per period.
        starts = range(0, kv_len, self.within)
        if len(starts) > MOST_RANGES:
            return None
        out = []
        for start in starts:
            stop = min(start + self.within, kv_len)
            out.append(range(start + self.offset, stop, self.modulus))
        return tuple(out)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return self._matching(q), self._matching(kv)

    def _matching(self, span: range) -> range:
        """The matches in a range; the range itself if they are irregular."""
        if not isinstance(self.offset, int):
            return span
        if self.within is None or self.within % self.modulus == 0:
            return intersection(span, range(self.offset, span.stop, self.modulus))
        # Within a single period the matches are one range.
        start = span[0] // self.within * self.within
        if span[-1] >= start + self.within:
            return span
        return intersection(span, range(start + self.offset, start + self.within, self.modulus))

    def __repr__(self) -> str:
        if self.within is None:
            return f"congruent({self.modulus}, {self.offset!r})"
        return f"congruent({self.modulus}, {self.offset!r}, period={self.within})"


def congruent(
    modulus: int,
    offset: int | tuple[int, ...] | str = 0,
    period: int | None = None,
) -> Mask:
    """Queries and keys whose (position % period) % modulus is `offset`.

    All other queries see nothing.

    modulus: the dilation rate, in tokens.
    offset: a number; one number per head; "cyclic": head % modulus (LongNet, arXiv 2307.02486);
        "grouped": head // ceil(heads / modulus) (its authors' code).
    period: positions start anew every `period` tokens; None: never.
    """
    modulus = arguments.integer("modulus", modulus, 1)
    if isinstance(offset, str):
        arguments.choice("offset", offset, OFFSET_RULES)
    else:
        offset = _offsets(offset, modulus)
    if period is not None:
        period = arguments.integer("period", period, 1)
    return Congruent(modulus, offset, period)


def _offsets(offset: int | tuple[int, ...], modulus: int) -> int | tuple[int, ...]:
    """Check one offset, or one per head."""
    out: int | tuple[int, ...]
    if arguments.is_iterable(offset):
        out = arguments.integers("offset", offset, 0)
        greatest = max(out)
    else:
        out = greatest = arguments.integer("offset", offset, 0)
    if greatest >= modulus:
        raise ValueError(f"offset must be below the modulus {modulus}; got {offset!r}")
    return out
