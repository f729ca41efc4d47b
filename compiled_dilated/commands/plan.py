"""`compiled-dilated plan`: how attention would be computed, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
import typer
from torch import Tensor

from .. import checks, compiler, counting, text
from ..heads import head_groups
from ..masks.binding import with_data
from ..masks.functions import traced_parts
from ..plans import Plan
from ..programs import Program, check_data, query_names_of
from .arguments import (
    DataFiles,
    Device,
    DtypeName,
    Json,
    LoweringName,
    ProgramOfFunctions,
    bad_usage,
    data_files,
    dtype_of,
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
    dtype: DtypeName = "float32",
    device: Annotated[
        Device, typer.Option(help="Need not be present: nothing is computed.")
    ] = Device.cpu,
    training: Annotated[bool, typer.Option("--training", help="A backward will follow.")] = False,
    lowering: LoweringName = "auto",
    q_offset: Annotated[
        int, typer.Option(help="Position of the first query, for decoding against a cache.")
    ] = 0,
    data: DataFiles = None,
    json: Json = False,
) -> None:
    """Print how attention by PROGRAM would be computed, and why.

    That is: candidates, pairs, FLOPs, bytes, time and peak memory. A plan never depends on the
    data that masks read; with --data the pairs that the data allow are counted.

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
            dtype=dtype_of(dtype),
            device=device.value,
            training=training,
            lowering=lowering,
            q_offset=q_offset,
        )
        if data:
            result = replace(result, useful_pairs=pairs_of_data(parsed, result, tensors))
    if json:
        shapes = {name: list(x.shape) for name, x in tensors.items()}
        print_json(result.to_json() | {"data": shapes})
        return
    typer.echo(result.explain())
    if data and result.useful_pairs is None:
        typer.echo("\nthe data allow too many different pairs to count in seconds")


def pairs_of_data(program: Program, plan: Plan, data: Mapping[str, Tensor]) -> int | None:
    """Count the allowed pairs of a call with these data, over batch and heads.

    data: tensors (batch or 1, tokens) by name.

    None if there are too many different ones. Raises TypeError or ValueError for data that a call
    would refuse.
    """
    problem = plan.problem
    q_end = problem.q_offset + problem.q_len
    shape = checks.Shape(problem.batch, q_end, problem.kv_len, torch.device("cpu"))
    checks.data(program.names, query_names_of(program), data, shape)
    check_data(program, data)
    # The tensors that the program's functions capture: alive until their pairs are counted.
    operands: list[Tensor] = []
    _, traced = text.traced(program, operands)
    entries = problem.batch if _differs_by_batch(traced, data) else 1
    total = 0
    for branch in traced.branches:
        for mask, heads, _ in head_groups(branch, problem.heads, problem.kv_heads):
            for entry in range(entries):
                bound = with_data(mask, data, entry)
                pairs = counting.pairs(bound, problem.q_len, problem.kv_len, problem.q_offset)
                if pairs is None:
                    return None
                total += pairs * heads.count * (problem.batch // entries)
    return total


def _differs_by_batch(program: Program, data: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a batch may allow different pairs."""
    if any(x.shape[0] > 1 for x in data.values()):
        return True
    functions = [part for branch in program.branches for part in traced_parts(branch.mask)]
    return any(function.graph.reads("b") for function in functions)
