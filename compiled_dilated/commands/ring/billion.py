"""`compiled-dilated ring billion`: 2**30 tokens on one machine through the schedules of 262,144 ranks, every step executed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ... import compiler, measure
from ...ring.checking import exact_row
from ...ring.sources import GeneratedSource, SampleSink
from ...text import read_program
from ..arguments import Device, Json, print_json
from .progress import stoppable, token_bar

_TOKENS_PER_RANK = 4096
# Of float32 results of unit variance sums over thousands of keys, against float64.
_MOST_ERROR = 1e-5


def billion(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sequence.")] = 2**30,
    heads: Annotated[int, typer.Option(min=1, help="Query, key and value heads.")] = 1,
    dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 16,
    program: Annotated[
        str, typer.Option(help="A program or mask as code.")
    ] = "longnet((2048, 4096, 8192), (1, 2, 4))",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="One for each 4096 tokens if not given.")
    ] = None,
    directory: Annotated[
        Path, typer.Option(file_okay=False, help="Where the journal and the checked rows are kept.")
    ] = Path("billion"),
    rows: Annotated[int, typer.Option(min=1, help="Random rows to check against float64.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of q, k, v and of the rows to check.")] = 0,
    limit_seconds: Annotated[
        float | None, typer.Option(min=0, help="Stop after the rank under way then.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where blocks are computed.")] = Device.cpu,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Compute attention over a sequence from a counter-based generator, rank by rank, and check random rows against float64.

    Nothing is extrapolated: every step of every rank is executed, and what was executed is printed. The same command goes on
    where the last one stopped. Exit code 1 if the time was up before the end or a row is wrong, 130 after Ctrl-C.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    ranks = max(1, tokens // _TOKENS_PER_RANK) if ranks is None else ranks
    with stoppable("--directory"):
        code = read_program(program)
        run = compiler.compile(code, ranks=ranks, transport="streamed", device=device.value)
        shape = (1, heads, tokens, dim)
        q, k, v = (GeneratedSource(shape, seed, stream) for stream in range(3))
        code.check(tokens, tokens)
        directory.mkdir(parents=True, exist_ok=True)
        chosen = np.random.default_rng(seed).choice(tokens, size=min(rows, tokens), replace=False)
        sink = _sink(directory, shape, [int(row) for row in chosen])
    with (
        stoppable("--directory"),
        token_bar(f"{ranks:,} ranks", tokens) as tell,
        measure.resident_peak() as peak,
    ):
        report = run(
            q,
            k,
            v,
            sink,
            journal=directory / "journal",
            limit_seconds=limit_seconds,
            on_progress=tell,
        )
        peak_bytes = peak()
    found, errors = sink.read(), []
    layout = run.schedule(q, k, v)[0].layout
    done = [
        i
        for i, row in enumerate(sink.samples)
        if next(layout.owners(range(row, row + 1))) in report.finished
    ]
    for i in done:
        wanted = exact_row(code, q, k, v, int(sink.samples[i]), dim**-0.5)
        errors.append((found[:, :, i].double() - wanted).abs().max().item())
    worst = max(errors, default=0.0)
    computed = report.tokens - report.resumed_tokens
    record: dict[str, Any] = {
        "program": repr(code), "tokens": tokens, "tokens_done": report.tokens, "tokens_computed_now": computed, "ranks": ranks,
        "heads": heads, "dim": dim, "steps": report.ledger.steps, "received_bytes": report.ledger.received_bytes,
        "most_held_bytes": report.ledger.most_held_bytes, "process_peak_bytes": peak_bytes, "seconds": report.seconds,
        "tokens_per_second": computed / report.seconds if report.seconds else 0.0, "complete": report.complete,
        "rows_checked": len(done), "most_error": worst, "ok": report.complete and worst <= _MOST_ERROR,
        "hardware": measure.hardware(),
    }  # fmt: skip
    if json:
        print_json(record)
    else:
        typer.echo(
            f"{report.tokens:,} of {tokens:,} tokens done, {computed:,} of them now: {report.ledger.steps:,} steps of "
            f"{ranks:,} ranks executed in {report.seconds:,.1f} s, {record['tokens_per_second']:,.0f} tokens/s\n"
            f"a rank held {report.ledger.most_held_bytes / 2**20:,.2f} MiB at most, "
            f"the whole process {peak_bytes / 2**20:,.0f} MiB\n"
            f"{len(done):,} random rows differ from float64 by {worst:.1e} at most"
            + ("" if report.complete else "\nthe time was up; the same command goes on")
        )
    raise typer.Exit(0 if record["ok"] else 1)


def _sink(directory: Path, shape: tuple[int, int, int, int], rows: list[int]) -> SampleSink:
    try:
        return SampleSink(directory / "rows.npy", shape, rows, torch.float32, "rows")
    except ValueError as error:
        raise ValueError(f"{error}; or name another --directory") from None
