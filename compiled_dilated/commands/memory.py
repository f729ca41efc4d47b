"""`compiled-dilated memory`: the command line of passes/, imported when it runs.

It imports inductor, which takes longer than all of compiled_dilated.
"""

from __future__ import annotations

import typer

# All options, --help among them, are parsed by the command line of passes/.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def memory(context: typer.Context) -> None:
    """Print a model's peak memory under candidates of passes.

    Arguments: MODULE:FACTORY, --train, --budget, --json, --png.
    """
    from passes.__main__ import app

    app(context.args, prog_name="compiled-dilated memory")
