"""`compiled-dilated export` and `compiled-dilated inspect`: packages from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from passes import factories

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
        Path,
        typer.Argument(
            metavar="FILE.pt2",
            help="The package; FILE.pt2.json and kernels, FILE.pt2*.so, are written beside it.",
        ),
    ],
    lengths: Annotated[
        str | None,
        typer.Option(metavar="LEAST,MOST", help="Tokens; those of the example if not given."),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(metavar="LEAST,MOST", help="Batch; that of the example if not given."),
    ] = None,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="Of a program: also an entry for queries that are the last of a cache's tokens.",
        ),
    ] = False,
    isa: Annotated[
        str | None,
        typer.Option(
            metavar="avx2|native",
            help="The instructions of the CPUs that run it; avx2 if torch can.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a package that runs where this library is not installed, from Python and from C++.

    Exit code 2 if the factory is not there or does not fit; what it raises itself keeps its traceback.
    """
    try:
        with bad_usage():
            module, name = factories.named(factory)
        make = factories.load(module, name)
    except factories.NoFactory as error:
        raise typer.BadParameter(str(error)) from None
    result = make()
    with bad_usage():
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{factory} must return (model or program, example inputs); got {type(result).__name__}"
            )
        about = packages.export(
            *result,
            path,
            lengths=_range("--lengths", lengths),
            batches=_range("--batches", batches),
            decode=decode,
            isa=isa,
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
