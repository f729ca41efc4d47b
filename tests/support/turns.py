"""Tables and cross products of parameters, of which the default suite runs a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def name_of(value: Any) -> str:
    """The name of a function or a class, else the text of a value, for a test's id."""
    return getattr(value, "__name__", str(value))


def in_turn(
    rows: Sequence[Any],
    columns: Sequence[Any],
    count: int = 1,
    name: Callable[[Any], str] = name_of,
) -> list[Any]:
    """Parameters (row, *column); each row has `count` columns in the default suite.

    The columns come in turn: with enough rows, each of them is run. All other pairs are slow.

    columns: values, or tuples of them.
    name: of a value, for the test's id.
    """
    parameters = []
    for number, row in enumerate(rows):
        chosen = {(number * count + step) % len(columns) for step in range(count)}
        for place, column in enumerate(columns):
            values = (row, *column) if isinstance(column, tuple) else (row, column)
            marks = () if place in chosen else (pytest.mark.slow,)
            parameters.append(pytest.param(*values, id="-".join(map(name, values)), marks=marks))
    return parameters


def one_in(count: int, rows: Sequence[Any], name: Callable[[Any], str] = name_of) -> list[Any]:
    """Parameters of a table; the default suite runs one in `count`, the others are slow."""
    parameters = []
    for number, row in enumerate(rows):
        marks = (pytest.mark.slow,) if number % count else ()
        parameters.append(pytest.param(row, id=name(row), marks=marks))
    return parameters
