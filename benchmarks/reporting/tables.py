"""The report's tables: all sections of the records of a directory.

Every figure is a measurement of a row, or computed from such with the formula that the text states.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import comparisons, lengths, sizes
from .cells import Records
from .section import Section


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """The records of a directory by suite."""
    records = {}
    for path in sorted(directory.glob("*.json")):
        record = json.loads(path.read_text())
        if "suite" in record:
            records[record["suite"]] = record
    return records


def sections(records: Records) -> list[Section]:
    """All sections whose records are there, in the order of the report."""
    out = [
        *comparisons.recommendations(records),
        *lengths.times(records),
        *lengths.memory(records),
        *lengths.throughput(records),
        *lengths.longest(records),
        *lengths.memory_growth(records),
        *sizes.limits(records),
        *sizes.rings(records),
        *sizes.billion(records),
        *sizes.trillion(records),
        *comparisons.compared(records, "hilbert"),
        *comparisons.compared(records, "dtypes"),
        *comparisons.peers(records),
    ]
    return [section for section in out if section.rows]
