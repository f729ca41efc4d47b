"""`compiled-dilated recommend`: which program to use, and how to run it, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import fitting
from ..recommendations import Request, recommend, reports
from .arguments import Device, Dtype, Json, bad_usage, print_json


def recommend_program(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sequence.")],
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for one call, of one device: 8GiB.")
    ],
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="PROGRAM", help="A program as code, to be used if it fits; chosen if not given."
        ),
    ] = None,
    causal: Annotated[
        bool, typer.Option("--causal", help="Without a pattern: tokens see earlier ones only.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0, help="Longest time of a call, of one layer.")
    ] = 10.0,
    batch: Annotated[int, typer.Option(min=1, help="Batch rows.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None,
        typer.Option(help="Key heads, a divisor of the query heads; as many if not given."),
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = Dtype.float32,
    device: Annotated[
        Device, typer.Option(help="Need not be there: nothing is computed.")
    ] = Device.cpu,
    training: Annotated[bool, typer.Option("--training", help="A backward follows.")] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0, help="Rate of dense attention there, in TFLOP/s; the measured one if not given."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Recommend a program and a way to run it, by the memory and time that plans predict.

    Candidates are dense attention, LongNet and a window, or --pattern; ways are one call, a stream
    from files, and a ring. Exit code 1 if nothing fits, 2 if --pattern is no program.
    """
    with bad_usage():
        request = Request(
            tokens=tokens,
            limit=fitting.read_limit("--memory", memory),
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype.value,
            device=device.value,
            training=training,
            seconds=seconds,
            flops=None if tflops is None else _rate(tflops),
        )
        result = recommend(request, pattern, causal)
    if json:
        print_json(reports.to_json(result))
    else:
        typer.echo(reports.as_text(result))
    raise typer.Exit(0 if result.best is not None else 1)


def _rate(tflops: float) -> float:
    if tflops == 0:
        raise ValueError("--tflops must be above 0, as 400 for a GPU; got 0")
    return tflops * 1e12
