"""The command line of a benchmark of cases: options, table, JSON file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from compiled_dilated import measure

from . import runs
from .cases import Case
from .turns import PASSES, Row, Settings, family_rows, rate, slow_down

_QUICK = Settings(turns=3, least=2, seconds=0.5, rival_turns=1, block_seconds=0.02)


def parser(
    description: str, cases: Sequence[Case], rivals: Sequence[str]
) -> argparse.ArgumentParser:
    """The options of all benchmarks of cases."""
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option, passes = out.add_argument, ("forward", "both")
    option("--json", type=Path, metavar="FILE", help="where to write the figures")
    option("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    option("--quick", action="store_true", help="few cases and turns, about a minute")
    option("--busy", action="store_true", help="slow-down of quick cases beside a busy process")
    text = "cases whose name contains the text; may be repeated"
    option("--only", action="append", metavar="TEXT", help=text)
    text = "other ways to measure (%(default)s)"
    option("--rivals", nargs="*", choices=rivals, default=list(rivals), help=text)
    option("--passes", nargs="+", choices=passes, default=list(passes), help="(%(default)s)")
    option("--turns", type=int, help=f"at most, for each case and pass ({Settings.turns})")
    option("--seconds", type=float, help=f"after which no turn starts ({Settings.seconds:g})")
    option("--list", action="store_true", help="print the names of the cases and stop")
    option("--check", action="store_true", help="exit with 1 if a bar is missed")
    out.epilog = f"{len(cases)} cases."
    return out


def run(options: argparse.Namespace, cases: Sequence[Case], bars: Mapping[str, float]) -> int:
    """Measure cases, print the table, write the file; the exit code.

    bars: the least speed of a family's worst length, in tokens a second, as a share of its first.
    """
    chosen = _chosen(options, cases)
    if options.list or not chosen:
        return runs.print_names([case.name for case in chosen], options.only)
    torch.set_num_threads(options.threads)
    settings = _settings(options)
    record = runs.origin() | {"settings": asdict(settings), "complete": False, "rows": []}
    for row in _progress(options, chosen, settings):
        record["rows"].append(row)
        # After each case, so that an interrupted run keeps its figures.
        if options.json:
            measure.write_json(options.json, record)
    if not options.busy:
        record["rows"] += family_rows(record["rows"], bars)
    record["complete"] = True
    if options.json:
        measure.write_json(options.json, record)
    figures = busy_table if options.busy else table
    print("\n" + figures(record["rows"]))
    missed = []
    for row in record["rows"]:
        name = f"{row['case']}, {row['pass']}"
        if row.get("met") is False and name not in missed:
            missed.append(name)
    if missed:
        print(f"\nmissed: {'; '.join(missed)}")
    return int(options.check and bool(missed))


def _chosen(options: argparse.Namespace, cases: Sequence[Case]) -> list[Case]:
    """The cases that the options select."""
    if options.only:
        return [case for case in cases if runs.is_chosen(case.name, options.only)]
    if options.quick or options.busy:
        return [case for case in cases if case.quick]
    return list(cases)


def _settings(options: argparse.Namespace) -> Settings:
    settings = Settings()
    if options.quick:
        settings = _QUICK
    turns, seconds = options.turns or settings.turns, settings.seconds
    if options.seconds is not None:
        seconds = options.seconds
    return replace(settings, turns=turns, least=min(settings.least, turns), seconds=seconds)


def _progress(
    options: argparse.Namespace, cases: Sequence[Case], settings: Settings
) -> Iterator[Row]:
    """Measure the cases, printing for each its figures and the time left."""
    passes = [name == "both" for name in ("forward", "both") if name in options.passes]
    progress = runs.Progress(len(cases) * len(passes))
    for number, case in enumerate(cases):
        rivals = tuple(name for name in case.rivals if name in options.rivals)
        # Rivals take longest: a short run measures those of its first case only.
        if options.quick and number:
            rivals = ()
        for backward in passes:
            progress.start(f"{case.name}, {case.problem.dtype}, {PASSES[backward]}")
            with torch.set_grad_enabled(backward):
                if options.busy:
                    row = slow_down(case, backward, settings)
                else:
                    row = rate(case, backward, settings, rivals)
            progress.end(_summary(row))
            yield row


def _summary(row: Row) -> str:
    """A row in a few words."""
    if "skipped" in row:
        return str(row["skipped"])
    if "slower" in row:
        slower = row["slower"].items()
        return ", ".join(f"{name} {figure['median']:.2f} times slower" for name, figure in slower)
    rivals = "".join(f", {name} {_share(figure)}" for name, figure in row["rivals"].items())
    return f"{row['share']:.2f} of {row['of']}{rivals}"


def table(rows: Sequence[Row]) -> str:
    """Useful rates as shares of the baseline's.

    Quartiles of turns are in brackets.
    """
    measured: set[str] = set()
    for row in rows:
        measured.update(row.get("rivals", {}))
    columns = [name for name in ("flex", "fallback", "SDPA") if name in measured]
    start_headers = ["case", "pass", "dtype", "ms", "share of", "ours"]
    headers = [*start_headers, *columns, "bar", "met", "useful/computed"]
    body = []
    for row in rows:
        start = [row["case"], row["pass"], row["dtype"]]
        if "skipped" in row:
            body.append([*start, "", "", row["skipped"]])
            continue
        # A family's row compares other rows: it has no time of its own.
        milliseconds = ""
        if "seconds" in row:
            milliseconds = f"{1e3 * median(row['seconds']):.1f}"
        rivals = [_share(row.get("rivals", {}).get(name)) for name in columns]
        useful = _number(row.get("useful_of_computed"))
        figures = [milliseconds, row["of"], _share(row), *rivals]
        body.append([*start, *figures, *_verdict(row), useful])
    return tabulate(body, headers=headers, disable_numparse=True)


def busy_table(rows: Sequence[Row]) -> str:
    """Slow-downs beside a busy process, ours against the baseline's."""
    figures = ["ours slower", "baseline slower", "baseline", "ratio"]
    headers = ["case", "pass", "dtype", *figures, "bar", "met"]
    body = []
    for row in rows:
        ranges = []
        for name in ("ours", "baseline"):
            slower = row["slower"][name]
            ranges.append(_range(slower["median"], slower["spread"]))
        start = [row["case"], row["pass"], row["dtype"]]
        body.append([*start, *ranges, row["of"], f"{row['share']:.2f}", *_verdict(row)])
    return tabulate(body, headers=headers, disable_numparse=True)


def _verdict(row: Row) -> list[str]:
    """The cells of bar and met."""
    met = {True: "yes", False: "NO", None: ""}
    return [_number(row["bar"]), met[row["met"]]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    if "refused" in figure:
        return "refused"
    return _range(figure["share"], figure.get("spread"))


def _range(middle: float, ends: Sequence[float] | None) -> str:
    if ends is None or ends[0] == ends[1]:
        return f"{middle:.2f}"
    return f"{middle:.2f} ({ends[0]:.2f}-{ends[1]:.2f})"
