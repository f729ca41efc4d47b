"""Sections that compare ways of computing: with peers, between dtypes, and what to use when."""

from __future__ import annotations

from compiled_dilated.rates import FORWARD_AND_BACKWARD

from .cells import (
    ABSENT,
    Records,
    Row,
    error_text,
    groups_of,
    lengths_of,
    line,
    mebibytes,
    passes,
    right,
    rows_of,
    seconds,
    time_text,
    tokens,
)
from .charts import short
from .lengths import BY_LENGTH
from .peers import PEERS
from .section import Section


def compared(records: Records, suite: str) -> list[Section]:
    """The rows of a suite as they are."""

    def figures(row: Row) -> list[str]:
        work = row["flops"]
        if row["job"]["backward"]:
            work *= FORWARD_AND_BACKWARD
        gflops = f"{work / seconds(row) / 1e9:.0f}"
        return [time_text(seconds(row)), gflops, mebibytes(row["peak_bytes"]), error_text(row)]

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
        return [time_text(seconds(row)), ratio, mebibytes(row["peak_bytes"]), error_text(row)]

    body, notes = [], {}
    for row in rows:
        way = row["job"]["way"]
        if way in PEERS and PEERS[way].note:
            notes[way] = PEERS[way].note
        program = row["job"]["program"]
        if len(program) >= 60:
            program = program[:57] + "..."
        start = [program, f"{tokens(row):,}", row["job"]["dtype"], passes(row), way]
        body.append(line(row, start, figures))
    headers = ["program", "tokens", "dtype", "pass", "way", "time", "of ours", "peak", "error"]
    text = (
        "The same inputs; medians of up to three calls, in a process for each row. `of ours`: time "
        "as a multiple of this library's. The error is that of the forward, against float64 of the "
        "program that the way claims to compute. "
    )
    text += "; ".join(f"{way}: {note}" for way, note in notes.items()) + "."
    return [Section("What people use today", text, headers, body)]


def _question(row: Row) -> tuple[int, str, str, str]:
    """The length, program, dtype and pass that peers share."""
    job = row["job"]
    return tokens(row), job["program"], job["dtype"], passes(row)


def recommendations(records: Records) -> list[Section]:
    """The fastest and the leanest right way by length.

    The ways come from all suites of lengths.
    """
    body = []
    for name, rows in groups_of(rows_of(records, *BY_LENGTH)).items():
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
