"""`compiled-dilated export` and `compiled-dilated inspect`: packages from the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import packages
from .arguments import Json, bad_usage, numbers, print_json


def export(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns (model or program, example inputs); MODULE as `python -m` finds it.",
        ),
    ],
    path: Annotated[
        Path, typer.Argument(metavar="FILE.pt2", help="The package; FILE.pt2.so and FILE.pt2.json are written beside it.")
    ],
    lengths: Annotated[str | None, typer.Option(metavar="LEAST,MOST", help="Tokens; those of the example if not given.")] = None,
    batches: Annotated[str | None, typer.Option(metavar="LEAST,MOST", help="Batch; that of the example if not given.")] = None,
    json: Json = False,
) -> None:
    """Write a package that runs where this library is not installed, from Python and from C++.

    Exit code 2 if the factory is not there or does not fit; what it raises itself keeps its traceback.
    """
    make = _factory(factory)
    made: Any = make()
    with bad_usage():
        if not (isinstance(made, tuple) and len(made) == 2):
            raise TypeError(f"{factory} must return (model or program, example inputs); got {type(made).__name__}")
        about = packages.export(
            *made,
            path,
            lengths=_range("--lengths", lengths),
            batches=_range("--batches", batches),
        )
    _print(about, json)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE.pt2", help="A package.")],
    json: Json = False,
) -> None:
    """Print what a package takes and where it runs; nothing of it is executed. Exit code 2 if it is none."""
    try:
        with bad_usage():
            about = packages.inspect(path)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    _print(about, json)


def _print(about: packages.About, json: bool) -> None:
    if json:
        print_json(about.to_json())
    else:
        typer.echo(str(about))


def _range(name: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    both = numbers(name, text)
    if len(both) != 2:
        raise typer.BadParameter(f"{name} takes LEAST,MOST, as in 1,65536; got {text!r}")
    return both[0], both[1]


def _factory(named: str) -> Callable[[], Any]:
    """The factory. A module that is not there is bad usage; what else its import raises keeps its traceback."""
    module, _, name = named.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name or "", None)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise typer.BadParameter(f"there is no module {error.name!r} here; write MODULE:FACTORY, as model:make") from None
    except ValueError:
        raise typer.BadParameter(f"write MODULE:FACTORY, as model:make; got {named!r}") from None
    if not callable(factory):
        raise typer.BadParameter(f"{module!r} has no function {name!r}; write MODULE:FACTORY, as model:make")
    return factory  # type: ignore[no-any-return]
