"""Arguments that commands share, and errors that end a command."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from passes import factories

from .. import planner
from ..programs import Program
from ..text import read_program

ProgramText = Annotated[
    str,
    typer.Argument(
        metavar="PROGRAM",
        help="A program or mask as code: 'longnet((2048, 4096), (1, 2), causal=True)', "
        "'causal() & (window(256) | sinks(4))'.",
    ),
]
# For commands that accept functions too.
ProgramOfFunctions = Annotated[
    str,
    typer.Argument(
        metavar="PROGRAM",
        help="A program or mask as code: 'causal() & (window(256) | sinks(4))'. A mask_mod by "
        "module and name: \"from_mod('my_masks:checkered', within=window(256))\".",
    ),
]
DataFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=FILE.npy",
        help="A tensor that masks read, (batch, tokens) or (tokens); repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
# Names are checked by the library, which has the list; its error is bad usage.
LoweringName = Annotated[
    str,
    typer.Option(
        "--lowering",
        metavar="|".join(planner.LOWERINGS),
        help="Used or refused, never replaced; auto takes the cheapest.",
    ),
]


class Dtype(StrEnum):
    """Dtype of q, k, v and out."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Device(StrEnum):
    """Type of the device that computes attention."""

    cpu = "cpu"
    cuda = "cuda"


@contextlib.contextmanager
def bad_usage() -> Iterator[None]:
    """Turn the library's errors into bad usage: exit code 2, no traceback."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def program_of_functions(text: str) -> Program:
    """Parse a program, importing the functions that it names."""
    return read_program(text, _function_named)


def _function_named(target: str) -> Any:
    """Import the function that 'MODULE:FUNCTION' names."""
    usage = "from_mod takes 'MODULE:FUNCTION' here, as from_mod('my_masks:checkered')"
    if not isinstance(target, str):
        raise TypeError(f"{usage}; got {target!r}")
    try:
        return factories.load(*factories.named(target))
    except factories.NoFactory as error:
        raise ValueError(str(error).removeprefix("MODULE:FACTORY must name a function; ")) from None
    except ValueError:
        raise ValueError(f"{usage}; got {target!r}") from None


def data_files(entries: list[str] | None, names: Sequence[str]) -> dict[str, Tensor]:
    """Load the arrays of `--data`, (batch, tokens), by name.

    entries: NAME=FILE.npy each.
    names: the data tensors that the program reads; all are required.

    Raises bad usage for a file without such an array.
    """
    tensors: dict[str, Tensor] = {}
    for entry in entries or ():
        name, separator, path = entry.partition("=")
        if not (name and separator and path):
            raise typer.BadParameter(
                f"--data takes NAME=FILE.npy, as documents=ids.npy; got {entry!r}"
            )
        if name in tensors:
            raise typer.BadParameter(f"--data names {name!r} twice")
        tensors[name] = _loaded(name, path)
    # Exactly the program's tensors: a superfluous one would be ignored.
    if set(tensors) != set(names):
        reads = "reads no data"
        if names:
            reads = f"reads {', '.join(names)}"
        raise typer.BadParameter(
            f"the program {reads}; got --data for {', '.join(tensors) or 'nothing'}. "
            "Pass --data NAME=FILE.npy for exactly those"
        )
    return tensors


def _loaded(name: str, path: str) -> Tensor:
    """The array of a file, (batch, tokens)."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise typer.BadParameter(f"--data {name}: no file {path!r}") from None
    except (OSError, ValueError, EOFError):
        raise typer.BadParameter(
            f"--data {name}: {path!r} is no array of numbers that numpy.save wrote"
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2):
        content = "an archive of several arrays"
        if isinstance(array, np.ndarray):
            content = f"shape {array.shape}"
        raise typer.BadParameter(
            f"--data {name}: {path!r} must hold (batch, tokens) or (tokens); got {content}"
        )
    # torch has no dtype for strings, objects and dates.
    try:
        return torch.from_numpy(np.atleast_2d(array))
    except TypeError:
        raise typer.BadParameter(
            f"--data {name}: {path!r} must hold integers or bools; got {array.dtype}"
        ) from None


def print_json(record: Mapping[str, Any]) -> None:
    """Print a record as JSON, the only output on stdout."""
    typer.echo(json.dumps(record, indent=1, allow_nan=False))


def positive(name: str, number: float, example: str) -> float:
    """A time or a rate of an option.

    NaN passes the bounds of typer's options, and overflow at the ends of floats is no JSON.

    name: of the option.
    number: seconds, or TFLOP/s.
    example: a right number and what it is for.

    Raises ValueError outside of 1e-9 to 1e9.
    """
    if not 1e-9 <= number <= 1e9:
        raise ValueError(f"{name} must be above 0, from 1e-9 to 1e9, as {example}; got {number:g}")
    return number


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Parse '1,8,65536,64'; bad usage for anything else."""
    try:
        # int() accepts the digits of every script.
        return tuple(int(number.encode("ascii")) for number in text.replace("_", "").split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{name} takes integers joined by commas, as in 1,8,65536,64; got {text!r}"
        ) from None
