"""The command line, `compiled-dilated COMMAND`.

Commands: plan, recommend, show, doctor, export, inspect, memory, report and ring.

Exit codes: 0 done, 1 a check failed, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from . import version
from .commands import doctor, memory, packages, plan, recommend, report, ring, show

app = typer.Typer(
    name="compiled-dilated",
    help="Sparse attention for long sequences: write what may attend to what; plan it, draw it, "
    "run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, which scripts and narrow terminals read as it is
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        own = version.installed() or "not installed"
        typer.echo(f"compiled-dilated {own}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    prints_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _command in (plan.plan, show.show, doctor.doctor, packages.export, packages.inspect):
    app.command()(_command)
app.command(name="recommend")(recommend.recommend_program)
app.command(context_settings=memory.PASSED_ON)(memory.memory)
app.command(context_settings=memory.PASSED_ON)(report.report)
app.add_typer(ring.app, name="ring")


if __name__ == "__main__":
    app()
