"""`compiled-dilated report`: the measurements of benchmarks/report.py, which a checkout has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "report.py"


def report(context: typer.Context) -> None:
    """Run the report's suites and render its tables.

    Arguments: run [SUITE ...] --quick, or render.
    """
    if not _SCRIPT.is_file():
        raise typer.BadParameter(
            "the benchmarks are not part of the installed package. Get the source, which has "
            "benchmarks/report.py, and run the command from its environment"
        )
    done = subprocess.run([sys.executable, str(_SCRIPT), *context.args], check=False)
    raise typer.Exit(done.returncode)
