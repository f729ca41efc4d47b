"""Neighborhoods on a grid of all tokens, or of a part.

NATTEN, arXiv 2204.07143.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..regions import EMPTY, PARTIAL, Regions, Verdicts
from .algebra import conjunction, conjuncts
from .axes import Axis, Span
from .coordinates import coordinates, spans, strides_of
from .core import Data, Mask, Positions
from .leading import LeadingQueries, Sinks
from .ranges import NOTHING, clip, intersection

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """Keys within a radius of the query on all grid axes."""

    grid: tuple[int, ...]
    radius: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    edges: str

    @property
    def axes(self) -> tuple[Axis, ...]:
        shift = self.edges == "shift"
        out = []
        for number, size in enumerate(self.grid):
            # A longer step leaves the axis too. The bound ensures products within 64 bits.
            step = min(self.dilation[number], size)
            radius = min(self.radius[number], -(-size // step))
            out.append(Axis(size, radius, step, self.causal[number], shift))
        return tuple(out)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        q_at, kv_at = coordinates(self.grid, q), coordinates(self.grid, kv)
        out = self.axes[0].allows(q_at[0], kv_at[0])
        for axis, q_c, kv_c in zip(self.axes[1:], q_at[1:], kv_at[1:], strict=True):
            out = out & axis.allows(q_c, kv_c)
        return out

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        q_spans, kv_spans = spans(self.grid, q), spans(self.grid, kv)
        verdicts = []
        for axis, q_span, kv_span in zip(self.axes, q_spans, kv_spans, strict=True):
            verdicts.append(axis.classify(q_span, kv_span))
        return np.asarray(np.minimum.reduce(verdicts), dtype=np.uint8)

    @property
    def period(self) -> int | None:
        if self._first_limited != 0:
            return self.side_periods[0]
        # A shift by whole lines changes nothing, unless windows move inwards at the border.
        if self.axes[0].shift and not self.axes[0].causal:
            return None
        return strides_of(self.grid)[0]

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        first = self._first_limited
        if first == 0:
            return None, None
        if first is None:
            return 1, 1
        period = strides_of(self.grid)[first - 1]
        return period, period

    @property
    def _first_limited(self) -> int | None:
        """The first axis that is not whole; None if all are."""
        for number, axis in enumerate(self.axes):
            if not axis.is_whole:
                return number
        return None

    def expanded(self) -> Mask:
        limited = [number for number, axis in enumerate(self.axes) if not axis.is_whole]
        if len(limited) < 2:
            return self
        return conjunction(tuple(self._along(number) for number in limited))

    def _along(self, limited: int) -> Neighborhood:
        """The neighborhood limited on one axis only."""
        # A radius of the axis's size, without dilation, allows every coordinate.
        radius, dilation, causal = list(self.grid), [1] * len(self.grid), [False] * len(self.grid)
        radius[limited] = self.radius[limited]
        dilation[limited] = self.dilation[limited]
        causal[limited] = self.causal[limited]
        return Neighborhood(self.grid, tuple(radius), tuple(dilation), tuple(causal), self.edges)

    def check(self, queries: range, keys: int) -> None:
        tokens, stop = math.prod(self.grid), max(queries.stop, keys)
        if stop > tokens:
            raise ValueError(
                f"{self} speaks of a grid of {tokens} tokens; got positions up to {stop}. "
                "Make the grid as large as the sequence, or cut the sequence to the grid. "
                "Where other tokens stand before the grid or after it, "
                f"say where it starts: offset=0, or offset={stop - tokens}"
            )

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        line, axis = strides_of(self.grid)[0], self.axes[0]
        back = axis.radius * axis.dilation
        if axis.shift:
            # A window moved inwards at the border reaches twice as far.
            back *= 2
        ahead = back
        if axis.causal:
            ahead = 0
        # The lines that the queries see, then those that see the remaining keys.
        kv = clip(kv, (q[0] // line - back) * line, (q[-1] // line + ahead + 1) * line)
        if not kv:
            return NOTHING
        q = clip(q, (kv[0] // line - ahead) * line, (kv[-1] // line + back + 1) * line)
        return q, kv

    def pairs(self, q: range, kv: range) -> int | None:
        grid = range(math.prod(self.grid))
        if q == kv == grid:
            return math.prod(axis.pairs() for axis in self.axes)
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        at = coordinates(self.grid, q)
        spans = [axis.keys_of(c) for axis, c in zip(self.axes, at, strict=True)]
        # Starts of the lines that the window covers: one more grid axis per iteration.
        lines = [0]
        for span, stride in zip(spans[:-1], strides_of(self.grid)[:-1], strict=True):
            starts: list[int] = []
            for line in lines:
                starts += [line + c * stride for c in span]
            lines = starts
        last = spans[-1]
        out = []
        for line in lines:
            keys = range(line + last.start, line + last.stop, last.step)
            clipped = intersection(range(kv_len), keys)
            if clipped:
                out.append(clipped)
        return tuple(out)

    def __repr__(self) -> str:
        options = ""
        if set(self.dilation) != {1}:
            options += f", dilation={_short(self.dilation)}"
        if any(self.causal):
            options += f", causal={self.causal!r}"
        if self.edges != "cut":
            options += f", edges={self.edges!r}"
        return f"neighborhood({self.grid!r}, {_short(self.radius)}{options})"


@dataclass(frozen=True, repr=False)
class PlacedNeighborhood(Mask):
    """A neighborhood whose grid starts at position `offset`.

    Tokens outside the grid see nothing, and no query sees them.
    """

    neighborhood: Neighborhood
    offset: int

    @property
    def tokens(self) -> range:
        """Positions of the grid's tokens."""
        return range(self.offset, self.offset + math.prod(self.neighborhood.grid))

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        first, stop = self.tokens.start, self.tokens.stop
        inside = (q >= first) & (q < stop) & (kv >= first) & (kv < stop)
        return inside & self.neighborhood.allows(b, h, q - first, kv - first, data)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        q, q_complete, q_outside = self._on_grid(q)
        kv, kv_complete, kv_outside = self._on_grid(kv)
        verdicts = self.neighborhood.classify(q, kv)
        # A region that is partly outside the grid cannot be FULL.
        verdicts = np.where(q_complete & kv_complete, verdicts, np.minimum(verdicts, PARTIAL))
        return np.where(q_outside | kv_outside, EMPTY, verdicts)

    def _on_grid(self, side: Regions) -> tuple[Regions, Flags, Flags]:
        """The part of each region on the grid, in cells.

        Returns the part, whether it is the complete region, and whether it is empty.
        """
        # 1. Clip the region to the grid, as the hull of its positions where it is no single range.
        first, last = side.first - self.offset, side.last - self.offset
        step = np.where(side.dense, side.step, 0).clip(1)
        low, high = np.where(first < 0, first % step, first), np.minimum(last, len(self.tokens) - 1)
        complete, outside = (first >= 0) & (last == high), low > high
        # 2. The clipped regions have one axis; complete ones keep their lattice.
        extent, stride = np.ones_like(side.extent), np.ones_like(side.stride)
        extent[:, 0], stride[:, 0] = np.where(outside, 1, (high - low) // step + 1), step
        unchanged = complete[:, None]
        cells = Regions(
            np.where(outside, 0, low),
            np.where(unchanged, side.extent, extent),
            np.where(unchanged, side.stride, stride),
        )
        return cells, complete, outside

    @property
    def period(self) -> int | None:
        return None

    def expanded(self) -> Mask:
        first, stop = self.tokens.start, self.tokens.stop
        inside = LeadingQueries(stop) & Sinks(stop) & ~LeadingQueries(first) & ~Sinks(first)
        axes = []
        for number, axis in enumerate(self.neighborhood.axes):
            if not axis.is_whole:
                axes.append(_AlongAxis(self, number))
        return conjunction((*conjuncts(inside), *axes))

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        if q not in self.tokens:
            return ()
        keys = self.neighborhood.keys_of(q - self.offset, max(kv_len - self.offset, 0))
        if keys is None:
            return None
        return tuple(_shifted(span, self.offset) for span in keys)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        first, stop = self.tokens.start, self.tokens.stop
        q, kv = clip(q, first, stop), clip(kv, first, stop)
        if not q or not kv:
            return NOTHING
        q, kv = self.neighborhood.shrink(_shifted(q, -self.offset), _shifted(kv, -self.offset))
        if not q or not kv:
            return NOTHING
        return _shifted(q, self.offset), _shifted(kv, self.offset)

    def pairs(self, q: range, kv: range) -> int | None:
        q, kv = intersection(q, self.tokens), intersection(kv, self.tokens)
        return self.neighborhood.pairs(_shifted(q, -self.offset), _shifted(kv, -self.offset))

    def __repr__(self) -> str:
        return f"{repr(self.neighborhood)[:-1]}, offset={self.offset})"


@dataclass(frozen=True)
class _AlongAxis(Mask):
    """One axis of a placed neighborhood, on an endless grid."""

    placed: PlacedNeighborhood
    number: int

    @property
    def grid(self) -> tuple[int, ...]:
        return self.placed.neighborhood.grid

    @property
    def axis(self) -> Axis:
        return self.placed.neighborhood.axes[self.number]

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return self.axis.allows(self._coordinate(q), self._coordinate(kv))

    def _coordinate(self, positions: Positions) -> Positions:
        return coordinates(self.grid, positions - self.placed.offset)[self.number]

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return self.axis.classify(self._span(q), self._span(kv))

    def _span(self, side: Regions) -> Span:
        cells = replace(side, base=side.base - self.placed.offset)
        return spans(self.grid, cells)[self.number]

    @property
    def period(self) -> int | None:
        if self.number:
            return self.side_periods[0]
        if self.axis.shift and not self.axis.causal:
            return None
        return strides_of(self.grid)[0]

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        if self.number == 0:
            return None, None
        period = strides_of(self.grid)[self.number - 1]
        return period, period


def _short(values: tuple[int, ...]) -> str:
    """Code of one number per axis, shortened if all are equal."""
    if len(set(values)) == 1:
        return repr(values[0])
    return repr(values)


def _shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by, span.step)
