"""What the commands share: arguments that are read alike, errors that end a command."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

ProgramText = Annotated[
    str,
    typer.Argument(
        metavar="PROGRAM",
        help="A program or mask as code: 'longnet((2048, 4096), (1, 2), causal=True)', 'causal() & (window(256) | sinks(4))'.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class Dtype(StrEnum):
    """Of q, k, v and out."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Lowering(StrEnum):
    """How attention is computed."""

    auto = "auto"
    native = "native"
    dense = "dense"
    strided = "strided"
    tiled = "tiled"
    flex = "flex"
    lanes = "lanes"


class Device(StrEnum):
    """What attention runs on."""

    cpu = "cpu"
    cuda = "cuda"


@contextlib.contextmanager
def bad_usage() -> Iterator[None]:
    """What the library refuses is bad usage here: its message and exit code 2, no traceback."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def print_json(record: Mapping[str, Any]) -> None:
    """The one thing on stdout of a command run with --json."""
    typer.echo(json.dumps(record, indent=1))


def numbers(name: str, text: str) -> tuple[int, ...]:
    """'1,8,65536,64' as a tuple; bad usage for anything else."""
    try:
        # int() takes the digits of every script.
        return tuple(int(number.encode("ascii")) for number in text.replace("_", "").split(","))
    except ValueError:
        raise typer.BadParameter(f"{name} takes integers joined by commas, as in 1,8,65536,64; got {text!r}") from None
