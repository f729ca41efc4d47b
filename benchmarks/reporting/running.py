"""Run and resume suites.

Each case runs in a process of its own, and its row is written at once.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.apart import row_of
from harness.problems import TOLERANCES
from harness.runs import Progress, is_chosen, origin

from compiled_dilated import measure

from .jobs import Job
from .peers import PEERS
from .suites import Suite

Row = dict[str, Any]
NOT_INSTALLED = "not installed"


def run(
    suites: Sequence[Suite],
    directory: Path,
    script: str,
    *,
    quick: bool,
    only: Sequence[str],
    limit_bytes: int,
    seconds: float,
    anew: bool,
) -> list[Row]:
    """Measure the suites' jobs and write <directory>/<suite>.json after each.

    script: computes one job when it is called with --job JSON.
    quick: the short form of the suites.
    only: texts, one of which a job's name has to contain; all jobs if there are none.
    limit_bytes, seconds: memory and time of one job's process.
    anew: whether to measure jobs again whose rows are in the files.

    Returns the rows of all jobs, those of earlier runs included.
    """
    jobs = {}
    for suite in suites:
        jobs[suite.name] = [job for job in suite.jobs(quick) if is_chosen(job.name, only)]
    source = origin()
    progress = Progress(sum(len(of_suite) for of_suite in jobs.values()))
    rows: list[Row] = []
    for suite in suites:
        path = directory / f"{suite.name}.json"
        earlier = _earlier_rows(path)
        record: Row = {"suite": suite.name, "question": suite.question} | source
        for job in jobs[suite.name]:
            row = earlier.get(job.key)
            if row is None or anew or _may_succeed(job, row, limit_bytes, seconds):
                progress.start(f"{job.suite}: {job.name}")
                row = _row(job, script, limit_bytes, seconds) | {"commit": source["commit"]}
                progress.end(summary(row))
            else:
                progress.skip()
            # Rows of jobs that were not chosen stay, whatever `only`, `quick` and `anew` are.
            earlier[job.key] = row
            rows_of_file = [earlier[key] for key in _keys(suite) if key in earlier]
            measure.write_json(path, record | {"rows": rows_of_file})
            rows.append(row)
    return rows


def _keys(suite: Suite) -> list[str]:
    """The keys of a suite's jobs: of the full form, then of the short one, without repetitions."""
    jobs = [*suite.jobs(False), *suite.jobs(True)]
    return list(dict.fromkeys(job.key for job in jobs))


def _earlier_rows(path: Path) -> dict[str, Row]:
    """The rows of an earlier run by their jobs' keys."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {Job(**row["job"]).key: row for row in rows}


def _may_succeed(job: Job, row: Row, limit_bytes: int, seconds: float) -> bool:
    """Whether an earlier failure may end otherwise now.

    Its process has more memory or time than before, or its package may have been installed.
    """
    if "failed" not in row:
        return False
    if row["failed"] == NOT_INSTALLED:
        return PEERS[job.way].is_installed
    before = row.get("limits", {"bytes": limit_bytes, "seconds": seconds})
    return limit_bytes > before["bytes"] or seconds > before["seconds"]


def _row(job: Job, script: str, limit_bytes: int, seconds: float) -> Row:
    """Measure one job in a process of its own."""
    row: Row = {"job": asdict(job), "date": datetime.date.today().isoformat()}
    if job.kind == "peer" and not PEERS[job.way].is_installed:
        return row | {"failed": NOT_INSTALLED}
    row |= row_of(script, asdict(job), limit_bytes, seconds)
    row["limits"] = {"bytes": limit_bytes, "seconds": seconds}
    if "failed" not in row:
        row["is_right"] = _is_right(job, row)
    return row


def _is_right(job: Job, row: Row) -> bool | None:
    """Whether the error is within the dtype's tolerance; None without an error."""
    if row["compared"] == "nothing":
        return None
    errors = (row["error"], row.get("gradient_error", 0.0))
    return not row["has_nan"] and max(errors) <= TOLERANCES[job.dtype]


def summary(row: Row) -> str:
    """One row for a person who watches."""
    if "failed" in row:
        return str(row["failed"])
    if not row["seconds"]:
        return "planned, not run: it needs more memory than a case may use"
    seconds = measure.median(row["seconds"])
    right = {True: "right", False: "WRONG", None: "not compared"}[row["is_right"]]
    rate = row["job"]["tokens"] * row["job"]["batch"] / seconds
    return f"{seconds:.4g} s, {rate:,.0f} tokens/s, {right}"
