"""`compiled-dilated bench`: how fast attention is, against dense SDPA and compiled FlexAttention in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import measure
from .arguments import Device, Dtype
from .bench_cases import Setup
from .bench_measuring import Measurement, Row, measurements
from .bench_tables import met, tables


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter sequences, fewer turns: under a minute.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only measurements whose name holds this text; may be repeated.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="float32 on a CPU, bfloat16 on a GPU if not given.")] = None,
    device: Annotated[Device, typer.Option(help="What to measure on.")] = Device.cpu,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    list_: Annotated[bool, typer.Option("--list", help="Print the names of the measurements and stop.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a required figure is missed.")] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="OUT", dir_okay=False, help="Write all figures, with the hardware, here.")
    ] = None,
) -> None:
    """Measure attention against dense SDPA and compiled FlexAttention: under ten minutes on two cores that do nothing else.

    The figures required are for float32 on a CPU; elsewhere figures are reported and not judged.
    """
    chosen = [each for each in measurements(quick) if not case or any(text in each.name for text in case)]
    if not chosen:
        raise typer.BadParameter(f"no measurement's name holds {' or '.join(map(repr, case or []))}; see --list")
    if list_:
        typer.echo("\n".join(each.name for each in chosen))
        return
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda: torch {torch.__version__} finds no GPU; see compiled-dilated doctor")
    torch.set_num_threads(threads)
    gpu = device is Device.cuda
    setup = Setup(
        dtype=dtype.value if dtype else "bfloat16" if gpu else "float32",
        device=device.value,
        dense_tokens=2**14 if gpu else 2**12,
        repeats=3 if quick else 21 if gpu else 7,
        seconds=1.0 if quick else 15.0,
    )
    record: dict[str, Any] = {
        "hardware": measure.hardware(),
        "setup": asdict(setup),
        "quick": quick,
        "complete": False,
        "rows": [],
    }
    for name, rows in _progress(chosen, setup):
        record["rows"] += [{"table": name, **row} for row in rows]
        record["complete"] = len({row["case"] for row in record["rows"]}) == len(chosen)
        if json:
            measure.write_json(json, record)
    typer.echo(tables(record["rows"]))
    missed = [row["case"] for row in record["rows"] if not met(row)]
    if missed:
        typer.echo(f"\nmissed: {', '.join(dict.fromkeys(missed))}")
    raise typer.Exit(1 if check and missed else 0)


def _progress(chosen: list[Measurement], setup: Setup) -> Iterator[tuple[str, list[Row]]]:
    """Runs the measurements, the one at work named on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for each in chosen:
            progress.update(task, description=each.name)
            yield each.table, each.run(setup)
            progress.advance(task)
