"""`compiled-dilated export` and `compiled-dilated inspect`: packages from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from passes import factories

from .. import packages
from .arguments import Json, bad_usage, numbers, print_json

Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A function without arguments that returns (model or program, example inputs); "
        "MODULE as `python -m` finds it.",
    ),
]
PackagePath = Annotated[
    Path,
    typer.Argument(
        metavar="FILE.pt2",
        help="The package; FILE.pt2.json and kernels, FILE.pt2*.so, are written beside it.",
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(metavar="LEAST,MOST", help="Tokens; those of the example if not given."),
]
Batches = Annotated[
    str | None,
    typer.Option(metavar="LEAST,MOST", help="Batch; that of the example if not given."),
]
Decode = Annotated[
    bool,
    typer.Option(
        "--decode",
        help="Of a program: also an entry for queries that are the last of a cache's tokens.",
    ),
]
Isa = Annotated[
    str | None,
    typer.Option(
        metavar="avx2|native", help="The instructions of the CPUs that run it; avx2 if torch can."
    ),
]


def export(
    factory: Factory,
    path: PackagePath,
    lengths: Lengths = None,
    batches: Batches = None,
    decode: Decode = False,
    isa: Isa = None,
    json: Json = False,
) -> None:
    """Write a package that runs without this library.

    It is loaded from Python or C++.

    Exit code 2 if the factory is missing or does not fit; its own errors keep their traceback.
    """
    model, inputs = _call_factory(factory)
    with bad_usage():
        about = packages.export(
            model,
            inputs,
            path,
            lengths=_range("--lengths", lengths),
            batches=_range("--batches", batches),
            decode=decode,
            isa=isa,
        )
    _print(about, json)


def _call_factory(factory: str) -> tuple[Any, Any]:
    """Call a factory, as MODULE:FACTORY: (model or program, example inputs)."""
    try:
        with bad_usage():
            module, name = factories.named(factory)
        build = factories.load(module, name)
    except factories.NoFactory as error:
        raise typer.BadParameter(str(error)) from None
    # Outside: errors of the factory keep their traceback.
    result = build()
    if not (isinstance(result, tuple) and len(result) == 2):
        raise typer.BadParameter(
            f"{factory} must return (model or program, example inputs); got {type(result).__name__}"
        )
    return result


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE.pt2", help="A package.")],
    json: Json = False,
) -> None:
    """Print a package's inputs, versions and files.

    Nothing of it is executed. Exit code 2 if FILE.pt2 is no package.
    """
    try:
        with bad_usage():
            about = packages.inspect(path)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    _print(about, json)


def _print(about: packages.About, json: bool) -> None:
    """Print a package's description."""
    if json:
        print_json(about.to_json())
    else:
        typer.echo(str(about))


def _range(name: str, text: str | None) -> tuple[int, int] | None:
    """Parse LEAST,MOST; bad usage for anything else."""
    if text is None:
        return None
    bounds = numbers(name, text)
    if len(bounds) != 2:
        raise typer.BadParameter(f"{name} takes LEAST,MOST, as in 1,65536; got {text!r}")
    return bounds[0], bounds[1]
