"""`compiled-dilated show`: a picture of a mask and its tiles."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import measure
from ..text import read_order, read_program
from . import pictures
from .arguments import Json, ProgramText, bad_usage, print_json


def show(
    program: ProgramText,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Queries, and keys.")],
    heads: Annotated[int, typer.Option(min=1, help="Heads, which masks that differ by head are dealt out to.")] = 8,
    head: Annotated[int, typer.Option(min=0, help="The head to show.")] = 0,
    tile: Annotated[int | None, typer.Option(min=1, help="Tokens a tile; chosen to be seen if not given.")] = None,
    order: Annotated[
        str | None, typer.Option(metavar="ORDER", help="'hilbert(64, 64)' or another, in place of the program's own.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The PNG to write.")] = Path("mask.png"),
    json: Json = False,
) -> None:
    """Draw what PROGRAM lets one head see, branch by branch: as text here, and as PNG.

    Up to 256 tokens every pair is drawn, past that tiles: full, partial or empty. A million tokens take a second or two.
    """
    if head >= heads:
        raise typer.BadParameter(f"--head {head} is none of {heads} heads, 0 to {heads - 1}")
    with bad_usage():
        found = read_program(program)
        chosen = None if order is None else read_order(order)
        drawn = pictures.panels(found, tokens, heads, head, tile or pictures.default_tile(tokens), chosen)
        if not drawn:
            raise ValueError(f"head {head} of {heads} takes part in no branch of {found!r}")
    # A program as the user wrote it is shorter than its repr.
    title = f"{program.strip()}, {tokens:,} tokens, head {head} of {heads}"
    measure.write(out, pictures.png(title, drawn))
    if json:
        print_json(
            {
                "program": repr(found),
                "tokens": tokens,
                "head": head,
                "heads": heads,
                "png": str(out),
                "branches": [each.to_json() for each in drawn],
            }
        )
        return
    width = shutil.get_terminal_size().columns
    for panel in drawn:
        typer.echo(pictures.text(panel, width, unicode=_speaks_unicode()) + "\n")
    typer.echo(f"wrote {out}")


def _speaks_unicode() -> bool:
    try:
        "█▒·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
