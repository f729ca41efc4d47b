"""`compiled-dilated ring billion`: every step of 262,144 ranks' schedules on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ... import compiler, measure
from ...programs import Program
from ...ring.checking import exact_row
from ...ring.layouts import Layout
from ...ring.sources import GeneratedSource, SampleSink
from ...ring.streamed import Report
from ...text import read_program
from ..arguments import Device, Json, print_json
from . import differences
from .progress import stoppable, token_bar

_TOKENS_PER_RANK = 4096
# Largest error against float64 of float32 sums over thousands of keys of unit variance.
_MOST_ERROR = 1e-5

Tokens = Annotated[int, typer.Option(min=1, help="Length of the sequence.")]
Heads = Annotated[int, typer.Option(min=1, help="Query, key and value heads.")]
HeadDim = Annotated[int, typer.Option(min=1, help="Width of a head.")]
ProgramOption = Annotated[str, typer.Option(help="A program or mask as code.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="One for each 4096 tokens if not given.")]
Directory = Annotated[
    Path, typer.Option(file_okay=False, help="Folder of the journal and the checked rows.")
]
Rows = Annotated[int, typer.Option(min=1, help="Random rows to check against float64.")]
Seed = Annotated[int, typer.Option(min=0, help="Of q, k, v and of the rows to check.")]
LimitSeconds = Annotated[
    float | None, typer.Option(min=0, help="Start no further rank after this time.")
]
DeviceOption = Annotated[Device, typer.Option(help="Device that computes blocks.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")
]


def billion(
    tokens: Tokens = 2**30,
    heads: Heads = 1,
    dim: HeadDim = 16,
    program: ProgramOption = "longnet((2048, 4096, 8192), (1, 2, 4))",
    ranks: Ranks = None,
    directory: Directory = Path("billion"),
    rows: Rows = 1000,
    seed: Seed = 0,
    limit_seconds: LimitSeconds = None,
    device: DeviceOption = Device.cpu,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compute attention over a generated sequence, and check random rows against float64.

    Nothing is extrapolated: every step of every rank is executed, and the executed ones are
    printed. The same command continues an interrupted run.

    Exit code 1 if the time was up before the end or a row is wrong, 130 after Ctrl-C.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if ranks is None:
        ranks = max(1, tokens // _TOKENS_PER_RANK)
    # Check the arguments, and open the files.
    with stoppable("--directory"):
        code = read_program(program)
        run = compiler.compile(code, ranks=ranks, transport="streamed", device=device.value)
        shape = (1, heads, tokens, dim)
        q, k, v = (GeneratedSource(shape, seed, stream) for stream in range(3))
        code.check(tokens, tokens)
        directory.mkdir(parents=True, exist_ok=True)
        sink = _sink(directory, shape, rows, seed)
    journal = directory / "journal"
    bar = token_bar(f"{ranks:,} ranks", tokens)
    with stoppable("--directory"), bar as update, measure.resident_peak() as peak:
        report = run(
            q, k, v, sink, journal=journal, limit_seconds=limit_seconds, on_progress=update
        )
        peak_bytes = peak()
    errors = _errors(code, (q, k, v), sink, run.schedule(q, k, v)[0].layout, report)
    record = _record(code, shape, report, errors, peak_bytes)
    _print(record, json)
    raise typer.Exit(0 if record["ok"] else 1)


def _record(
    program: Program,
    shape: tuple[int, int, int, int],
    report: Report,
    errors: list[float],
    peak_bytes: int,
) -> dict[str, Any]:
    """A run as plain values.

    shape: of q, (1, heads, tokens, dim).
    errors: the largest error of each checked row.
    peak_bytes: of the process.
    """
    _, heads, tokens, dim = shape
    computed, ledger = report.tokens - report.resumed_tokens, report.ledger
    rate = 0.0
    if report.seconds:
        rate = computed / report.seconds
    # Python's max would lose a NaN.
    worst = float(np.max(errors, initial=0.0))
    return {
        "program": repr(program), "tokens": tokens, "tokens_done": report.tokens,
        "tokens_computed_now": computed, "ranks": report.ranks, "heads": heads, "dim": dim,
        "steps": ledger.steps, "received_bytes": ledger.received_bytes,
        "most_held_bytes": ledger.most_held_bytes, "process_peak_bytes": peak_bytes,
        "seconds": report.seconds, "tokens_per_second": rate,
        "complete": report.complete, "rows_checked": len(errors),
        "most_error": differences.as_json(worst), "ok": report.complete and worst <= _MOST_ERROR,
        "hardware": measure.hardware(),
    }  # fmt: skip


def _sink(directory: Path, shape: tuple[int, int, int, int], rows: int, seed: int) -> SampleSink:
    """A file of random rows of the output.

    Raises ValueError if the folder has the rows of another run.
    """
    tokens = shape[2]
    samples = np.random.default_rng(seed).choice(tokens, size=min(rows, tokens), replace=False)
    try:
        return SampleSink(directory / "rows.npy", shape, samples.tolist(), torch.float32, "rows")
    except ValueError as error:
        raise ValueError(f"{error}; or name another --directory") from None


def _errors(
    program: Program,
    sources: tuple[GeneratedSource, GeneratedSource, GeneratedSource],
    sink: SampleSink,
    layout: Layout,
    report: Report,
) -> list[float]:
    """The largest error against float64 of each sampled row that is computed.

    sources: q, k and v.
    layout: which rank computes which row.
    """
    rows = sink.read()
    scale = sources[0].shape[3] ** -0.5
    errors = []
    for index, row in enumerate(sink.samples):
        owner = next(layout.owners(range(row, row + 1)))
        if owner not in report.finished:
            continue
        expected = exact_row(program, *sources, int(row), scale)
        errors.append((rows[:, :, index].double() - expected).abs().max().item())
    return errors


def _print(record: dict[str, Any], json: bool) -> None:
    """Print the record of a run."""
    if json:
        print_json(record)
    else:
        typer.echo(_as_text(record))


def _as_text(record: dict[str, Any]) -> str:
    """A record of a run as text."""
    lines = [
        f"{record['tokens_done']:,} of {record['tokens']:,} tokens done, "
        f"{record['tokens_computed_now']:,} of them now: {record['steps']:,} steps of "
        f"{record['ranks']:,} ranks executed in {record['seconds']:,.1f} s, "
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"a rank held {record['most_held_bytes'] / 2**20:,.2f} MiB at most, "
        f"the whole process {record['process_peak_bytes'] / 2**20:,.0f} MiB",
        f"{record['rows_checked']:,} random rows differ from float64 "
        f"{differences.as_text(record['most_error'])}",
    ]
    if not record["complete"]:
        lines.append("the time was up; the same command goes on")
    return "\n".join(lines)
