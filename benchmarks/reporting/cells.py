"""Rows of the report's records: chosen, grouped, and their figures as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from compiled_dilated import measure

from .charts import Chart, short

Row = dict[str, Any]
Records = Mapping[str, dict[str, Any]]

ABSENT = "-"
# Of a job: how often it is measured.
_TURNS = ("turns", "seconds")


def rows_of(records: Records, *suites: str) -> list[Row]:
    """The rows of some suites, failed ones included.

    Of a case in the full form and in the short form, whose turns differ, the first row in the file.
    """
    out: dict[str, Row] = {}
    for suite in suites:
        for row in records.get(suite, {}).get("rows", []):
            case = {name: row["job"].get(name) for name in row["job"] if name not in _TURNS}
            out.setdefault(json.dumps(case, sort_keys=True), row)
    return [*out.values()]


def groups_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by suite, pass and dtype, in the rows' order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        job = row["job"]
        groups.setdefault(f"{job['suite']}, {passes(row)}, {job['dtype']}", []).append(row)
    return groups


def right(rows: Iterable[Row]) -> list[Row]:
    """The rows whose result was compared and is right."""
    return [row for row in rows if "failed" not in row and row["is_right"]]


def ways_of(rows: Iterable[Row]) -> list[str]:
    """The ways in the order in which they come."""
    return list(dict.fromkeys(row["job"]["way"] for row in rows))


def lengths_of(rows: Iterable[Row]) -> list[int]:
    """The lengths, ascending."""
    return sorted({tokens(row) for row in rows})


# Figures of a row ---------------------------------------------------------------------------


def passes(row: Row) -> str:
    """The measured pass or passes."""
    return "forward + backward" if row["job"]["backward"] else "forward"


def tokens(row: Row) -> int:
    """The length of the sequence."""
    count: int = row["job"]["tokens"]
    return count


def seconds(row: Row) -> float:
    """Median time of a call."""
    return measure.median(row["seconds"])


def rate(row: Row) -> float:
    """Tokens a second."""
    per_second: float = row["job"]["batch"] * tokens(row) / seconds(row)
    return per_second


def bytes_per_token(row: Row) -> float:
    """Peak bytes beyond the inputs for each token."""
    share: float = row["peak_bytes"] / (row["job"]["batch"] * tokens(row))
    return share


# Figures as text ----------------------------------------------------------------------------


def time_text(duration: float) -> str:
    """Seconds with three digits, in ms below one second."""
    if duration < 1:
        return f"{duration * 1e3:.3g} ms"
    return f"{duration:.3g} s"


def mebibytes(size: float) -> str:
    """Bytes as MiB with three digits."""
    return f"{size / 2**20:.3g} MiB"


def error_text(row: Row) -> str:
    """The error against float64, marked where the result is wrong or was not compared."""
    if row["has_nan"]:
        return "NaN (WRONG)"
    if row["error"] is None:
        return "not compared"
    mark = "" if row["is_right"] else " (WRONG)"
    return f"{row['error']:.1e}{mark}"


def cell(row: Row | None, figure: Callable[[Row], str]) -> str:
    """A figure of a row, its failure in words, or a dash.

    A dash marks a figure that was not measured. A figure of a result that is wrong, or was not
    compared, is marked so.
    """
    if row is None:
        return ABSENT
    if "failed" in row:
        return reason(row)
    doubt = {True: "", False: " (WRONG)", None: " (not compared)"}
    return figure(row) + doubt[row["is_right"]]


def line(row: Row, start: Sequence[str], figures: Callable[[Row], list[str]]) -> list[str]:
    """A line of a table: its start, then figures or a reason.

    The reason is that of a failure.
    """
    if "failed" in row:
        return [*start, reason(row)]
    return [*start, *figures(row)]


def reason(row: Row) -> str:
    """The first sentence of a failure."""
    return str(row["failed"]).partition(". ")[0]


def pivot(rows: Sequence[Row], figure: Callable[[Row], str]) -> tuple[list[str], list[list[str]]]:
    """Headers and body of a table with ways down and lengths across."""
    at = {(row["job"]["way"], tokens(row)): row for row in rows}
    lengths = lengths_of(rows)
    body = []
    for way in ways_of(rows):
        body.append([way, *(cell(at.get((way, length)), figure) for length in lengths)])
    return ["way", *map(short, lengths)], body


# Charts -------------------------------------------------------------------------------------


def lines_of(
    rows: Sequence[Row], figure: Callable[[Row], float]
) -> dict[str, list[tuple[float, float]]]:
    """Points (tokens, figure) of results that are not wrong, by way.

    A way has at least two points.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "failed" not in row and row["is_right"] is not False:
            lines.setdefault(row["job"]["way"], []).append((tokens(row), figure(row)))
    return {way: points for way, points in lines.items() if len(points) > 1}


def chart_of(
    title: str, unit: str, rows: Sequence[Row], figure: Callable[[Row], float]
) -> Chart | None:
    """A chart of a figure over the length; None without a line."""
    lines = lines_of(rows, figure)
    return Chart(title, "tokens", unit, lines) if lines else None
