"""Run the report's suites and render their tables.

python benchmarks/report.py run [SUITE ...] [--quick] [--only TEXT] [--directory report] [--json]
python benchmarks/report.py render [--directory report] [--html FILE] [--markdown FILE]

`run` measures each case in a process of its own under a limit of memory and time. It writes the row
at once to <directory>/<suite>.json and prints the time that is left. A case whose row is there is
not measured again. All suites take under 10 minutes with --quick, and hours without it; the machine
has to be quiet. Exit code 1 if a result of this library is wrong or one of its cases ended with an
error, 130 after Ctrl-C.

`render` writes one self-contained HTML page and Markdown from the directory's records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compiled_dilated import measure

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from reporting.suites import SUITES

    out = argparse.ArgumentParser(
        prog="compiled-dilated report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = out.add_subparsers(dest="command", required=True)
    # `run` and its options.
    run = commands.add_parser("run", help="measure suites")
    run.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all if none is named"
    )
    run.add_argument("--quick", action="store_true", help="the short form: minutes")
    run.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="cases whose name has the text"
    )
    run.add_argument(
        "--limit",
        type=_positive,
        default=8.0,
        metavar="GIB",
        help="memory of one case (%(default)s)",
    )
    run.add_argument(
        "--seconds", type=_positive, default=900.0, help="time of one case (%(default)s)"
    )
    run.add_argument("--anew", action="store_true", help="measure again what is already there")
    run.add_argument("--list", action="store_true", help="print the chosen cases and stop")
    run.add_argument(
        "--json", action="store_true", help="print the rows as JSON, and progress on stderr"
    )
    # `render` and its options.
    render = commands.add_parser("render", help="write the tables and pictures")
    render.add_argument("--html", type=Path, default=Path("report.html"), metavar="FILE")
    render.add_argument("--markdown", type=Path, default=Path("report.md"), metavar="FILE")
    for command in (run, render):
        command.add_argument(
            "--directory",
            type=Path,
            default=Path("report"),
            metavar="DIR",
            help="of the records (%(default)s)",
        )
    return out


def _positive(text: str) -> float:
    """A number of an option: NaN and infinity are no limits, and no JSON."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, as 8; got {text!r}")
    return number


def run(options: argparse.Namespace) -> int:
    """Measure the chosen suites; the exit code."""
    from harness.runs import is_chosen
    from reporting import running
    from reporting.suites import SUITES

    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        print(f"no suite is named {unknown[0]!r}; there are {', '.join(SUITES)}", file=sys.stderr)
        return 2
    suites = [SUITES[name] for name in options.suites or SUITES]
    names = []
    for suite in suites:
        chosen = [job for job in suite.jobs(options.quick) if is_chosen(job.name, options.only)]
        names += [f"{suite.name}: {job.name}" for job in chosen]
    if not names:
        print(
            f"no case's name contains {' or '.join(map(repr, options.only))}; "
            "`compiled-dilated report run --list` prints the names, each after its suite's",
            file=sys.stderr,
        )
        return 2
    if options.list:
        print("\n".join(names))
        return 0
    with contextlib.ExitStack() as stack:
        if options.json:
            # The rows are the only output on stdout.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        rows = running.run(
            suites,
            options.directory,
            __file__,
            quick=options.quick,
            only=options.only,
            limit_bytes=int(options.limit * 2**30),
            seconds=options.seconds,
            anew=options.anew,
        )
    if options.json:
        print(json.dumps(rows, indent=1))
    return int(any(_is_fault(row) for row in rows))


def _is_fault(row: Row) -> bool:
    """Whether a row of this library is wrong or has failed.

    A stop at a limit is no fault.
    """
    if row["job"]["kind"] == "peer":
        return False
    failure = row.get("failed")
    if failure is None:
        return row["is_right"] is False
    return not failure.startswith(("out of", "took longer"))


def render(options: argparse.Namespace) -> int:
    """Write the report's files; the exit code."""
    from reporting import page, tables

    records = tables.read(options.directory)
    if not records:
        print(
            f"{options.directory} has no records; make some with `compiled-dilated report run`",
            file=sys.stderr,
        )
        return 2
    sections = tables.sections(records)
    measure.write(options.html, page.html_page(records, sections))
    measure.write(options.markdown, page.markdown(records, sections))
    print(f"{options.html} and {options.markdown}: {len(sections)} sections")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, or one job in a process of its own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--job"]:
        from reporting.jobs import Job, row_of

        print(json.dumps(row_of(Job(**json.loads(arguments[1])))))
        return 0
    options = parser().parse_args(arguments)
    try:
        if options.command == "run":
            return run(options)
        return render(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
