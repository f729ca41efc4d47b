"""`python -m passes module:factory`: a step's peak under each candidate.

The step is traced, not run.

Exit codes: 0 it fits (or no budget was given), 1 no candidate fits the budget, 2 bad usage.
"""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import arguments, factories
from .analysis import peak
from .planning import budgets, reports
from .planning.choose import BudgetError, Choice, Pipeline
from .planning.reports import Report
from .planning.tracing import capture


def memory(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY", help="A function that returns (model, example_inputs)."
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(help="For the peak of a step, as 6GiB; without it, the fastest is taken."),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="A step with its backward.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Figures as JSON, without the timeline.")
    ] = False,
    png: Annotated[
        Path | None,
        typer.Option(help="Where the timeline goes as a picture; a backward's beside it."),
    ] = None,
) -> None:
    """Print a step's peak under each candidate, the chosen changes, a timeline."""
    with _usage():
        limit = None if budget is None else budgets.parse("--budget", budget)
        if png is not None:
            peak.check_picture("--png", png)
        module, name = factories.named(target)
    model, inputs = _built(target, module, name)
    try:
        choice: Choice = capture(model, inputs, Pipeline(limit).choose, train=train)
    except BudgetError as error:
        typer.echo(str(error).strip(), err=True)
        raise typer.Exit(1) from error
    except ValueError as error:  # of capture; torch's compiler wraps that of a pass
        raise _bad_usage(error) from error
    report, graphs = Report((choice,)), reports.timelines(choice.traced)
    if json:
        typer.echo(json_format.dumps(report.to_json(), indent=1))
    else:
        typer.echo("\n\n".join([str(report), *map(peak.timeline, graphs)]))
    if png is not None:
        paths = (png, png.with_stem(f"{png.stem}-backward"))
        for graph, path in zip(graphs, paths, strict=False):
            peak.draw(graph, path)


def _built(target: str, module: str, name: str) -> tuple[Any, tuple[Any, ...]]:
    """Call a factory for the model and its inputs."""
    try:
        factory = factories.load(module, name)
    except factories.NoFactory as error:
        raise _bad_usage(error) from error
    # An exception of the factory is the user's own, and keeps its traceback.
    result = factory()
    with _usage():
        return _checked(target, result)


def _checked(target: str, result: Any) -> tuple[Any, tuple[Any, ...]]:
    """The model and its inputs from a factory's result.

    Raises TypeError or ValueError if it has neither.
    """
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"{target} must return (model, example_inputs), the inputs a tuple; "
            f"got {type(result).__name__}"
        )
    model, inputs = result
    arguments.model(model)
    return model, arguments.inputs("example_inputs", inputs, model)


@contextmanager
def _usage() -> Iterator[None]:
    """Turn a failed check into one line and exit code 2.

    For this package's own checks only.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise _bad_usage(error) from error


def _bad_usage(error: Exception) -> typer.Exit:
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(2)


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(memory)

if __name__ == "__main__":
    app(prog_name="python -m passes")
