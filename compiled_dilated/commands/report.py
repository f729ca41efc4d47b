"""`compiled-dilated report`: the measurements of benchmarks/report.py, which a checkout has."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import typer

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "report.py"
# After Ctrl-C the script ends the case that it measures.
_SECONDS_TO_END = 10.0


def report(context: typer.Context) -> None:
    """Run the report's suites and render its tables.

    Arguments: run [SUITE ...] --quick, or render.
    """
    if not _SCRIPT.is_file():
        raise typer.BadParameter(
            "the benchmarks are not part of the installed package. Get the source, which has "
            "benchmarks/report.py, and run the command from its environment"
        )
    raise typer.Exit(_run([sys.executable, str(_SCRIPT), *context.args]))


def _run(command: list[str]) -> int:
    """Run a command to its end, also after Ctrl-C; its exit code."""
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = _interrupted(process)
    # A signal's number is negative here; shells add it to 128.
    if code < 0:
        return 128 - code
    return code


def _interrupted(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of an interrupted process; its exit code.

    Ctrl-C in a terminal interrupts both processes. A signal to this one alone is passed on.
    """
    try:
        return process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait()
