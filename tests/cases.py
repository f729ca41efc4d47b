"""The table of cases: programs over every kind of mask.

Orders and branches are of every kind too, and lengths are ragged.

    case = by_name("window"); program, inputs = case.program(129), case.inputs(129, torch.float64)

A case builds its program for n positions, so that grids fit n and tables reach its end.
"""

from __future__ import annotations

from tests.support.case import (
    LOWERINGS,
    Case,
    Inputs,
    both_data,
    document_ids,
    grid_of,
    in_order,
    some_padding,
)
from tests.support.cases_of_masks import COMPOSED, GRIDS, MASKS
from tests.support.cases_of_programs import LONG, ORDERED, PROGRAMS

__all__ = [
    "CASES",
    "LOWERINGS",
    "Case",
    "Inputs",
    "both_data",
    "by_name",
    "document_ids",
    "grid_of",
    "in_order",
    "some_padding",
]

CASES = (*MASKS, *GRIDS, *COMPOSED, *PROGRAMS, *ORDERED, *LONG)


def by_name(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == name)
