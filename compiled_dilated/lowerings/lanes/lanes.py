"""Masks as lanes: pairs where queries of one step see runs of keys of one step.

causal() & window(8)                    a distance from 0 to 8
segments(8) & congruent(2, 1)           queries 1 3 5 7 by keys 1 3 5 7, 9 11 13 15 by these, ...
causal() & (window(8) | sinks(2))       two lanes: the window; the sinks to the left of it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ...masks import And, Mask, Not, Or, full
from ...masks.bands import Causal, Window
from ...masks.congruent import Congruent
from ...masks.core import Full
from ...masks.data import DocumentLengths
from ...masks.leading import GlobalTokens, LeadingQueries, Prefix, Sinks
from ...masks.segments import Segments

# Past every position and every distance of two.
FAR = 2**31 - 1
# A mask that falls into more lanes than this is served better by tiles.
_MOST_LANES = 32


class Inexpressible(ValueError):
    """A mask that is not made of lanes; the message says which part of it."""


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
    """Rows or columns of a lane: positions from start to before stop that are in all residues."""

    start: int = 0
    stop: int = FAR
    residues: tuple[Residue, ...] = ()

    def meet(self, other: Side) -> Side:
        """The positions of both."""
        residues = tuple(dict.fromkeys((*self.residues, *other.residues)))
        return Side(max(self.start, other.start), min(self.stop, other.stop), residues)


@dataclass(frozen=True)
class Grouping:
    """Consecutive groups of tokens; those past the last stop are in no group.

    length: of each group, or 0.
    stops: where groups end, if length is 0.
    side: of the columns: 0 in the row's group, -1 before it, 1 after it.
    """

    length: int
    stops: tuple[int, ...]
    side: int = 0

    def group_of(self, position: int) -> tuple[int, int]:
        """Start and stop of the group of a position; (FAR, FAR) if it is in none."""
        if self.length:
            start = position // self.length * self.length
            return start, min(start + self.length, FAR)
        place = int(np.searchsorted(np.asarray(self.stops), position, side="right"))
        if place == len(self.stops):
            return FAR, FAR
        return (self.stops[place - 1] if place else 0), self.stops[place]

    def columns(self, position: int) -> Side:
        """The columns that rows of the group of a position see."""
        start, stop = self.group_of(position)
        if start == FAR:
            return Side(0, 0)
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

    def meet(self, other: Lane) -> Lane:
        """The pairs of both."""
        return Lane(
            self.rows.meet(other.rows),
            self.columns.meet(other.columns),
            max(self.least, other.least),
            min(self.most, other.most),
            int(np.lcm(self.dilation, other.dilation)),
            tuple(dict.fromkeys((*self.groupings, *other.groupings))),
        )

    def transposed(self) -> Lane:
        """The same pairs as (column, row)."""
        groupings = tuple(replace(grouping, side=-grouping.side) for grouping in self.groupings)
        return Lane(self.columns, self.rows, -self.most, -self.least, self.dilation, groupings)

    @property
    def periods(self) -> tuple[int, ...]:
        """Steps of rows after which residues see the same again, within a group."""
        moduli = [
            residue.modulus for side in (self.rows, self.columns) for residue in side.residues
        ]
        return (self.dilation, *moduli)


def lanes_of(mask: Mask) -> tuple[Lane, ...]:
    """Lanes without common pairs whose union is the mask of one head. Raises Inexpressible."""
    lanes = _lanes(mask)
    if len(lanes) > _MOST_LANES:
        raise Inexpressible(
            f"{mask!r} falls into {len(lanes)} lanes; at most {_MOST_LANES} are computed"
        )
    return tuple(lane for lane in lanes if lane.least <= lane.most)


def _lanes(mask: Mask) -> list[Lane]:
    """Lanes without common pairs whose union is the mask."""
    if isinstance(mask, And):
        lanes = [Lane()]
        for part in mask.masks:
            lanes = [lane.meet(other) for other in _lanes(part) for lane in lanes]
        return lanes
    if isinstance(mask, Or):
        # Each part less the parts before it.
        first, *later = mask.masks
        if not later:
            return _lanes(first)
        remainder = Or(tuple(later)) if len(later) > 1 else later[0]
        return _lanes(first) + _lanes(And((remainder, _negated(first))))
    if isinstance(mask, (Prefix, GlobalTokens)):
        return _lanes(mask.expanded())
    if isinstance(mask, Not):
        inner = mask.mask
        return _hidden_by(inner) if type(inner) in _COMPLEMENTS else _lanes(_negated(inner))
    leaf = _LEAVES.get(type(mask))
    if leaf is None:
        raise Inexpressible(f"{mask!r} is not made of runs of keys")
    return leaf(mask)


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
    Segments: lambda mask: [Lane(groupings=(Grouping(mask.length, (), side),)) for side in (-1, 1)],
    Sinks: lambda mask: [Lane(columns=Side(start=mask.count))],
    LeadingQueries: lambda mask: [Lane(rows=Side(start=mask.count))],
}
