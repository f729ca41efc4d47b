"""The report's sections from its records: a heading, what is shown, a table, a chart.

Every figure is a measurement of a row, or computed from such with the formula that the text states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiled_dilated import measure

from .charts import Chart, short

Row = dict[str, Any]
Records = Mapping[str, dict[str, Any]]

ABSENT = "-"
GIB = 2**30


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
        *recommendations(records),
        *times_by_length(records),
        *memory_by_length(records),
        *throughput(records),
        *longest(records),
        *memory_fit(records),
        *rings(records),
        *billion(records),
        *trillion(records),
        *compared(records, "hilbert"),
        *compared(records, "dtypes"),
        *peers(records),
    ]
    return [section for section in out if section.rows]


# Rows and cells -----------------------------------------------------------------------------


def _rows(records: Records, *suites: str) -> list[Row]:
    """The rows of some suites, failed ones included."""
    out: list[Row] = []
    for suite in suites:
        out += records.get(suite, {}).get("rows", [])
    return out


def _passes(row: Row) -> str:
    return "forward + backward" if row["job"]["backward"] else "forward"


def _seconds(row: Row) -> float:
    return measure.median(row["seconds"])


def _rate(row: Row) -> float:
    """Tokens a second."""
    rate: float = row["job"]["batch"] * row["job"]["tokens"] / _seconds(row)
    return rate


def _bytes_per_token(row: Row) -> float:
    """Peak bytes beyond the inputs for each token."""
    share: float = row["peak_bytes"] / (row["job"]["batch"] * row["job"]["tokens"])
    return share


def _time_text(seconds: float) -> str:
    """Seconds with three digits, in ms below one second."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _marked(row: Row, text: str) -> str:
    """A figure with its doubt: of a wrong or uncompared result."""
    if row["is_right"] is None:
        return f"{text} (not compared)"
    return text if row["is_right"] else f"{text} (WRONG)"


def _cell(row: Row | None, figure: Callable[[Row], str]) -> str:
    """A figure of a row, its failure in words, or a dash where nothing was measured."""
    if row is None:
        return ABSENT
    return str(row["failed"]) if "failed" in row else _marked(row, figure(row))


def _ways(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["job"]["way"] for row in rows))


def _lengths(rows: Iterable[Row]) -> list[int]:
    return sorted({row["job"]["tokens"] for row in rows})


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by suite, pass and dtype, in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        job = row["job"]
        groups.setdefault(f"{job['suite']}, {_passes(row)}, {job['dtype']}", []).append(row)
    return groups


def _pivot(rows: Sequence[Row], figure: Callable[[Row], str]) -> tuple[list[str], list[list[str]]]:
    """Ways down, lengths across."""
    at = {(row["job"]["way"], row["job"]["tokens"]): row for row in rows}
    lengths = _lengths(rows)
    body = []
    for way in _ways(rows):
        body.append([way, *(_cell(at.get((way, tokens)), figure) for tokens in lengths)])
    return ["way", *(short(tokens) for tokens in lengths)], body


def _lines(rows: Sequence[Row], figure: Callable[[Row], float]) -> dict[str, list[Any]]:
    """Points (tokens, figure) by way, of results that are not wrong."""
    lines: dict[str, list[Any]] = {}
    for row in rows:
        if "failed" not in row and row["is_right"] is not False:
            point = (row["job"]["tokens"], figure(row))
            lines.setdefault(row["job"]["way"], []).append(point)
    return {way: points for way, points in lines.items() if len(points) > 1}


def _chart(title: str, y: str, rows: Sequence[Row], figure: Callable[[Row], float]) -> Chart | None:
    lines = _lines(rows, figure)
    return Chart(title, "tokens", y, lines) if lines else None


# Sections -----------------------------------------------------------------------------------

_BY_LENGTH = ("all", "single", "long", "extreme", "ring")


def times_by_length(records: Records) -> list[Section]:
    """Execution time by length, one table for each suite, pass and dtype."""
    out = []
    for name, rows in _groups(_rows(records, *_BY_LENGTH)).items():
        headers, body = _pivot(rows, lambda row: _time_text(_seconds(row)))
        chart = _chart(
            f"Time for each token: {name}",
            "microseconds for each token",
            rows,
            lambda row: 1e6 / _rate(row),
        )
        text = "Median of one call. WRONG: the error against float64 exceeds the dtype's tolerance."
        out.append(Section(f"Execution time: {name}", text, headers, body, chart))
    return out


def memory_by_length(records: Records) -> list[Section]:
    """Peak bytes beyond the inputs by length."""
    out = []
    for name, rows in _groups(_rows(records, "long", "extreme", "ring", "memory")).items():
        headers, body = _pivot(rows, lambda row: f"{_bytes_per_token(row) / 1024:.3g} KiB")
        chart = _chart(
            f"Memory for each token: {name}",
            "KiB for each token",
            rows,
            lambda row: max(_bytes_per_token(row), 1) / 1024,
        )
        text = "Peak of a call beyond its inputs, the result included, for each token."
        out.append(Section(f"Memory for each token: {name}", text, headers, body, chart))
    return out


def throughput(records: Records) -> list[Section]:
    """Tokens a second by length, and the share of dense attention's rate of operations."""
    out = []
    for name, rows in _groups(_rows(records, "long", "extreme", "ring")).items():
        headers, body = _pivot(rows, lambda row: f"{_rate(row):,.0f}")
        dense = [row for row in rows if row["job"]["way"] == "SDPA" and "failed" not in row]
        chart = None
        if dense:
            best = max(row["flops"] / _seconds(row) for row in dense)
            ours = [row for row in rows if "flops" in row]
            chart = _chart(
                f"Useful operations a second, as a share of dense SDPA's best: {name}",
                "share",
                ours,
                lambda row, best=best: row["flops"] / _seconds(row) / best,  # type: ignore[misc]
            )
        text = "Tokens a second."
        out.append(Section(f"Throughput: {name}", text, headers, body, chart))
    return out


def longest(records: Records) -> list[Section]:
    """The longest sequence that each way computed, and what ended the search."""
    body = []
    for name, rows in _groups(_rows(records, "long", "extreme", "ring")).items():
        for way in _ways(rows):
            of_way = [row for row in rows if row["job"]["way"] == way]
            done = [row for row in of_way if "failed" not in row and row["is_right"]]
            failed = [row for row in of_way if "failed" in row]
            if not done:
                continue
            last = max(done, key=lambda row: row["job"]["tokens"])
            first = min(failed, key=lambda row: row["job"]["tokens"], default=None)
            end = f"{short(first['job']['tokens'])}: {first['failed']}" if first else "none tried"
            cells = [name, way, f"{last['job']['tokens']:,}", _time_text(_seconds(last))]
            body.append([*cells, f"{last['peak_bytes'] / GIB:.3g} GiB", end])
    headers = ["suite", "way", "longest", "time", "peak", "first that failed"]
    return [Section("Longest sequence computed", "Right results alone.", headers, body)]


def memory_fit(records: Records) -> list[Section]:
    """The exponent of memory by length, fitted to the measurements."""
    body = []
    for name, rows in _groups(_rows(records, "memory")).items():
        for way, points in _lines(rows, lambda row: max(row["peak_bytes"], 1)).items():
            exponent = _slope([(math.log(x), math.log(y)) for x, y in points])
            last = max(points)
            per_token = f"{last[1] / last[0] / 1024:.3g} KiB at {short(last[0])}"
            body.append([name, way, f"{exponent:.2f}", per_token])
    text = (
        "Peak bytes beyond the inputs are tokens^exponent, by least squares on logarithms. "
        "1 is linear, 2 quadratic."
    )
    headers = ["suite", "way", "exponent", "for each token"]
    return [Section("How memory grows", text, headers, body)]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through points by least squares."""
    count = len(points)
    x_mean = sum(x for x, _ in points) / count
    y_mean = sum(y for _, y in points) / count
    above = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return above / sum((x - x_mean) ** 2 for x, _ in points)


def rings(records: Records) -> list[Section]:
    """What each rank of a ring receives, by the plan that the run follows."""
    rows = [row for row in _rows(records, "ring") if "ring" in row]
    body = []
    for row in rows:
        ring = row["ring"]
        body.append(
            [
                row["job"]["way"],
                f"{row['job']['tokens']:,}",
                ring["layout"],
                str(ring["steps_max"]),
                f"{ring['received_mib_max']:.3g} MiB",
                _time_text(_seconds(row)),
            ]
        )
    chart = _chart(
        "Most that one rank receives",
        "MiB",
        rows,
        lambda row: max(row["ring"]["received_mib_max"], 1e-3),
    )
    text = "All ranks simulated one after the other in this process, every step executed."
    headers = ["way", "tokens", "layout", "most steps", "most received", "time of all ranks"]
    return [Section("Rings", text, headers, body, chart)]


def billion(records: Records) -> list[Section]:
    """Sequences through generated inputs, every step of every rank executed."""
    body = []
    for row in _rows(records, "billion"):
        job = row["job"]
        if "failed" in row:
            body.append([f"{job['tokens']:,}", f"{job['ranks']:,}", str(row["failed"]), *[""] * 4])
            continue
        counted = row["counted"]
        body.append(
            [
                f"{job['tokens']:,}",
                f"{job['ranks']:,}",
                f"{counted['steps']:,}",
                f"{_rate(row):,.0f}",
                _time_text(_seconds(row)),
                f"{counted['process_peak_bytes'] / 2**20:.0f} MiB",
                f"{row['error']:.1e} of {row['compared']}",
            ]
        )
    text = (
        "One head of width 16, LongNet; nothing is multiplied by the ring size: tokens a second "
        "are those that this machine computed. The peak is the process's."
    )
    headers = ["tokens", "ranks", "steps executed", "tokens/s", "time", "peak", "error"]
    return [Section("Sequences that are in no memory", text, headers, body)]


def trillion(records: Records) -> list[Section]:
    """What 10^12 tokens would take, computed from the longest run."""
    done = [row for row in _rows(records, "billion") if "failed" not in row]
    if not done:
        return []
    row = max(done, key=lambda row: row["job"]["tokens"])
    job, tokens = row["job"], 10**12
    per_rank = job["tokens"] / job["ranks"]
    one_rank_seconds = _seconds(row) / job["ranks"]
    body = [
        ["ranks", f"{math.ceil(tokens / per_rank):,}", f"{per_rank:,.0f} tokens a rank, as run"],
        [
            "one machine like this one",
            f"{tokens / _rate(row) / 86400:,.0f} days",
            f"{_rate(row):,.0f} tokens/s at {job['tokens']:,} tokens, constant for LongNet",
        ],
        [
            "all ranks at once",
            _time_text(one_rank_seconds),
            "a machine for each rank, an exchange that costs nothing",
        ],
        [
            "q, k, v and output of one head of 16, float32",
            f"{tokens * 4 * 16 * 4 / 1e12:,.0f} TB",
            "over all ranks",
        ],
    ]
    text = "An extrapolation, not a measurement; the assumptions stand beside each figure."
    return [Section("A trillion tokens", text, ["quantity", "figure", "assumption"], body)]


def compared(records: Records, suite: str) -> list[Section]:
    """The rows of a suite as they are."""
    body = []
    for row in _rows(records, suite):
        job = row["job"]
        start = [job["way"], f"{job['tokens']:,}", job["dtype"], _passes(row)]
        if "failed" in row:
            body.append([*start, str(row["failed"]), "", "", ""])
            continue
        gflops = row["flops"] * (3.5 if job["backward"] else 1) / _seconds(row) / 1e9
        peak = f"{row['peak_bytes'] / 2**20:.3g} MiB"
        cells = [_time_text(_seconds(row)), f"{gflops:.0f}", peak, f"{row['error']:.1e}"]
        body.append([*start, *cells])
    question = records.get(suite, {}).get("question", suite)
    headers = ["way", "tokens", "dtype", "pass", "time", "useful GFLOP/s", "peak", "error"]
    text = "The error is of the forward, as a share of the result's largest number."
    return [Section(question, text, headers, body)]


def peers(records: Records) -> list[Section]:
    """Ours and others on one program, each with its error: a wrong result is no result."""
    rows = _rows(records, "peers")
    ours = {}
    for row in rows:
        if row["job"]["way"] == "ours" and "failed" not in row:
            ours[row["job"]["tokens"], row["job"]["program"]] = row
    body = []
    for row in rows:
        job = row["job"]
        program = job["program"] if len(job["program"]) < 60 else job["program"][:57] + "..."
        start = [program, f"{job['tokens']:,}", job["way"]]
        if "failed" in row:
            body.append([*start, str(row["failed"]), "", "", ""])
            continue
        base = ours.get((job["tokens"], job["program"]))
        ratio = f"{_seconds(row) / _seconds(base):.2f}" if base else ABSENT
        error = "NaN" if row["has_nan"] else f"{row['error']:.1e}"
        verdict = error if row["is_right"] else f"{error} WRONG"
        peak = f"{row['peak_bytes'] / 2**20:.3g} MiB"
        body.append([*start, _time_text(_seconds(row)), ratio, peak, verdict])
    headers = ["program", "tokens", "way", "time", "of ours", "peak", "error"]
    text = (
        "Forward, float32, the same inputs. `of ours`: time as a multiple of this library's. "
        "The error is against float64 of the program that the way claims to compute."
    )
    return [Section("What people use today", text, headers, body)]


def recommendations(records: Records) -> list[Section]:
    """The fastest and the leanest right way by length, over all suites of lengths."""
    body = []
    for name, rows in _groups(_rows(records, "all", "single", "long", "extreme", "ring")).items():
        for tokens in _lengths(rows):
            right = [row for row in rows if "failed" not in row and row["is_right"]]
            right = [row for row in right if row["job"]["tokens"] == tokens]
            if len(right) < 2:
                continue
            fastest = min(right, key=_seconds)
            leanest = min(right, key=lambda row: row["peak_bytes"])
            body.append(
                [
                    name,
                    short(tokens),
                    f"{fastest['job']['way']} ({_time_text(_seconds(fastest))})",
                    f"{leanest['job']['way']} ({leanest['peak_bytes'] / 2**20:.3g} MiB)",
                ]
            )
    text = (
        "Computed from the tables below: right results alone. Ways of one suite may compute "
        "different programs; `compiled-dilated recommend` chooses for a length and a memory."
    )
    headers = ["suite", "tokens", "fastest", "leanest"]
    return [Section("Which to use when", text, headers, body)]
