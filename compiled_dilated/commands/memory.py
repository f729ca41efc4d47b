"""`compiled-dilated memory`: the command line of passes/, which imports the compiler and so waits until it is asked for."""

from __future__ import annotations

import typer

# Its own options, --help among them, are for the other command line to read.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def memory(context: typer.Context) -> None:
    """Print what a step of a model holds, under which passes and where: MODULE:FACTORY, --train, --budget, --json, --png."""
    from passes.__main__ import app

    app(context.args, prog_name="compiled-dilated memory")
