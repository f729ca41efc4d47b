"""Sections by length: time, memory, tokens a second, and the longest sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import linear_regression

from .cells import (
    Records,
    Row,
    bytes_per_token,
    chart_of,
    groups_of,
    lines_of,
    pivot,
    rate,
    right,
    rows_of,
    seconds,
    time_text,
    tokens,
    ways_of,
)
from .charts import short
from .section import Section

GIB = 2**30
LONG = ("long", "extreme", "ring")
BY_LENGTH = ("all", "single", *LONG)


def times(records: Records) -> list[Section]:
    """Execution time by length, one table for each suite, pass and dtype."""
    out = []
    for name, rows in groups_of(rows_of(records, *BY_LENGTH)).items():
        headers, body = pivot(rows, lambda row: time_text(seconds(row)))
        chart = chart_of(
            f"Time for each token: {name}",
            "microseconds for each token",
            rows,
            lambda row: 1e6 / rate(row),
        )
        text = (
            "Median of one call. WRONG: the error against float64 exceeds the dtype's tolerance. "
            "Up to 2,048 tokens all rows and gradients are compared; of longer sequences, 16 rows "
            "of the forward."
        )
        out.append(Section(f"Execution time: {name}", text, headers, body, chart))
    return out


def memory(records: Records) -> list[Section]:
    """Peak bytes beyond the inputs by length."""
    out = []
    for name, rows in groups_of(rows_of(records, *LONG, "memory")).items():
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
    for name, rows in groups_of(rows_of(records, *LONG)).items():
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
    for name, rows in groups_of(rows_of(records, *LONG)).items():
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


def memory_growth(records: Records) -> list[Section]:
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
