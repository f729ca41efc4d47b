"""Sections on sizes beyond one memory: limits, rings, a billion and a trillion tokens."""

from __future__ import annotations

import math

from .cells import (
    Records,
    Row,
    cell,
    chart_of,
    error_text,
    line,
    passes,
    rate,
    right,
    rows_of,
    seconds,
    time_text,
    tokens,
)
from .section import Section


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
    rows = [row for row in rows_of(records, "ring") if _is_of_ring(row)]

    def figures(row: Row) -> list[str]:
        ring = row["ring"]
        received = f"{ring['received_mib_max']:.3g} MiB"
        time = cell(row, lambda row: time_text(seconds(row)))
        return [ring["layout"], str(ring["steps_max"]), received, time]

    body = []
    for row in rows:
        body.append(line(row, [row["job"]["way"], f"{tokens(row):,}"], figures))
    chart = chart_of(
        "Most that one rank receives",
        "MiB",
        [row for row in rows if "ring" in row],
        lambda row: max(row["ring"]["received_mib_max"], 1e-3),
    )
    text = "All ranks simulated one after the other in this process, every step executed."
    headers = ["way", "tokens", "layout", "most steps", "most received", "time of all ranks"]
    return [Section("Rings", text, headers, body, chart)]


def _is_of_ring(row: Row) -> bool:
    """Whether a row, failed ones included, is of several ranks."""
    return "ring" in row or ("failed" in row and "RingDilated" in row["job"]["way"])


def billion(records: Records) -> list[Section]:
    """Sequences through generated inputs, every step of every rank executed."""

    def figures(row: Row) -> list[str]:
        counted = row["counted"]
        return [
            f"{counted['steps']:,}",
            f"{rate(row):,.0f}",
            time_text(seconds(row)),
            f"{counted['process_peak_bytes'] / 2**20:.0f} MiB",
            f"{error_text(row)} of {row['compared']}",
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
    done = right(rows_of(records, "billion"))
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
