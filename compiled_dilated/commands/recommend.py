"""`compiled-dilated recommend`: a program, a way to run it, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import fitting
from ..recommendations import Request, recommend, reports
from .arguments import Device, Dtype, Json, bad_usage, positive, print_json

Tokens = Annotated[int, typer.Option(min=1, help="Length of the sequence.")]
Memory = Annotated[
    str, typer.Option(metavar="SIZE", help="Memory for one call, of one device: 8GiB.")
]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="PROGRAM", help="A program as code, to be used if it fits; chosen if not given."
    ),
]
Causal = Annotated[
    bool, typer.Option("--causal", help="Without a pattern: tokens see earlier ones only.")
]
Seconds = Annotated[float, typer.Option(help="Longest time of a call, of one layer.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch rows.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[
    int | None, typer.Option(help="Key heads, a divisor of the query heads; as many if not given.")
]
HeadDim = Annotated[int, typer.Option(min=1, help="Width of a head.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of q, k and v.")]
DeviceOption = Annotated[Device, typer.Option(help="Need not be there: nothing is computed.")]
Training = Annotated[bool, typer.Option("--training", help="A backward follows.")]
Tflops = Annotated[
    float | None,
    typer.Option(help="Rate of dense attention there, in TFLOP/s; the measured one if not given."),
]


def recommend_program(
    tokens: Tokens,
    memory: Memory,
    pattern: Pattern = None,
    causal: Causal = False,
    seconds: Seconds = 10.0,
    batch: Batch = 1,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = Device.cpu,
    training: Training = False,
    tflops: Tflops = None,
    json: Json = False,
) -> None:
    """Recommend a program and a way to run it.

    The choice is by the memory and time that plans predict. Candidates are dense attention,
    LongNet and a window, or --pattern; ways are one call, a stream from files, and a ring.

    Exit code 1 if nothing fits, 2 if --pattern is no program.
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
            seconds=positive("--seconds", seconds, "10"),
            flops=_rate(tflops),
        )
        result = recommend(request, pattern, causal)
    if json:
        print_json(reports.to_json(result))
    else:
        typer.echo(reports.as_text(result))
    raise typer.Exit(0 if result.best is not None else 1)


def _rate(tflops: float | None) -> float | None:
    """A rate in flops a second; None for the measured one."""
    if tflops is None:
        return None
    return positive("--tflops", tflops, "400 for a GPU") * 1e12
