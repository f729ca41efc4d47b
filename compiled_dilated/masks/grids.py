"""Neighbourhoods on 2-D and 3-D grids of tokens in row-major order (NATTEN, arXiv 2204.07143)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import arguments
from ..regions import EMPTY, PARTIAL, IntArray, Regions, Verdicts, both, verdicts
from .core import NOTHING, Data, Mask, Positions, clip, conjunction, conjuncts, intersection
from .differences import classify_difference, pairs_up_to
from .leading import LeadingQueries, Sinks

Flags = npt.NDArray[np.bool_]

EDGES = ("cut", "shift")


@dataclass(frozen=True)
class Axis:
    """One axis of a neighbourhood: which key coordinates a query coordinate sees."""

    size: int
    radius: int
    dilation: int
    causal: bool
    shift: bool

    def reach(self, c: Positions) -> tuple[Positions, Positions]:
        """The least and the greatest key coordinate seen from query coordinate c; keys between them lie `dilation` apart."""
        back, ahead = self.radius * self.dilation, 0 if self.causal else self.radius * self.dilation
        if not self.shift or self.causal:
            return c - back, c + ahead
        # Work in steps of the dilation: `lane` is the residue class, `rank` the place within its `size // dilation`-odd members.
        lane, rank = c % self.dilation, c // self.dilation
        members = (self.size - lane + self.dilation - 1) // self.dilation
        start = least(_most(rank - self.radius, 0), _most(members - (2 * self.radius + 1), 0))
        return start * self.dilation + lane, (start + 2 * self.radius) * self.dilation + lane

    def keys_of(self, c: int) -> range:
        """The key coordinates seen from query coordinate c."""
        low, high = self.reach(c)
        low += max(0, -(low // self.dilation)) * self.dilation
        return range(low, min(high, self.size - 1) + 1, self.dilation)

    @property
    def is_whole(self) -> bool:
        """Whether every coordinate sees every other one."""
        return self.radius >= self.size - 1 and self.dilation == 1 and not self.causal

    def pairs(self) -> int:
        """Number of pairs of coordinates that see each other."""
        shorter, longer = divmod(self.size, self.dilation)  # the first `longer` lanes have one member more
        return longer * self._pairs_of_lane(shorter + 1) + (self.dilation - longer) * self._pairs_of_lane(shorter)

    def _pairs_of_lane(self, members: int) -> int:
        if self.shift and not self.causal:
            return members * min(members, 2 * self.radius + 1)
        lane = range(members)
        return pairs_up_to(0 if self.causal else self.radius, lane, lane) - pairs_up_to(-self.radius - 1, lane, lane)

    def allows(self, q: Positions, kv: Positions) -> Any:
        low, high = self.reach(q)
        near = (kv >= low) & (kv <= high)
        return near if self.dilation == 1 else near & ((kv - q) % self.dilation == 0)

    def classify(self, q: Span, kv: Span) -> Verdicts:
        step = np.gcd(q.step, kv.step)
        if not self.shift or self.causal:
            back, ahead = self.radius * self.dilation, 0 if self.causal else self.radius * self.dilation
            return classify_difference(kv.low - q.high, kv.high - q.low, step, self.dilation, back, ahead)
        residues = classify_difference(kv.low - q.high, kv.high - q.low, step, self.dilation, None, self.size)
        lows, highs = self._reach_over(q.low, q.high)
        inside = (lows[1] <= kv.low) & (kv.high <= highs[0])
        outside = (kv.high < lows[0]) | (kv.low > highs[1])
        return both(residues, verdicts(inside, outside))

    def _reach_over(self, low: IntArray, high: IntArray) -> tuple[tuple[IntArray, IntArray], tuple[IntArray, IntArray]]:
        """(least, greatest) of reach's first and of its second value over low <= c <= high.

        Both grow with c inside a residue class, so the first and the last member of each class bound them.
        """
        lows, highs = [], []
        for lane in range(min(self.dilation, self.size)):
            first = low + (lane - low) % self.dilation
            last = high - (high - lane) % self.dilation
            present = first <= high
            first, last = np.where(present, first, low), np.where(present, last, high)
            (a, b), (c, d) = self.reach(first), self.reach(last)
            lows += [a, c]
            highs += [b, d]
        return (np.minimum.reduce(lows), np.maximum.reduce(lows)), (np.minimum.reduce(highs), np.maximum.reduce(highs))


def least(a: Positions, b: Positions) -> Positions:
    """The smaller of each two, by operators alone."""
    return a - (a - b) * (a > b)


def _most(a: Positions, b: Positions | int) -> Positions:
    return a - (a - b) * (a < b)


@dataclass(frozen=True, eq=False)
class Span:
    """Coordinates along one axis: low .. high, all congruent to low modulo step (0: one coordinate)."""

    low: IntArray
    high: IntArray
    step: IntArray


def strides_of(grid: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart neighbours along each axis stand in row-major order."""
    return tuple(math.prod(grid[axis + 1 :]) for axis in range(len(grid)))


def coordinates(grid: tuple[int, ...], positions: Positions) -> list[Positions]:
    """The coordinate of row-major positions along each axis."""
    return [
        positions // stride if axis == 0 else positions // stride % size
        for axis, (size, stride) in enumerate(zip(grid, strides_of(grid), strict=True))
    ]


def spans(grid: tuple[int, ...], regions: Regions) -> list[Span]:
    """A box of the grid that holds each region: the region itself where it is a box, its hull otherwise."""
    first, last = coordinates(grid, regions.first), coordinates(grid, regions.last)
    reaches = [np.zeros(len(regions), dtype=np.int64) for _ in grid]
    steps = [np.zeros(len(regions), dtype=np.int64) for _ in grid]
    taken = np.zeros(len(regions), dtype=bool)
    for extent, stride in zip(regions.extent.T, regions.stride.T, strict=True):
        free = extent > 1
        for axis, unit in enumerate(strides_of(grid)):
            mine = free & (stride % unit == 0) & (stride >= unit)
            reaches[axis] += np.where(mine, (extent - 1) * (stride // unit), 0)
            steps[axis] = np.where(mine, np.gcd(steps[axis], stride // unit), steps[axis])
            free &= ~mine
        taken |= free
    box = ~taken
    for axis, size in enumerate(grid):
        box &= (first[axis] + reaches[axis] < size) | (axis == 0)
    out, same = [], np.ones(len(regions), dtype=bool)
    for axis, size in enumerate(grid):
        # Not a box: the row-major range from first to last; an axis is whole as soon as a slower one moves.
        low = np.where(box | same, first[axis], 0)
        high = np.where(box, first[axis] + reaches[axis], np.where(same, last[axis], size - 1))
        step = np.where(box, steps[axis], np.where(low == high, 0, 1))
        out.append(Span(low, high, step))
        same &= first[axis] == last[axis]
    return out


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """Keys near the query along every axis of a grid."""

    grid: tuple[int, ...]
    radius: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    edges: str

    @property
    def axes(self) -> tuple[Axis, ...]:
        shift = self.edges == "shift"
        out = []
        for size, radius, dilation, causal in zip(self.grid, self.radius, self.dilation, self.causal, strict=True):
            # Past the size of the axis a step leaves it, however long; shorter ones keep products within 64 bits.
            step = min(dilation, size)
            out.append(Axis(size, min(radius, -(-size // step)), step, causal, shift))
        return tuple(out)

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        q_at, kv_at = coordinates(self.grid, q), coordinates(self.grid, kv)
        out = self.axes[0].allows(q_at[0], kv_at[0])
        for axis, q_c, kv_c in zip(self.axes[1:], q_at[1:], kv_at[1:], strict=True):
            out = out & axis.allows(q_c, kv_c)
        return out

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        answers = [axis.classify(a, b) for axis, a, b in zip(self.axes, spans(self.grid, q), spans(self.grid, kv), strict=True)]
        return np.asarray(np.minimum.reduce(answers), dtype=np.uint8)

    @property
    def period(self) -> int | None:
        if self._first_limited != 0:
            return self.side_periods[0]
        # Whole lines further on everything is as before, where no window is moved inwards at the first or the last line.
        return None if self.axes[0].shift and not self.axes[0].causal else strides_of(self.grid)[0]

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        first = self._first_limited
        if first == 0:
            return None, None
        period = 1 if first is None else strides_of(self.grid)[first - 1]
        return period, period

    @property
    def _first_limited(self) -> int | None:
        """The first axis along which a query does not see every coordinate."""
        return next((number for number, axis in enumerate(self.axes) if not axis.is_whole), None)

    def expanded(self) -> Mask:
        limited = [number for number, axis in enumerate(self.axes) if not axis.is_whole]
        return self if len(limited) < 2 else conjunction(tuple(self._along(number) for number in limited))

    def _along(self, limited: int) -> Neighborhood:
        """Keys near the query along one axis."""
        axes = range(len(self.grid))
        return Neighborhood(
            self.grid,
            tuple(self.radius[axis] if axis == limited else self.grid[axis] for axis in axes),
            tuple(self.dilation[axis] if axis == limited else 1 for axis in axes),
            tuple(self.causal[axis] and axis == limited for axis in axes),
            self.edges,
        )

    def check(self, queries: range, keys: int) -> None:
        tokens = math.prod(self.grid)
        if max(queries.stop, keys) > tokens:
            raise ValueError(
                f"{self!r} speaks of a grid of {tokens} tokens; got positions up to {max(queries.stop, keys)}. "
                "Make the grid as large as the sequence, or cut the sequence to the grid. Where other tokens stand before the "
                f"grid or after it, say where it starts: offset=0, or offset={max(queries.stop, keys) - tokens}"
            )

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        line, axis = strides_of(self.grid)[0], self.axes[0]
        # A window that is moved inwards at an edge reaches twice as far.
        back = axis.radius * axis.dilation * (2 if axis.shift else 1)
        ahead = 0 if axis.causal else back
        kv = clip(kv, (q[0] // line - back) * line, (q[-1] // line + ahead + 1) * line)
        return (clip(q, (kv[0] // line - ahead) * line, (kv[-1] // line + back + 1) * line), kv) if kv else NOTHING

    def pairs(self, q: range, kv: range) -> int | None:
        whole = range(math.prod(self.grid))
        return math.prod(axis.pairs() for axis in self.axes) if q == kv == whole else None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        at = coordinates(self.grid, q)
        spans = [axis.keys_of(c) for axis, c in zip(self.axes, at, strict=True)]
        lines = [0]
        for span, stride in zip(spans[:-1], strides_of(self.grid)[:-1], strict=True):
            lines = [line + c * stride for line in lines for c in span]
        last = spans[-1]
        return tuple(
            clipped
            for line in lines
            if (clipped := intersection(range(kv_len), range(line + last.start, line + last.stop, last.step)))
        )

    def __repr__(self) -> str:
        def short(values: tuple[Any, ...]) -> str:
            return repr(values[0] if len(set(values)) == 1 else values)

        dilation = "" if set(self.dilation) == {1} else f", dilation={short(self.dilation)}"
        causal = "" if not any(self.causal) else f", causal={self.causal!r}"
        edges = "" if self.edges == "cut" else f", edges={self.edges!r}"
        return f"neighborhood({self.grid!r}, {short(self.radius)}{dilation}{causal}{edges})"


@dataclass(frozen=True, repr=False)
class PlacedNeighborhood(Mask):
    """A neighbourhood whose grid is the tokens from `offset` on; tokens outside of it see nothing, and nothing sees them."""

    neighborhood: Neighborhood
    offset: int

    @property
    def tokens(self) -> range:
        """The positions of the grid."""
        return range(self.offset, self.offset + math.prod(self.neighborhood.grid))

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        first, stop = self.tokens.start, self.tokens.stop
        inside = (q >= first) & (q < stop) & (kv >= first) & (kv < stop)
        return inside & self.neighborhood.allows(b, h, q - first, kv - first, data)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        (q, q_whole, q_outside), (kv, kv_whole, kv_outside) = self._on_grid(q), self._on_grid(kv)
        within = self.neighborhood.classify(q, kv)
        return np.where(q_outside | kv_outside, EMPTY, np.where(q_whole & kv_whole, within, np.minimum(within, PARTIAL)))

    def _on_grid(self, side: Regions) -> tuple[Regions, Flags, Flags]:
        """What of each region lies on the grid, by cells; whether that is all of it, and whether it is nothing."""
        first, last = side.first - self.offset, side.last - self.offset
        step = np.where(side.dense, side.step, 0).clip(1)
        low, high = np.where(first < 0, first % step, first), np.minimum(last, len(self.tokens) - 1)
        whole, outside = (first >= 0) & (last == high), low > high
        extent, stride = np.ones_like(side.extent), np.ones_like(side.stride)
        extent[:, 0], stride[:, 0] = np.where(outside, 1, (high - low) // step + 1), step
        all_axes = whole[:, None]
        cells = Regions(
            np.where(outside, 0, low), np.where(all_axes, side.extent, extent), np.where(all_axes, side.stride, stride)
        )
        return cells, whole, outside

    @property
    def period(self) -> int | None:
        return None

    def expanded(self) -> Mask:
        first, stop = self.tokens.start, self.tokens.stop
        inside = LeadingQueries(stop) & Sinks(stop) & ~LeadingQueries(first) & ~Sinks(first)
        limited = [number for number, axis in enumerate(self.neighborhood.axes) if not axis.is_whole]
        return conjunction((*conjuncts(inside), *(_AlongAxis(self, number) for number in limited)))

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        if q not in self.tokens:
            return ()
        seen = self.neighborhood.keys_of(q - self.offset, max(kv_len - self.offset, 0))
        return None if seen is None else tuple(_moved(span, self.offset) for span in seen)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        q, kv = (clip(side, self.tokens.start, self.tokens.stop) for side in (q, kv))
        if not q or not kv:
            return NOTHING
        q, kv = self.neighborhood.shrink(_moved(q, -self.offset), _moved(kv, -self.offset))
        return (_moved(q, self.offset), _moved(kv, self.offset)) if q and kv else NOTHING

    def pairs(self, q: range, kv: range) -> int | None:
        return self.neighborhood.pairs(*(_moved(intersection(side, self.tokens), -self.offset) for side in (q, kv)))

    def __repr__(self) -> str:
        return f"{repr(self.neighborhood)[:-1]}, offset={self.offset})"


@dataclass(frozen=True)
class _AlongAxis(Mask):
    """One axis of a placed neighbourhood, as if its grid went on before and after."""

    placed: PlacedNeighborhood
    number: int

    @property
    def grid(self) -> tuple[int, ...]:
        return self.placed.neighborhood.grid

    @property
    def axis(self) -> Axis:
        return self.placed.neighborhood.axes[self.number]

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        return self.axis.allows(*(coordinates(self.grid, side - self.placed.offset)[self.number] for side in (q, kv)))

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        moved = (replace(side, base=side.base - self.placed.offset) for side in (q, kv))
        return self.axis.classify(*(spans(self.grid, side)[self.number] for side in moved))

    @property
    def period(self) -> int | None:
        if self.number:
            return self.side_periods[0]
        return None if self.axis.shift and not self.axis.causal else strides_of(self.grid)[0]

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        period = strides_of(self.grid)[self.number - 1] if self.number else None
        return period, period


def _moved(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by, span.step)


def neighborhood(
    grid: tuple[int, ...],
    radius: int | Sequence[int],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    edges: str = "cut",
    offset: int | None = None,
) -> Mask:
    """Keys within `radius` steps of `dilation` along every axis of a grid of 1 to 3 axes, tokens in row-major order.

    causal: per axis, keys at or before the query's coordinate alone. edges: "cut" (fewer keys at the border) or "shift" (the
    window moves inwards, so every query keeps 2 * radius + 1 keys per axis, as in NATTEN, arXiv 2204.07143; a causal axis is
    always cut).

    offset: None where the sequence is the grid (longer ones are refused), else the position of the grid's first token. Tokens
    before the grid and after it, such as a CLS token or registers, then see nothing and are seen by nobody through this mask, in
    a sequence of any length: join them by `|`.

    >>> neighborhood((64, 64), 7, offset=1) | global_tokens(1)
    neighborhood((64, 64), 7, offset=1) | global_tokens(1)
    """
    grid = arguments.integers("grid", grid, 1)
    if len(grid) > 3:
        raise ValueError(f"grid must have 1 to 3 axes; got {grid!r}")
    arguments.integer("the number of cells of the grid", math.prod(grid))

    def per_axis(name: str, value: Any, least: int) -> tuple[int, ...]:
        values = arguments.integers(name, value if arguments.is_iterable(value) else (value,) * len(grid), least)
        if len(values) != len(grid):
            raise ValueError(f"{name} must be one number or one per axis of the grid {grid!r}; got {value!r}")
        return values

    along = tuple(causal) if isinstance(causal, Sequence) else (causal,) * len(grid)
    if len(along) != len(grid) or not all(isinstance(each, bool) for each in along):
        raise ValueError(f"causal must be a bool or one bool per axis of the grid {grid!r}; got {causal!r}")
    arguments.choice("edges", edges, EDGES)
    whole = Neighborhood(grid, per_axis("radius", radius, 0), per_axis("dilation", dilation, 1), along, edges)
    if offset is None:
        return whole
    offset = arguments.integer("offset", offset, 0)
    arguments.integer("the last position of the grid", offset + math.prod(grid) - 1)
    return PlacedNeighborhood(whole, offset)
