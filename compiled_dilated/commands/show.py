"""`compiled-dilated show`: a picture of a mask."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import pictures
from ..text import read_order
from .arguments import (
    DataFiles,
    Json,
    ProgramOfFunctions,
    bad_usage,
    data_files,
    print_json,
    program_of_functions,
)


def show(
    program: ProgramOfFunctions,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Queries, and keys.")],
    kv_len: Annotated[
        int | None, typer.Option(min=1, help="Keys, where they are not as many as queries.")
    ] = None,
    q_offset: Annotated[
        int, typer.Option(min=0, help="Position of the first query, for decoding against a cache.")
    ] = 0,
    data: DataFiles = None,
    batch: Annotated[int, typer.Option(min=0, help="The entry of the data's batch to show.")] = 0,
    heads: Annotated[
        int, typer.Option(min=1, help="Heads, which masks that differ by head are dealt out to.")
    ] = 8,
    head: Annotated[
        int | None,
        typer.Option(
            min=0, help="The head to show; up to four kinds of heads side by side if not given."
        ),
    ] = None,
    branches: Annotated[
        bool, typer.Option("--branches", help="Each branch of the head alone too.")
    ] = False,
    order: Annotated[
        str | None,
        typer.Option(
            metavar="ORDER", help="Draw in the places of 'hilbert(64, 64)' or another order."
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", dir_okay=False, help="Write a PNG (needs matplotlib)."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", dir_okay=False, help="Write an SVG.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", dir_okay=False, help="Write a page.")
    ] = None,
    json: Json = False,
) -> None:
    """Draw which keys each query sees: as text, and as files.

    Up to 256 tokens every pair is drawn; beyond, blocks of pairs by the share that is allowed.
    A million tokens take seconds.

    Exit code 2 if PROGRAM is none, or a file, a shape or a name does not fit it.
    """
    files = [
        _file(kind, path)
        for kind, path in (("png", png), ("svg", svg), ("html", html))
        if path is not None
    ]
    with bad_usage():
        parsed = program_of_functions(program)
        figure = pictures.show(
            parsed,
            tokens,
            kv_len,
            data=data_files(data, parsed.names) or None,
            head=head,
            heads=heads,
            batch=batch,
            q_offset=q_offset,
            order=None if order is None else read_order(order),
            branches=branches,
        )
    for path in files:
        try:
            figure.save(path)
        except (ImportError, OSError) as error:
            raise typer.BadParameter(str(error)) from None
    if json:
        print_json(figure.to_json() | {"files": [str(path) for path in files]})
        return
    typer.echo(figure.text(shutil.get_terminal_size().columns, unicode=_prints_unicode()))
    if files:
        typer.echo(f"\nwrote {', '.join(map(str, files))}")


def _file(kind: str, path: Path) -> Path:
    """The path of a file to write; bad usage if it is unfit."""
    if path.suffix.lower() != f".{kind}":
        raise typer.BadParameter(f"--{kind} takes a path that ends in .{kind}; got {str(path)!r}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"--{kind}: no folder {str(path.parent)!r}")
    return path


def _prints_unicode() -> bool:
    """Whether stdout's encoding has block characters."""
    try:
        "█▒·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
