"""Parts of a printed plan: the table of candidates, tiles, times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

_COLUMNS = ["", "lowering", "branch", "GFLOP", "as dense GFLOP", "est. ms", "calls", "peak MiB"]
_ALIGNMENT = ("left", "left", *["right"] * 6, "left")
_REASON = "refused because"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a plan's candidates, with a legend.

    rows: as `Plan.to_json` lists them.
    """
    cells = [_cells(row) for row in rows]
    headers = [*_COLUMNS, _REASON]
    text: str = tabulate(cells, headers=headers, disable_numparse=True, colalign=_ALIGNMENT)
    legend = "as dense GFLOP: what dense attention would compute in the same time"
    proposed = sum("refused" not in row for row in rows)
    if proposed > sum(row["chosen"] for row in rows):
        legend += "; the least sum is chosen"
    return f"{text}\n{legend}"


def _cells(row: dict[str, Any]) -> list[Any]:
    """The cells of a candidate: its costs, or its refusal."""
    branch = "all" if row["branch"] is None else row["branch"]
    cells = ["*" if row["chosen"] else "", row["lowering"], branch]
    if "refused" in row:
        return [*cells, *[""] * 5, row["refused"]]
    time = ""
    if row["estimated_seconds"] is not None:
        time = milliseconds(row["estimated_seconds"])
    return [
        *cells,
        f"{row['kernel_gflop']:,.1f}",
        f"{row['dense_gflop']:,.1f}",
        time,
        row["calls"],
        f"{row['peak_bytes'] / 2**20:,.1f}",
        "",
    ]


def tile_counts(row: dict[str, Any]) -> str:
    """The tiles of a branch in words."""
    size = f"{row['tile']} x {row['tile']} tokens"
    if row["full"] is None:
        return f"of {size}, too many different ones to count"
    return (
        f"{row['full']:,} full and {row['partial']:,} partial of {size}; "
        f"a list of them takes {row['bytes'] / 2**20:,.3f} MiB"
    )


def milliseconds(seconds: float) -> str:
    """A time in ms with three digits: it is an estimate."""
    return three_digits(seconds * 1e3)


def three_digits(number: float) -> str:
    """A number rounded to three digits, without an exponent."""
    return f"{float(f'{number:.3g}'):,.10g}"
