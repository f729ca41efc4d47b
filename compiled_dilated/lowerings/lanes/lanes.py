"""Masks as lanes: strided queries that see strided runs of keys.

causal() & window(8)                    a distance from 0 to 8
segments(8) & congruent(2, 1)           queries 1 3 5 7 by keys 1 3 5 7, 9 11 13 15 by these, ...
causal() & (window(8) | sinks(2))       two lanes: the window; the sinks to the left of it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...masks import And, Full, Mask, Not, Or, full
from ...masks.bands import Causal, Window
from ...masks.congruent import Congruent
from ...masks.data import DocumentLengths
from ...masks.leading import GlobalTokens, LeadingQueries, Prefix, Sinks
from ...masks.segments import Segments

# Past every position and every distance of two.
FAR = 2**31 - 1
# Tiles are faster for a mask of more lanes than this.
_MOST_LANES = 32


class Inexpressible(ValueError):
    """Error of a mask that is not made of lanes.

    The message names the part that is not.
    """


@dataclass(frozen=True)
class Residue:
    """Positions with (position % within) % modulus == offset.

    within: 0 for position % modulus == offset.
    """

    modulus: int
    offset: int
    within: int


@dataclass(frozen=True)
class Side:
    """Rows or columns of a lane.

    Positions in [start, stop) that are in all residues.
    """

    start: int = 0
    stop: int = FAR
    residues: tuple[Residue, ...] = ()

    def meet(self, side: Side) -> Side:
        """The positions in both sides."""
        residues = tuple(dict.fromkeys((*self.residues, *side.residues)))
        return Side(max(self.start, side.start), min(self.stop, side.stop), residues)


@dataclass(frozen=True)
class Grouping:
    """Consecutive groups of tokens.

    Tokens past the last stop are in no group.

    length: tokens per group; 0 for groups of different lengths.
    stops: where groups end, if length is 0.
    side: columns that a row sees: 0 in its group, -1 before it, 1 after it.
    """

    length: int
    stops: tuple[int, ...]
    side: int = 0

    def group_of(self, position: int) -> tuple[int, int]:
        """Start and stop of a position's group; (FAR, FAR) without one."""
        if self.length:
            start = position // self.length * self.length
            return start, min(start + self.length, FAR)
        place = int(np.searchsorted(np.asarray(self.stops), position, side="right"))
        if place == len(self.stops):
            return FAR, FAR
        start = 0
        if place > 0:
            start = self.stops[place - 1]
        return start, self.stops[place]

    def columns(self, position: int) -> Side:
        """The columns that rows of the group of a position see."""
        start, stop = self.group_of(position)
        if start == FAR:
            return Side(0, 0)
        # By side: 0, 1 and -1.
        return (Side(start, stop), Side(stop, FAR), Side(0, start))[self.side]


@dataclass(frozen=True)
class Lane:
    """Pairs (row, column) of two sides and of all groupings.

    least, most: of row - column.
    dilation: row - column is a multiple of it.
    """

    rows: Side = Side()
    columns: Side = Side()
    least: int = -FAR
    most: int = FAR
    dilation: int = 1
    groupings: tuple[Grouping, ...] = ()

    def meet(self, lane: Lane) -> Lane:
        """The pairs in both lanes."""
        return Lane(
            self.rows.meet(lane.rows),
            self.columns.meet(lane.columns),
            max(self.least, lane.least),
            min(self.most, lane.most),
            int(np.lcm(self.dilation, lane.dilation)),
            tuple(dict.fromkeys((*self.groupings, *lane.groupings))),
        )

    def transposed(self) -> Lane:
        """The same pairs as (column, row)."""
        groupings = tuple(replace(grouping, side=-grouping.side) for grouping in self.groupings)
        return Lane(self.columns, self.rows, -self.most, -self.least, self.dilation, groupings)

    @property
    def periods(self) -> tuple[int, ...]:
        """Steps of rows that leave the visible residues unchanged, within a group."""
        residues = (*self.rows.residues, *self.columns.residues)
        return (self.dilation, *(residue.modulus for residue in residues))


def lanes_of(mask: Mask) -> tuple[Lane, ...]:
    """Disjoint lanes whose union is the mask of one head.

    Raises Inexpressible.
    """
    lanes = _lanes(mask)
    if len(lanes) > _MOST_LANES:
        raise Inexpressible(
            f"{mask!r} falls into {len(lanes)} lanes; at most {_MOST_LANES} are computed"
        )
    return tuple(lane for lane in lanes if lane.least <= lane.most)


def _lanes(mask: Mask) -> list[Lane]:
    """Disjoint lanes whose union is the mask."""
    if isinstance(mask, And):
        lanes = [Lane()]
        for part in mask.masks:
            lanes = _meets(lanes, _lanes(part))
        return lanes
    if isinstance(mask, Or):
        # Each part less the parts before it.
        first, *later = mask.masks
        if not later:
            return _lanes(first)
        remainder = later[0]
        if len(later) > 1:
            remainder = Or(tuple(later))
        return _lanes(first) + _lanes(And((remainder, _negated(first))))
    if isinstance(mask, (Prefix, GlobalTokens)):
        return _lanes(mask.expanded())
    if isinstance(mask, Not):
        inner = mask.mask
        if type(inner) in _COMPLEMENTS:
            return _hidden_by(inner)
        return _lanes(_negated(inner))
    leaf = _LEAVES.get(type(mask))
    if leaf is None:
        raise Inexpressible(f"{mask!r} is not made of runs of keys")
    return leaf(mask)


def _meets(lanes: Sequence[Lane], factors: Sequence[Lane]) -> list[Lane]:
    """Pairs in a lane of both lists, as lanes."""
    out = []
    for factor in factors:
        for lane in lanes:
            out.append(lane.meet(factor))
    return out


def _negated(mask: Mask) -> Mask:
    """The pairs that a mask hides, with the negation at its leaves."""
    if isinstance(mask, Not):
        return mask.mask
    if isinstance(mask, Or):
        return And(tuple(_negated(part) for part in mask.masks))
    if isinstance(mask, And):
        return Or(tuple(_negated(part) for part in mask.masks))
    if isinstance(mask, (Prefix, GlobalTokens)):
        return _negated(mask.expanded())
    if isinstance(mask, Full):
        return Not(full())
    return Not(mask)


def _hidden_by(mask: Mask) -> list[Lane]:
    """The pairs that a single mask hides."""
    if isinstance(mask, Window) and mask.dilation > 1:
        raise Inexpressible(f"what {mask!r} hides is not made of runs of keys")
    return _COMPLEMENTS[type(mask)](mask)


def _congruent(mask: Congruent) -> list[Lane]:
    assert isinstance(mask.offset, int)
    side = Side(residues=(Residue(mask.modulus, mask.offset, mask.within or 0),))
    return [Lane(side, side)]


def _of_groups(grouping: Grouping) -> list[Lane]:
    return [Lane(groupings=(grouping,))]


def _outside_segments(mask: Segments) -> list[Lane]:
    before, after = Grouping(mask.length, (), -1), Grouping(mask.length, (), 1)
    return [*_of_groups(before), *_of_groups(after)]


def _document_stops(mask: DocumentLengths) -> tuple[int, ...]:
    return tuple(int(stop) for stop in np.cumsum(mask.lengths))


_LEAVES: dict[type, Callable[..., list[Lane]]] = {
    Full: lambda mask: [Lane()],
    Causal: lambda mask: [Lane(least=0)],
    Window: lambda mask: [Lane(least=-mask.right, most=mask.left, dilation=mask.dilation)],
    Segments: lambda mask: _of_groups(Grouping(mask.length, ())),
    DocumentLengths: lambda mask: _of_groups(Grouping(0, _document_stops(mask))),
    Congruent: _congruent,
    Sinks: lambda mask: [Lane(columns=Side(stop=mask.count))],
    LeadingQueries: lambda mask: [Lane(rows=Side(stop=mask.count))],
}
_COMPLEMENTS: dict[type, Callable[..., list[Lane]]] = {
    Full: lambda mask: [],
    Causal: lambda mask: [Lane(most=-1)],
    Window: lambda mask: [Lane(most=-mask.right - 1), Lane(least=mask.left + 1)],
    Segments: _outside_segments,
    Sinks: lambda mask: [Lane(columns=Side(start=mask.count))],
    LeadingQueries: lambda mask: [Lane(rows=Side(start=mask.count))],
}
