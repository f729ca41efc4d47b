"""`compiled-dilated show`: a picture of a mask."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
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

Tokens = Annotated[int, typer.Option("--tokens", "-n", min=1, help="Queries, and keys.")]
KvLength = Annotated[
    int | None, typer.Option(min=1, help="Keys, where they are not as many as queries.")
]
QueryOffset = Annotated[
    int, typer.Option(min=0, help="Position of the first query, for decoding against a cache.")
]
Batch = Annotated[int, typer.Option(min=0, help="The entry of the data's batch to show.")]
Heads = Annotated[
    int, typer.Option(min=1, help="Heads, which masks that differ by head are dealt out to.")
]
Head = Annotated[
    int | None,
    typer.Option(
        min=0, help="The head to show; up to four kinds of heads side by side if not given."
    ),
]
Branches = Annotated[bool, typer.Option("--branches", help="Each branch of the head alone too.")]
OrderText = Annotated[
    str | None,
    typer.Option(metavar="ORDER", help="Draw in the places of 'hilbert(64, 64)' or another order."),
]
PngFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", dir_okay=False, help="Write a PNG (needs matplotlib)."),
]
SvgFile = Annotated[
    Path | None, typer.Option(metavar="FILE.svg", dir_okay=False, help="Write an SVG.")
]
HtmlFile = Annotated[
    Path | None, typer.Option(metavar="FILE.html", dir_okay=False, help="Write a page.")
]


def show(
    program: ProgramOfFunctions,
    tokens: Tokens,
    kv_len: KvLength = None,
    q_offset: QueryOffset = 0,
    data: DataFiles = None,
    batch: Batch = 0,
    heads: Heads = 8,
    head: Head = None,
    branches: Branches = False,
    order: OrderText = None,
    png: PngFile = None,
    svg: SvgFile = None,
    html: HtmlFile = None,
    json: Json = False,
) -> None:
    """Draw which keys each query sees: as text, and as files.

    Up to 256 tokens every pair is drawn; beyond, blocks of pairs by the share that is allowed.
    A million tokens take seconds.

    Exit code 2 if PROGRAM is none, or a file, a shape or a name does not fit it.
    """
    files = _files(png=png, svg=svg, html=html)
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
    _save(figure, files)
    _print(figure, files, json)


def _files(**paths: Path | None) -> list[Path]:
    """The files to write; bad usage if one is unfit.

    paths: by the names of their options.
    """
    files = []
    for kind, path in paths.items():
        if path is None:
            continue
        if path.suffix.lower() != f".{kind}":
            raise typer.BadParameter(
                f"--{kind} takes a path that ends in .{kind}; got {str(path)!r}"
            )
        if not path.parent.is_dir():
            raise typer.BadParameter(f"--{kind}: no folder {str(path.parent)!r}")
        files.append(path)
    return files


def _save(figure: pictures.Figure, files: Sequence[Path]) -> None:
    """Write a figure to files; bad usage if one cannot be written."""
    for path in files:
        try:
            figure.save(path)
        except (ImportError, OSError) as error:
            raise typer.BadParameter(str(error)) from None


def _print(figure: pictures.Figure, files: Sequence[Path], json: bool) -> None:
    """Print a figure as text, or its captions as JSON."""
    if json:
        print_json(figure.to_json() | {"files": [str(path) for path in files]})
        return
    typer.echo(figure.text(shutil.get_terminal_size().columns, unicode=_prints_unicode()))
    if files:
        typer.echo(f"\nwrote {', '.join(map(str, files))}")


def _prints_unicode() -> bool:
    """Whether stdout's encoding has block characters."""
    try:
        "█▒·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
