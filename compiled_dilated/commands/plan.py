"""`compiled-dilated plan`: how attention would be computed, and why."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from .. import compiler
from .arguments import (
    Device,
    Dtype,
    Json,
    Lowering,
    ProgramOfFunctions,
    bad_usage,
    numbers,
    print_json,
    program_of_functions,
)


def plan(
    program: ProgramOfFunctions,
    shape: Annotated[
        str, typer.Option(metavar="B,H,N,D", help="Batch, query heads, tokens, width of a head.")
    ] = "1,8,65536,64",
    kv_heads: Annotated[
        int | None, typer.Option(help="Key and value heads, a divisor of H; H if not given.")
    ] = None,
    kv_len: Annotated[int | None, typer.Option(help="Keys; N if not given.")] = None,
    value_dim: Annotated[
        int | None, typer.Option(help="Width of a value head; D if not given.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = Dtype.float32,
    device: Annotated[
        Device, typer.Option(help="Need not be there: nothing is computed.")
    ] = Device.cpu,
    training: Annotated[bool, typer.Option("--training", help="A backward will follow.")] = False,
    lowering: Annotated[
        Lowering, typer.Option(help="Used or refused, never replaced; auto takes the cheapest.")
    ] = Lowering.auto,
    q_offset: Annotated[
        int, typer.Option(help="Position of the first query, for decoding against a cache.")
    ] = 0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Print the largest batch and the longest sequence within it, as 8GiB.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Print how attention by PROGRAM would be computed, and why: candidates, pairs, FLOPs, bytes, peak memory.

    Exit code 2 if PROGRAM is none, or cannot be computed as asked.
    """
    with bad_usage():
        found = compiler.plan(
            program_of_functions(program),
            numbers("--shape", shape),
            kv_heads=kv_heads,
            kv_len=kv_len,
            value_dim=value_dim,
            dtype=getattr(torch, dtype.value),
            device=device.value,
            training=training,
            lowering=lowering.value,
            q_offset=q_offset,
            memory_limit=memory_limit,
        )
    if json:
        print_json(found.to_json())
    else:
        typer.echo(found.explain())
