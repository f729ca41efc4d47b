"""Neighborhoods on grids of tokens in row-major order (NATTEN, arXiv 2204.07143)."""

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
    """One axis of a neighborhood: the key coordinates visible to a query coordinate.

    size: coordinates on the axis.
    radius: in steps of `dilation`.
    shift: move windows inwards at the border, in place of cutting them.
    """

    size: int
    radius: int
    dilation: int
    causal: bool
    shift: bool

    def reach(self, c: Positions) -> tuple[Positions, Positions]:
        """The least and the greatest key coordinate visible from coordinate c.

        Keys between them are `dilation` apart.
        """
        if self.causal:
            return c - self.radius * self.dilation, c
        if not self.shift:
            return c - self.radius * self.dilation, c + self.radius * self.dilation
        # Count in steps of the dilation: `lane` is the residue class, `rank` the index within it.
        lane, rank = c % self.dilation, c // self.dilation
        members = (self.size - lane + self.dilation - 1) // self.dilation
        start = least(_most(rank - self.radius, 0), _most(members - (2 * self.radius + 1), 0))
        return start * self.dilation + lane, (start + 2 * self.radius) * self.dilation + lane

    def keys_of(self, c: int) -> range:
        """The key coordinates visible from query coordinate c."""
        low, high = self.reach(c)
        low += max(0, -(low // self.dilation)) * self.dilation
        return range(low, min(high, self.size - 1) + 1, self.dilation)

    @property
    def is_whole(self) -> bool:
        """Whether every coordinate sees every other."""
        return self.radius >= self.size - 1 and self.dilation == 1 and not self.causal

    def pairs(self) -> int:
        """Number of visible pairs of coordinates."""
        # The first `longer` residue classes have one member more.
        shorter, longer = divmod(self.size, self.dilation)
        return longer * self._pairs_of_lane(shorter + 1) + (
            self.dilation - longer
        ) * self._pairs_of_lane(shorter)

    def _pairs_of_lane(self, members: int) -> int:
        if self.shift and not self.causal:
            return members * min(members, 2 * self.radius + 1)
        lane = range(members)
        ahead = 0 if self.causal else self.radius
        return pairs_up_to(ahead, lane, lane) - pairs_up_to(-self.radius - 1, lane, lane)

    def allows(self, q: Positions, kv: Positions) -> Any:
        low, high = self.reach(q)
        near = (kv >= low) & (kv <= high)
        if self.dilation == 1:
            return near
        return near & ((kv - q) % self.dilation == 0)

    def classify(self, q: Span, kv: Span) -> Verdicts:
        step = np.gcd(q.step, kv.step)
        if not self.shift or self.causal:
            back, ahead = (
                self.radius * self.dilation,
                0 if self.causal else self.radius * self.dilation,
            )
            return classify_difference(
                kv.low - q.high,
                kv.high - q.low,
                step,
                self.dilation,
                back,
                ahead,
            )
        residues = classify_difference(
            kv.low - q.high,
            kv.high - q.low,
            step,
            self.dilation,
            None,
            self.size,
        )
        lows, highs = self._reach_over(q.low, q.high)
        inside = (lows[1] <= kv.low) & (kv.high <= highs[0])
        outside = (kv.high < lows[0]) | (kv.low > highs[1])
        return both(residues, verdicts(inside, outside))

    def _reach_over(
        self,
        low: IntArray,
        high: IntArray,
    ) -> tuple[tuple[IntArray, IntArray], tuple[IntArray, IntArray]]:
        """Bounds of both results of `reach` over low <= c <= high.

        Returns (least, greatest) of the first result, then of the second. Both grow with c inside a
        residue class, so the first and the last member of each class bound them.
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
        return (np.minimum.reduce(lows), np.maximum.reduce(lows)), (
            np.minimum.reduce(highs),
            np.maximum.reduce(highs),
        )


def least(a: Positions, b: Positions) -> Positions:
    """Elementwise minimum, written with operators only."""
    return a - (a - b) * (a > b)


def _most(a: Positions, b: Positions | int) -> Positions:
    return a - (a - b) * (a < b)


@dataclass(frozen=True, eq=False)
class Span:
    """Coordinates low .. high on one axis, all congruent to low modulo step.

    step is 0 for a single coordinate.
    """

    low: IntArray
    high: IntArray
    step: IntArray


def strides_of(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Distance in row-major order between neighbors on each axis."""
    return tuple(math.prod(grid[axis + 1 :]) for axis in range(len(grid)))


def coordinates(grid: tuple[int, ...], positions: Positions) -> list[Positions]:
    """The coordinate of row-major positions on each axis."""
    return [
        positions // stride if axis == 0 else positions // stride % size
        for axis, (size, stride) in enumerate(zip(grid, strides_of(grid), strict=True))
    ]


def spans(grid: tuple[int, ...], regions: Regions) -> list[Span]:
    """A box of the grid that contains each region.

    The region itself if it is a box, its hull otherwise.
    """
    first, last = coordinates(grid, regions.first), coordinates(grid, regions.last)
    # 1. Assign each axis of a region's lattice to the slowest grid axis that its stride moves
    # along.
    lengths = [np.zeros(len(regions), dtype=np.int64) for _ in grid]
    steps = [np.zeros(len(regions), dtype=np.int64) for _ in grid]
    assigned = np.zeros(len(regions), dtype=bool)
    for extent, stride in zip(regions.extent.T, regions.stride.T, strict=True):
        unassigned = extent > 1
        for axis, unit in enumerate(strides_of(grid)):
            along = unassigned & (stride % unit == 0) & (stride >= unit)
            lengths[axis] += np.where(along, (extent - 1) * (stride // unit), 0)
            steps[axis] = np.where(along, np.gcd(steps[axis], stride // unit), steps[axis])
            unassigned &= ~along
        assigned |= unassigned
    # 2. A box: every lattice axis was assigned, and none runs over the end of a line.
    box = ~assigned
    for axis, size in enumerate(grid):
        box &= (first[axis] + lengths[axis] < size) | (axis == 0)
    out, same = [], np.ones(len(regions), dtype=bool)
    for axis, size in enumerate(grid):
        # 3. Otherwise the hull of first .. last: an axis spans its full size once a slower one
        # moves.
        low = np.where(box | same, first[axis], 0)
        high = np.where(box, first[axis] + lengths[axis], np.where(same, last[axis], size - 1))
        step = np.where(box, steps[axis], np.where(low == high, 0, 1))
        out.append(Span(low, high, step))
        same &= first[axis] == last[axis]
    return out


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """Keys within a radius of the query on every axis of a grid."""

    grid: tuple[int, ...]
    radius: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    edges: str

    @property
    def axes(self) -> tuple[Axis, ...]:
        shift = self.edges == "shift"
        out = []
        for size, radius, dilation, causal in zip(
            self.grid,
            self.radius,
            self.dilation,
            self.causal,
            strict=True,
        ):
            # A longer step leaves the axis just the same; the bound keeps products within 64 bits.
            step = min(dilation, size)
            out.append(Axis(size, min(radius, -(-size // step)), step, causal, shift))
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
        answers = [
            axis.classify(a, b)
            for axis, a, b in zip(self.axes, spans(self.grid, q), spans(self.grid, kv), strict=True)
        ]
        return np.asarray(np.minimum.reduce(answers), dtype=np.uint8)

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
        period = 1 if first is None else strides_of(self.grid)[first - 1]
        return period, period

    @property
    def _first_limited(self) -> int | None:
        """The first axis on which some coordinate does not see every other; None if none."""
        return next((number for number, axis in enumerate(self.axes) if not axis.is_whole), None)

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
        tokens = math.prod(self.grid)
        if max(queries.stop, keys) > tokens:
            raise ValueError(
                f"{self} speaks of a grid of {tokens} tokens; got positions up to {max(queries.stop, keys)}. "
                "Make the grid as large as the sequence, or cut the sequence to the grid. Where other tokens stand before the "
                f"grid or after it, say where it starts: offset=0, or offset={max(queries.stop, keys) - tokens}"
            )

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        line, axis = strides_of(self.grid)[0], self.axes[0]
        # A window moved inwards at the border reaches twice as far.
        back = axis.radius * axis.dilation * (2 if axis.shift else 1)
        ahead = 0 if axis.causal else back
        kv = clip(kv, (q[0] // line - back) * line, (q[-1] // line + ahead + 1) * line)
        if kv:
            return (clip(q, (kv[0] // line - ahead) * line, (kv[-1] // line + back + 1) * line), kv)
        return NOTHING

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
            lines = [line + c * stride for line in lines for c in span]
        last = spans[-1]
        out = []
        for line in lines:
            keys = range(line + last.start, line + last.stop, last.step)
            clipped = intersection(range(kv_len), keys)
            if clipped:
                out.append(clipped)
        return tuple(out)

    def __repr__(self) -> str:
        def short(values: tuple[Any, ...]) -> str:
            return repr(values[0] if len(set(values)) == 1 else values)

        dilation = "" if set(self.dilation) == {1} else f", dilation={short(self.dilation)}"
        causal = "" if not any(self.causal) else f", causal={self.causal!r}"
        edges = "" if self.edges == "cut" else f", edges={self.edges!r}"
        return f"neighborhood({self.grid!r}, {short(self.radius)}{dilation}{causal}{edges})"


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
        (
            (q, q_complete, q_outside),
            (kv, kv_complete, kv_outside),
        ) = self._on_grid(q), self._on_grid(kv)
        within = self.neighborhood.classify(q, kv)
        return np.where(
            q_outside | kv_outside,
            EMPTY,
            np.where(q_complete & kv_complete, within, np.minimum(within, PARTIAL)),
        )

    def _on_grid(self, side: Regions) -> tuple[Regions, Flags, Flags]:
        """The part of each region on the grid, in cells.

        Returns the part, whether it is the complete region, and whether it is empty.
        """
        first, last = side.first - self.offset, side.last - self.offset
        step = np.where(side.dense, side.step, 0).clip(1)
        low, high = np.where(first < 0, first % step, first), np.minimum(last, len(self.tokens) - 1)
        complete, outside = (first >= 0) & (last == high), low > high
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
        limited = [
            number for number, axis in enumerate(self.neighborhood.axes) if not axis.is_whole
        ]
        return conjunction((*conjuncts(inside), *(_AlongAxis(self, number) for number in limited)))

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        if q not in self.tokens:
            return ()
        keys = self.neighborhood.keys_of(q - self.offset, max(kv_len - self.offset, 0))
        if keys is None:
            return None
        return tuple(_shifted(span, self.offset) for span in keys)

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        q, kv = (clip(side, self.tokens.start, self.tokens.stop) for side in (q, kv))
        if not q or not kv:
            return NOTHING
        q, kv = self.neighborhood.shrink(_shifted(q, -self.offset), _shifted(kv, -self.offset))
        if q and kv:
            return (_shifted(q, self.offset), _shifted(kv, self.offset))
        return NOTHING

    def pairs(self, q: range, kv: range) -> int | None:
        return self.neighborhood.pairs(
            *(_shifted(intersection(side, self.tokens), -self.offset) for side in (q, kv)),
        )

    def __repr__(self) -> str:
        return f"{repr(self.neighborhood)[:-1]}, offset={self.offset})"


@dataclass(frozen=True)
class _AlongAxis(Mask):
    """One axis of a placed neighborhood, on a grid without first and last line."""

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
        return self.axis.allows(
            *(coordinates(self.grid, side - self.placed.offset)[self.number] for side in (q, kv)),
        )

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        moved = (replace(side, base=side.base - self.placed.offset) for side in (q, kv))
        return self.axis.classify(*(spans(self.grid, side)[self.number] for side in moved))

    @property
    def period(self) -> int | None:
        if self.number:
            return self.side_periods[0]
        if self.axis.shift and not self.axis.causal:
            return None
        return strides_of(self.grid)[0]

    @property
    def side_periods(self) -> tuple[int | None, int | None]:
        period = strides_of(self.grid)[self.number - 1] if self.number else None
        return period, period


def _shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by, span.step)


def neighborhood(
    grid: tuple[int, ...],
    radius: int | Sequence[int],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    edges: str = "cut",
    offset: int | None = None,
) -> Mask:
    """Keys within `radius` steps of `dilation` on every axis of a grid.

    grid: sizes of 1 to 3 axes; tokens in row-major order.
    radius, dilation: one number, or one per axis.
    causal: one bool, or one per axis: only keys at or before the query's coordinate.
    edges: "cut": fewer keys at the border; "shift": windows move inwards, so that every query has
        2 * radius + 1 keys per axis (NATTEN, arXiv 2204.07143). A causal axis is always cut.
    offset: None if the sequence is the grid (a longer one is refused), else the position of the
        grid's first token. Other tokens, such as a CLS token or registers, then see nothing through
        this mask and no query sees them: join theirs with `|`. The sequence may have any length.

    >>> neighborhood((64, 64), 7, offset=1) | global_tokens(1)
    neighborhood((64, 64), 7, offset=1) | global_tokens(1)
    """
    grid = arguments.integers("grid", grid, 1)
    if len(grid) > 3:
        raise ValueError(f"grid must have 1 to 3 axes; got {grid!r}")
    arguments.integer("the number of cells of the grid", math.prod(grid))

    def per_axis(name: str, value: Any, least: int) -> tuple[int, ...]:
        values = arguments.integers(
            name,
            value if arguments.is_iterable(value) else (value,) * len(grid),
            least,
        )
        if len(values) != len(grid):
            raise ValueError(
                f"{name} must be one number or one per axis of the grid {grid!r}; got {value!r}",
            )
        return values

    flags = tuple(causal) if isinstance(causal, Sequence) else (causal,) * len(grid)
    if len(flags) != len(grid) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(
            f"causal must be a bool or one bool per axis of the grid {grid!r}; got {causal!r}",
        )
    arguments.choice("edges", edges, EDGES)
    mask = Neighborhood(
        grid,
        per_axis("radius", radius, 0),
        per_axis("dilation", dilation, 1),
        flags,
        edges,
    )
    if offset is None:
        return mask
    offset = arguments.integer("offset", offset, 0)
    arguments.integer("the last position of the grid", offset + math.prod(grid) - 1)
    return PlacedNeighborhood(mask, offset)
