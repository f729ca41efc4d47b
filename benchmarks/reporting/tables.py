"""The report's sections: a heading, a text, a table, a chart.

Every figure is a measurement of a row, or computed from such with the formula that the text states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import linear_regression
from typing import Any

from compiled_dilated.rates import FORWARD_AND_BACKWARD

from .cells import (
    ABSENT,
    Records,
    Row,
    bytes_per_token,
    chart_of,
    groups_of,
    lengths_of,
    line,
    lines_of,
    mebibytes,
    passes,
    pivot,
    rate,
    right,
    rows_of,
    seconds,
    time_text,
    tokens,
    ways_of,
)
from .charts import Chart, short

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
        *limits(records),
        *rings(records),
        *billion(records),
        *trillion(records),
        *compared(records, "hilbert"),
        *compared(records, "dtypes"),
        *peers(records),
    ]
    return [section for section in out if section.rows]


# Sections -----------------------------------------------------------------------------------

_LONG = ("long", "extreme", "ring")
_BY_LENGTH = ("all", "single", *_LONG)


def times_by_length(records: Records) -> list[Section]:
    """Execution time by length, one table for each suite, pass and dtype."""
    out = []
    for name, rows in groups_of(rows_of(records, *_BY_LENGTH)).items():
        headers, body = pivot(rows, lambda row: time_text(seconds(row)))
        chart = chart_of(
            f"Time for each token: {name}",
            "microseconds for each token",
            rows,
            lambda row: 1e6 / rate(row),
        )
        text = "Median of one call. WRONG: the error against float64 exceeds the dtype's tolerance."
        out.append(Section(f"Execution time: {name}", text, headers, body, chart))
    return out


def memory_by_length(records: Records) -> list[Section]:
    """Peak bytes beyond the inputs by length."""
    out = []
    for name, rows in groups_of(rows_of(records, *_LONG, "memory")).items():
        headers, body = pivot(rows, lambda row: f"{bytes_per_token(row) / 1024:.3g} KiB")
        chart = chart_of(
            f"Memory for each token: {name}",
            "KiB for each token",
            rows,
            lambda row: max(bytes_per_token(row), 1) / 1024,
        )
        text = "Peak of a call beyond its inputs, the result included, for each token."
        out.append(Section(f"Memory for each token: {name}", text, headers, body, chart))
    return out


def throughput(records: Records) -> list[Section]:
    """Tokens a second by length, and shares of dense attention's rate.

    The rate is of operations.
    """
    out = []
    for name, rows in groups_of(rows_of(records, *_LONG)).items():
        headers, body = pivot(rows, lambda row: f"{rate(row):,.0f}")
        dense = [row for row in rows if row["job"]["way"] == "SDPA" and "failed" not in row]
        chart = None
        if dense:
            best = max(row["flops"] / seconds(row) for row in dense)
            counted = [row for row in rows if "flops" in row]
            chart = chart_of(
                f"Useful operations a second, as a share of dense SDPA's best: {name}",
                "share",
                counted,
                partial(_share, best=best),
            )
        text = "Tokens a second."
        out.append(Section(f"Throughput: {name}", text, headers, body, chart))
    return out


def _share(row: Row, best: float) -> float:
    """Useful operations a second, as a share of the best."""
    share: float = row["flops"] / seconds(row) / best
    return share


def longest(records: Records) -> list[Section]:
    """The longest sequence that each way computed, and what ended the search."""
    body = []
    for name, rows in groups_of(rows_of(records, *_LONG)).items():
        for way in ways_of(rows):
            of_way = [row for row in rows if row["job"]["way"] == way]
            done = right(of_way)
            failed = [row for row in of_way if "failed" in row]
            if not done:
                continue
            last = max(done, key=tokens)
            end = "none tried"
            if failed:
                first = min(failed, key=tokens)
                end = f"{short(tokens(first))}: {first['failed']}"
            cells = [name, way, f"{tokens(last):,}", time_text(seconds(last))]
            body.append([*cells, f"{last['peak_bytes'] / GIB:.3g} GiB", end])
    headers = ["suite", "way", "longest", "time", "peak", "first that failed"]
    return [Section("Longest sequence computed", "Right results alone.", headers, body)]


def memory_fit(records: Records) -> list[Section]:
    """The exponent of memory by length, fitted to the measurements."""
    body = []
    for name, rows in groups_of(rows_of(records, "memory")).items():
        for way, points in lines_of(rows, lambda row: max(row["peak_bytes"], 1)).items():
            exponent = _exponent(points)
            last = max(points)
            per_token = f"{last[1] / last[0] / 1024:.3g} KiB at {short(int(last[0]))}"
            body.append([name, way, f"{exponent:.2f}", per_token])
    text = (
        "Peak bytes beyond the inputs are tokens^exponent, by least squares on logarithms. "
        "1 is linear, 2 quadratic."
    )
    headers = ["suite", "way", "exponent", "for each token"]
    return [Section("How memory grows", text, headers, body)]


def _exponent(points: Sequence[tuple[float, float]]) -> float:
    """The exponent of the power law through points: the slope of their logarithms."""
    xs, ys = [], []
    for x, y in points:
        xs.append(math.log(x))
        ys.append(math.log(y))
    return linear_regression(xs, ys).slope


def limits(records: Records) -> list[Section]:
    """Sizes that fit into limits of memory, beside measured peaks."""

    def figures(row: Row) -> list[str]:
        fit = row["limit"]
        out = []
        for name in ("tokens", "batch"):
            share = "not run"
            if name in row["peaks"]:
                share = f"{row['peaks'][name] / fit['limit']:.1%}"
            out += [f"{fit[name]:,}", share]
        return out

    body = []
    for row in rows_of(records, "limits"):
        job = row["job"]
        size = f"{job['settings']['gib']} GiB"
        body.append(line(row, [f"{job['way']}, {passes(row)}", size], figures))
    text = (
        "The longest sequence of one batch row, and the most batch rows of 16,384 tokens, by "
        "`plan(..., memory_limit=)`: 8 heads of width 64, float32. Peaks are of calls of these "
        "sizes, inputs included, as shares of the limit."
    )
    headers = ["program", "limit", "tokens", "peak", "batch rows", "peak"]
    return [Section("What fits into a memory", text, headers, body)]


def rings(records: Records) -> list[Section]:
    """Bytes that a ring's ranks receive, by the plan of the run."""
    rows = [row for row in rows_of(records, "ring") if "ring" in row]
    body = []
    for row in rows:
        ring = row["ring"]
        start = [row["job"]["way"], f"{tokens(row):,}", ring["layout"], str(ring["steps_max"])]
        received = f"{ring['received_mib_max']:.3g} MiB"
        body.append([*start, received, time_text(seconds(row))])
    chart = chart_of(
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

    def figures(row: Row) -> list[str]:
        counted = row["counted"]
        return [
            f"{counted['steps']:,}",
            f"{rate(row):,.0f}",
            time_text(seconds(row)),
            f"{counted['process_peak_bytes'] / 2**20:.0f} MiB",
            f"{row['error']:.1e} of {row['compared']}",
        ]

    body = []
    for row in rows_of(records, "billion"):
        body.append(line(row, [f"{tokens(row):,}", f"{row['job']['ranks']:,}"], figures))
    text = (
        "One head of width 16, LongNet; nothing is multiplied by the ring size: tokens a second "
        "are those that this machine computed. The peak is the process's."
    )
    headers = ["tokens", "ranks", "steps executed", "tokens/s", "time", "peak", "error"]
    return [Section("Sequences that are in no memory", text, headers, body)]


def trillion(records: Records) -> list[Section]:
    """An extrapolation of the longest run to 10^12 tokens."""
    done = [row for row in rows_of(records, "billion") if "failed" not in row]
    if not done:
        return []
    # Every rank has as many tokens as in the longest run.
    row = max(done, key=tokens)
    ranks, trillion_tokens = row["job"]["ranks"], 10**12
    per_rank = tokens(row) / ranks
    body = [
        [
            "ranks",
            f"{math.ceil(trillion_tokens / per_rank):,}",
            f"{per_rank:,.0f} tokens a rank, as run",
        ],
        [
            "one machine like this one",
            f"{trillion_tokens / rate(row) / 86400:,.0f} days",
            f"{rate(row):,.0f} tokens/s at {tokens(row):,} tokens, constant for LongNet",
        ],
        [
            "all ranks at once",
            time_text(seconds(row) / ranks),
            "a machine for each rank, an exchange that costs nothing",
        ],
        [
            "q, k, v and output of one head of 16, float32",
            f"{trillion_tokens * 4 * 16 * 4 / 1e12:,.0f} TB",
            "over all ranks",
        ],
    ]
    text = "An extrapolation, not a measurement; the assumptions stand beside each figure."
    return [Section("A trillion tokens", text, ["quantity", "figure", "assumption"], body)]


def compared(records: Records, suite: str) -> list[Section]:
    """The rows of a suite as they are."""

    def figures(row: Row) -> list[str]:
        work = row["flops"]
        if row["job"]["backward"]:
            work *= FORWARD_AND_BACKWARD
        gflops = f"{work / seconds(row) / 1e9:.0f}"
        peak, error = mebibytes(row["peak_bytes"]), f"{row['error']:.1e}"
        return [time_text(seconds(row)), gflops, peak, error]

    body = []
    for row in rows_of(records, suite):
        start = [row["job"]["way"], f"{tokens(row):,}", row["job"]["dtype"], passes(row)]
        body.append(line(row, start, figures))
    question = records.get(suite, {}).get("question", suite)
    headers = ["way", "tokens", "dtype", "pass", "time", "useful GFLOP/s", "peak", "error"]
    text = "The error is of the forward, as a share of the result's largest number."
    return [Section(question, text, headers, body)]


def peers(records: Records) -> list[Section]:
    """This library and peers on one program, with their errors.

    A wrong result is no result.
    """
    rows = rows_of(records, "peers")
    # The rows of this library, by length, program and pass.
    bases = {}
    for row in rows:
        if row["job"]["way"] == "ours" and "failed" not in row:
            bases[_question(row)] = row

    def figures(row: Row) -> list[str]:
        base = bases.get(_question(row))
        ratio = ABSENT
        if base:
            ratio = f"{seconds(row) / seconds(base):.2f}"
        error = "NaN" if row["has_nan"] else f"{row['error']:.1e}"
        if not row["is_right"]:
            error = f"{error} WRONG"
        return [time_text(seconds(row)), ratio, mebibytes(row["peak_bytes"]), error]

    body = []
    for row in rows:
        program = row["job"]["program"]
        if len(program) >= 60:
            program = program[:57] + "..."
        start = [program, f"{tokens(row):,}", passes(row), row["job"]["way"]]
        body.append(line(row, start, figures))
    headers = ["program", "tokens", "pass", "way", "time", "of ours", "peak", "error"]
    text = (
        "float32, the same inputs. `of ours`: time as a multiple of this library's. The error is "
        "that of the forward, against float64 of the program that the way claims to compute."
    )
    return [Section("What people use today", text, headers, body)]


def _question(row: Row) -> tuple[int, str, str]:
    """The length, program and pass that peers share."""
    return tokens(row), row["job"]["program"], passes(row)


def recommendations(records: Records) -> list[Section]:
    """The fastest and the leanest right way by length.

    The ways come from all suites of lengths.
    """
    body = []
    for name, rows in groups_of(rows_of(records, *_BY_LENGTH)).items():
        for length in lengths_of(rows):
            candidates = [row for row in right(rows) if tokens(row) == length]
            if len(candidates) < 2:
                continue
            fastest = min(candidates, key=seconds)
            leanest = min(candidates, key=lambda row: row["peak_bytes"])
            body.append(
                [
                    name,
                    short(length),
                    _with_share(fastest, time_text(seconds(fastest))),
                    _with_share(leanest, mebibytes(leanest["peak_bytes"])),
                ]
            )
    text = (
        "Computed from the tables below: right results alone. Ways of one suite may compute "
        "different programs: the share is that of all pairs that the way computes. "
        "`compiled-dilated recommend` chooses for a length and a memory."
    )
    headers = ["suite", "tokens", "fastest", "leanest"]
    return [Section("Which to use when", text, headers, body)]


def _with_share(row: Row, figure: str) -> str:
    """A way with a figure and its share of all pairs."""
    job = row["job"]
    share = ""
    if "pairs" in row:
        pairs = job["batch"] * job["heads"] * job["tokens"] ** 2
        percent = 100 * row["pairs"] / pairs
        digits = 0 if percent >= 10 else 1
        share = f", {percent:.{digits}f} % of all pairs"
    return f"{job['way']} ({figure}{share})"
