"""A section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .charts import Chart


@dataclass(frozen=True)
class Section:
    """A part of the report.

    heading: its title.
    text: what the table shows, in a sentence or two.
    headers, rows: the table, all cells text.
    chart: a picture of it; None if there is none.
    """

    heading: str
    text: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    chart: Chart | None = None
