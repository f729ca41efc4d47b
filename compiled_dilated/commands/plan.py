"""`compiled-dilated plan`: how attention would be computed, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import typer
from torch import Tensor

from .. import compiler
from ..plans import Plan
from .arguments import (
    DataFiles,
    Device,
    Dtype,
    Json,
    LoweringName,
    ProgramOfFunctions,
    bad_usage,
    data_files,
    numbers,
    print_json,
    program_of_functions,
)
from .plan_with_data import counted_with_data

Shape = Annotated[
    str, typer.Option(metavar="B,H,N,D", help="Batch, query heads, tokens, width of a head.")
]
KvHeads = Annotated[
    int | None, typer.Option(help="Key and value heads, a divisor of H; H if not given.")
]
KvLength = Annotated[int | None, typer.Option(help="Keys; N if not given.")]
ValueDim = Annotated[int | None, typer.Option(help="Width of a value head; D if not given.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of q, k and v.")]
DeviceOption = Annotated[Device, typer.Option(help="Need not be present: nothing is computed.")]
Training = Annotated[bool, typer.Option("--training", help="A backward will follow.")]
QueryOffset = Annotated[
    int, typer.Option(help="Position of the first query, for decoding against a cache.")
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Print the largest batch and the longest sequence within it, as 8GiB."
    ),
]


def plan(
    program: ProgramOfFunctions,
    shape: Shape = "1,8,65536,64",
    kv_heads: KvHeads = None,
    kv_len: KvLength = None,
    value_dim: ValueDim = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = Device.cpu,
    training: Training = False,
    lowering: LoweringName = "auto",
    q_offset: QueryOffset = 0,
    data: DataFiles = None,
    memory_limit: MemoryLimit = None,
    json: Json = False,
) -> None:
    """Print how attention by PROGRAM would be computed, and why.

    That is: candidates, pairs, FLOPs, bytes, time and peak memory. The choice never depends on the
    data that masks read; with --data pairs, tiles and work are those of a call with these data.

    Exit code 2 if PROGRAM is none, cannot be computed as requested, or the data do not fit it.
    """
    with bad_usage():
        parsed = program_of_functions(program)
        tensors = data_files(data, parsed.names) if data else {}
        result = compiler.plan(
            parsed,
            numbers("--shape", shape),
            kv_heads=kv_heads,
            kv_len=kv_len,
            value_dim=value_dim,
            dtype=getattr(torch, dtype),
            device=device.value,
            training=training,
            lowering=lowering,
            q_offset=q_offset,
            memory_limit=memory_limit,
        )
        if data:
            result = counted_with_data(parsed, result, tensors)
    _print(result, tensors, json)


def _print(result: Plan, data: Mapping[str, Tensor], json: bool) -> None:
    """Print a plan, for the data if there are any."""
    if json:
        shapes = {name: list(x.shape) for name, x in data.items()}
        print_json(result.to_json() | {"data": shapes})
        return
    typer.echo(result.explain())
    if data and result.useful_pairs is None:
        typer.echo("\nthe data allow too many different pairs to count in seconds")
