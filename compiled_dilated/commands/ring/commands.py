"""`compiled-dilated ring`: a program over many ranks, planned, simulated, streamed or launched."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ... import compiler, measure
from ...ring.plans import LAYOUTS
from ...ring.sources import FileSource
from ...ring.streamed import Report
from ...text import read_program
from ..arguments import Dtype, Json, ProgramText, bad_usage, numbers, print_json
from . import differences, processes
from .billion import billion
from .progress import stoppable, token_bar

app = typer.Typer(
    help="Attention over many ranks: plan, simulate, stream, launch.",
    no_args_is_help=True,
)
app.command()(billion)

Shape = Annotated[
    str,
    typer.Option(
        metavar="B,H,N,D", help="Batch, query heads, tokens of all ranks, width of a head."
    ),
]
KvHeads = Annotated[
    int | None, typer.Option(help="Key and value heads, a divisor of H; H if not given.")
]
Ranks = Annotated[int, typer.Option(min=1, help="How many ranks share the sequence.")]
LayoutName = Annotated[
    str, typer.Option(help=f"Which tokens each rank holds: {', '.join(LAYOUTS)}.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Of q, k and v.")]
OutputFile = Annotated[
    Path, typer.Argument(dir_okay=False, help="The output, a .npy file; new, or continued.")
]
Parts = Annotated[
    int, typer.Option(min=1, help="Parts of the sequence; one or two are in memory at a time.")
]
JournalFile = Annotated[
    Path | None, typer.Option(help="Record of finished parts; OUT.journal if not given.")
]
LimitSeconds = Annotated[
    float | None, typer.Option(min=0, help="Start no further part after this time.")
]


@app.command()
def plan(
    program: ProgramText,
    shape: Shape = "1,8,65536,64",
    kv_heads: KvHeads = None,
    ranks: Ranks = 8,
    layout: LayoutName = "auto",
    dtype: DtypeOption = Dtype.float32,
    json: Json = False,
) -> None:
    """Print what each rank would receive, compute and hold, under every layout."""
    with bad_usage():
        result = compiler.plan(
            read_program(program),
            numbers("--shape", shape),
            kv_heads,
            dtype=getattr(torch, dtype),
            ranks=ranks,
            layout=layout,
        )
    if json:
        print_json(result.to_json())
    else:
        typer.echo(result.explain())


@app.command()
def simulate(
    program: ProgramText,
    shape: Shape = "1,8,16384,64",
    kv_heads: KvHeads = None,
    ranks: Ranks = 8,
    layout: LayoutName = "auto",
    dtype: DtypeOption = Dtype.float32,
    json: Json = False,
) -> None:
    """Execute all steps of all ranks here, and compare with one device.

    Inputs are random numbers.

    Exit code 1 if the results differ by more than rounding.
    """
    with bad_usage():
        code, sizes = read_program(program), numbers("--shape", shape)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        ring_plan = compiler.plan(
            code, sizes, kv_heads, dtype=torch_dtype, ranks=ranks, layout=layout
        )
        ring, alone = compiler.compile(code, ranks=ranks, layout=layout), compiler.compile(code)
    random = torch.Generator().manual_seed(0)
    kv_shape = (sizes[0], kv_heads or sizes[1], *sizes[2:])
    q, k, v = (
        torch.randn(size, generator=random).to(torch_dtype) for size in (sizes, kv_shape, kv_shape)
    )
    with torch.no_grad():
        results: list[torch.Tensor] = []
        seconds = measure.timed(lambda: results.append(ring(q, k, v)))
        error = (results[0].double() - alone(q, k, v).double()).abs().max().item()
    assert ring.ring is not None
    ledger = ring.ring.ledger
    record: dict[str, Any] = {
        "layout": ring_plan.schedule.layout.name, "ranks": ranks, "steps": ledger.steps,
        "messages": ledger.messages, "received_bytes": ledger.received_bytes,
        "most_held_bytes": ledger.most_held_bytes, "seconds": seconds,
        "most_difference": differences.as_json(error),
        "ok": error <= 4 * torch.finfo(torch_dtype).eps * 8,
    }  # fmt: skip
    if json:
        print_json(record)
    else:
        typer.echo(_simulated_text(record))
    raise typer.Exit(0 if record["ok"] else 1)


def _simulated_text(record: dict[str, Any]) -> str:
    """A record of `simulate` as text."""
    ranks = record["ranks"]
    verdict = "NOT THE SAME AS"
    if record["ok"]:
        verdict = "the same as"
    return (
        f"{ranks} ranks, {record['layout']}: {record['steps']} steps executed "
        f"(a plain ring takes {ranks * ranks}), {record['received_bytes'] / 2**20:,.2f} MiB "
        f"received in {record['messages']} messages, at most "
        f"{record['most_held_bytes'] / 2**20:,.2f} MiB held by a rank; {record['seconds']:.2f} s\n"
        f"{verdict} one device: they differ {differences.as_text(record['most_difference'])}"
    )


@app.command()
def stream(
    program: ProgramText,
    q: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Queries, a .npy file (B, H, N, D).")
    ],
    k: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Keys, a .npy file (B, Hkv, N, D).")
    ],
    v: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="Values, a .npy file (B, Hkv, N, Dv)."),
    ],
    out: OutputFile,
    ranks: Parts = 16,
    journal: JournalFile = None,
    limit_seconds: LimitSeconds = None,
    json: Json = False,
) -> None:
    """Compute attention from files to a file, part by part.

    The same command continues an interrupted run.

    Exit code 1 if the time was up before the end, 130 after Ctrl-C.
    """
    if journal is None:
        journal = out.with_name(out.name + ".journal")
    with stoppable("--journal"):
        run = compiler.compile(read_program(program), ranks=ranks, transport="streamed")
        queries = FileSource(q, "q")
        with token_bar(q.name, queries.shape[2]) as update:
            report = run(
                queries, k, v, out, journal=journal, limit_seconds=limit_seconds, on_progress=update
            )
    if json:
        print_json(as_record(report))
    else:
        typer.echo(as_text(report, out, journal))
    raise typer.Exit(0 if report.complete else 1)


def as_record(report: Report) -> dict[str, Any]:
    """A report as plain values."""
    ledger = report.ledger
    return {
        "tokens": report.tokens, "ranks": report.ranks, "resumed_ranks": report.resumed_ranks,
        "torn": list(report.torn), "seconds": report.seconds, "complete": report.complete,
        "steps": ledger.steps, "received_bytes": ledger.received_bytes,
        "most_held_bytes": ledger.most_held_bytes,
    }  # fmt: skip


def as_text(report: Report, out: Path, journal: Path) -> str:
    """A report in a few lines."""
    lines = [f"{out}: {report.tokens:,} tokens, {report.seconds:.1f} s"]
    if report.resumed_ranks:
        lines.append(f"{report.resumed_ranks} of {report.ranks} parts were done before")
    if report.torn:
        lines.append(
            f"parts {list(report.torn)} were not on the disk as they had been written, "
            "and were computed again"
        )
    lines.append(f"a part held {report.ledger.most_held_bytes / 2**20:,.2f} MiB at most")
    if not report.complete:
        lines.append(f"the time was up; the same command goes on ({journal})")
    return "\n".join(lines)


@app.command()
def launch(
    program: ProgramText,
    shape: Shape = "1,8,16384,64",
    kv_heads: KvHeads = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 2,
    layout: LayoutName = "auto",
    dtype: DtypeOption = Dtype.float32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    json: Json = False,
) -> None:
    """Run one process per rank, and compare with the simulated ring.

    The processes are started by torchrun and exchange messages over gloo.

    Exit code 1 if a bit of the output or of a gradient differs, or a process fails, 130 after
    Ctrl-C.
    """
    # Checked here once, instead of by every process.
    with bad_usage():
        compiler.plan(
            read_program(program),
            numbers("--shape", shape),
            kv_heads,
            dtype=getattr(torch, dtype),
            ranks=ranks,
            layout=layout,
        )
    torchrun = ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "--no-python"]
    style = "json" if json else "text"
    settings = [program, shape, str(kv_heads or 0), layout, dtype.value, style]
    rank = [sys.executable, "-m", f"{__package__}.rank", *settings]
    command = [sys.executable, "-m", *torchrun, *rank]
    try:
        code = processes.run(command, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(0 if code == 0 else 1)
