"""`python -m passes module:factory`: what a step takes, under which passes, and who holds it; nothing is compiled or run.

Exit codes: 0 it fits (or no budget was given), 1 no candidate fits the budget, 2 bad usage.
"""

from __future__ import annotations

import importlib
import json as json_format
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import budgets, peak, reports
from .planning import BudgetError, Choice, Pipeline
from .reports import Report
from .traced import capture


def memory(
    target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="A function that returns (model, example_inputs).")],
    budget: Annotated[str | None, typer.Option(help="For the peak of a step, as 6GiB; without it, the fastest is taken.")] = None,
    train: Annotated[bool, typer.Option("--train", help="A step with its backward.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Figures as JSON, without the timeline.")] = False,
    png: Annotated[Path | None, typer.Option(help="Where the timeline goes as a picture; a backward's beside it.")] = None,
) -> None:
    """Print the peak of a step under each candidate, what the passes of the chosen one do, and the timeline of its memory."""
    limit, factory = None if budget is None else _usage(lambda: budgets.parse("--budget", budget)), _usage(lambda: _found(target))
    model, inputs = _usage(lambda: _made(target, factory))
    try:
        choice: Choice = capture(model, inputs, Pipeline(limit).choose, train=train)
    except BudgetError as error:
        typer.echo(str(error).strip(), err=True)
        raise typer.Exit(1) from error
    report, graphs = Report((choice,)), reports.timelines(choice.traced)
    if json:
        typer.echo(json_format.dumps(report.to_json(), indent=1))
    else:
        typer.echo("\n\n".join([str(report), *map(peak.timeline, graphs)]))
    if png is not None:
        for each, path in zip(graphs, (png, png.with_stem(f"{png.stem}-backward")), strict=False):
            peak.draw(each, path)


def _found(target: str) -> Callable[[], Any]:
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"MODULE:FACTORY must name a module and a function of it, as models.llama:small; got {target!r}")
    sys.path.insert(0, "")
    factory = getattr(importlib.import_module(module), name, None)
    if not callable(factory):
        raise ValueError(f"MODULE:FACTORY must name a function; {module} has no function {name!r}")
    return factory  # type: ignore[no-any-return]


def _made(target: str, factory: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], tuple | list)):
        raise ValueError(f"{target} must return (model, example_inputs), the inputs a tuple; got {type(made).__name__}")
    return made[0], tuple(made[1])


def _usage(act: Callable[[], Any]) -> Any:
    """What it gives; bad usage becomes one line and exit code 2."""
    try:
        return act()
    except (ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(memory)

if __name__ == "__main__":
    app(prog_name="python -m passes")
