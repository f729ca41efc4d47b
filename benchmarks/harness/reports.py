"""The command line of a benchmark of cases: options, progress with the time left, one table, the JSON file."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from compiled_dilated import measure

from .cases import Case
from .turns import PASSES, Row, Settings, as_record, family_rows, rate, slow_down

_QUICK = Settings(turns=3, least=2, seconds=0.5, rival_turns=1, block_seconds=0.02)
_ROOT = Path(__file__).parents[2]


def parser(
    description: str, cases: Sequence[Case], rivals: Sequence[str]
) -> argparse.ArgumentParser:
    """The options that all benchmarks of cases have."""
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    out.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    out.add_argument("--quick", action="store_true", help="few cases and turns, about a minute")
    out.add_argument(
        "--busy",
        action="store_true",
        help="only how much slower quick cases get beside one busy process",
    )
    out.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="cases whose name holds the text; may be repeated",
    )
    out.add_argument(
        "--rivals",
        nargs="*",
        choices=rivals,
        default=list(rivals),
        help="what else is measured (%(default)s)",
    )
    out.add_argument(
        "--passes",
        nargs="+",
        choices=("forward", "both"),
        default=["forward", "both"],
        help="(%(default)s)",
    )
    out.add_argument(
        "--turns", type=int, help=f"at most, for each case and pass ({Settings.turns})"
    )
    out.add_argument(
        "--seconds", type=float, help=f"after which no turn starts ({Settings.seconds:g})"
    )
    out.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    out.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    out.epilog = f"{len(cases)} cases."
    return out


def run(options: argparse.Namespace, cases: Sequence[Case], bars: Mapping[str, float]) -> int:
    """Measure the chosen cases, print the table, write the file; the exit code.

    bars: the least speed of a family's worst length, in tokens a second, as a share of its first.
    """
    chosen = _chosen(options, cases)
    if options.list or not chosen:
        print(
            "\n".join(case.name for case in chosen)
            or f"no case's name holds {options.only}; see --list"
        )
        return 0 if chosen else 2
    torch.set_num_threads(options.threads)
    settings = _settings(options)
    record: dict[str, Any] = {
        "hardware": measure.hardware() | {"isa": torch.backends.cpu.get_cpu_capability()},
        "commit": commit(),
        "command": sys.argv[1:],
        "settings": as_record(settings),
        "complete": False,
        "rows": [],
    }
    for row in _progress(options, chosen, settings):
        record["rows"].append(row)
        if options.json:
            measure.write_json(options.json, record)
    if not options.busy:
        record["rows"] += family_rows(record["rows"], bars)
    record["complete"] = True
    if options.json:
        measure.write_json(options.json, record)
    print("\n" + (busy_table if options.busy else table)(record["rows"]))
    missed = list(
        dict.fromkeys(
            f"{row['case']}, {row['pass']}" for row in record["rows"] if row.get("met") is False
        )
    )
    if missed:
        print(f"\nmissed: {'; '.join(missed)}")
    return int(options.check and bool(missed))


def _chosen(options: argparse.Namespace, cases: Sequence[Case]) -> list[Case]:
    named = [
        case
        for case in cases
        if not options.only or any(text in case.name for text in options.only)
    ]
    short = options.quick or (options.busy and not options.only)
    return [case for case in named if case.quick or options.only or not short]


def _settings(options: argparse.Namespace) -> Settings:
    settings = _QUICK if options.quick else Settings()
    turns, seconds = (
        options.turns or settings.turns,
        settings.seconds if options.seconds is None else options.seconds,
    )
    return replace(settings, turns=turns, least=min(settings.least, turns), seconds=seconds)


def _progress(
    options: argparse.Namespace, cases: Sequence[Case], settings: Settings
) -> Iterator[Row]:
    """The rows, each with a line that says how long the rest may take."""
    passes = [name == "both" for name in ("forward", "both") if name in options.passes]
    total, done, started = len(cases) * len(passes), 0, time.perf_counter()
    for number, case in enumerate(cases):
        # Rivals take longer than all else: a short run has those of its first case.
        rivals = tuple(
            name
            for name in case.rivals
            if name in options.rivals and not (options.quick and number)
        )
        for backward in passes:
            print(
                f"[{done + 1}/{total}] {case.name}, {case.problem.dtype}, {PASSES[backward]} ...",
                flush=True,
            )
            with torch.set_grad_enabled(backward):
                row = (
                    slow_down(case, backward, settings)
                    if options.busy
                    else rate(case, backward, settings, rivals)
                )
            done += 1
            left = (time.perf_counter() - started) / done * (total - done)
            print(f"    {_said(row)}; about {_duration(left)} left", flush=True)
            yield row


def _said(row: Row) -> str:
    if "skipped" in row:
        return str(row["skipped"])
    if "slower" in row:
        return ", ".join(
            f"{name} {each['median']:.2f} times slower" for name, each in row["slower"].items()
        )
    others = "".join(f", {name} {_share(each)}" for name, each in row["rivals"].items())
    return f"{row['share']:.2f} of {row['of']}{others}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def table(rows: Sequence[Row]) -> str:
    """The figures for a person: useful rates as shares of the baseline's, quartiles of turns in brackets."""
    columns = [
        name
        for name in ("flex", "fallback", "SDPA")
        if any(name in row.get("rivals", {}) for row in rows)
    ]
    headers = [
        "case",
        "pass",
        "dtype",
        "ms",
        "share of",
        "ours",
        *columns,
        "bar",
        "met",
        "useful/computed",
    ]
    body = []
    for row in rows:
        start = [row["case"], row["pass"], row["dtype"]]
        if "skipped" in row:
            body.append([*start, "", "", row["skipped"]])
            continue
        milliseconds = f"{1e3 * median(row['seconds']):.1f}" if "seconds" in row else ""
        rivals = [_share(row.get("rivals", {}).get(name)) for name in columns]
        useful = row.get("useful_of_computed")
        body.append(
            [
                *start,
                milliseconds,
                row["of"],
                _share(row),
                *rivals,
                *_judged(row),
                "" if useful is None else f"{useful:.2f}",
            ]
        )
    return tabulate(body, headers=headers, disable_numparse=True)


def busy_table(rows: Sequence[Row]) -> str:
    """Slow-downs beside a busy process, ours against the baseline's."""
    headers = [
        "case",
        "pass",
        "dtype",
        "ours slower",
        "baseline slower",
        "baseline",
        "ratio",
        "bar",
        "met",
    ]
    body = [
        [
            row["case"],
            row["pass"],
            row["dtype"],
            *(
                _range(row["slower"][name]["median"], row["slower"][name]["spread"])
                for name in ("ours", "baseline")
            ),
            row["of"],
            f"{row['share']:.2f}",
            *_judged(row),
        ]
        for row in rows
    ]
    return tabulate(body, headers=headers, disable_numparse=True)


def _judged(row: Row) -> list[str]:
    return [
        "" if row["bar"] is None else f"{row['bar']:.2f}",
        {True: "yes", False: "NO", None: ""}[row["met"]],
    ]


def _share(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    return "refused" if "refused" in figure else _range(figure["share"], figure.get("spread"))


def _range(middle: float, ends: Sequence[float] | None) -> str:
    return f"{middle:.2f}" + (
        "" if ends is None or ends[0] == ends[1] else f" ({ends[0]:.2f}-{ends[1]:.2f})"
    )


def commit() -> str | None:
    """The commit that is measured, marked where files differ from it; None outside a checkout."""
    said = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    return said.stdout.strip() or None
