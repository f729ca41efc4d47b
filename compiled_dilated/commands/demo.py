"""`compiled-dilated demo`: a small language model with 8K context, trained here and now, and what its attention is worth."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import measure
from ..attend import plan
from ..programs import longnet
from . import pictures
from .arguments import Json, bad_usage, print_json
from .demo_comparison import Cell, Check, check, compare
from .demo_model import LanguageModel
from .demo_text import Text, read
from .demo_training import Training, continuation, train

_SEED = 0
# What the loss must fall below, as a share of the unigram entropy.
_WELL_BELOW = 0.75
_CHECKED_TOKENS = 1200
_PROMPT = b'def main():\n    """'
_SAMPLED_BYTES = 300


@dataclass(frozen=True)
class Scale:
    """How large everything is, and how the time is dealt out: shares of --seconds for training and for the table."""

    context: int
    width: int
    layers: int
    heads: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    must_fall_to: float
    sampled_bytes: int
    compared_tokens: tuple[int, ...]
    with_flex: bool
    seconds: float
    training_share: float = 0.6
    table_share: float = 0.25


FULL = Scale(
    8192, 128, 3, 4, (512, 2048, 8192), (1, 2, 4), _WELL_BELOW, _SAMPLED_BYTES, (4096, 16384, 65536), with_flex=True, seconds=200
)  # fmt: skip
QUICK = Scale(
    1024, 64, 2, 4, (128, 512, 1024), (1, 2, 4), 1.0, 40, (1024, 4096), with_flex=False, seconds=9
)  # fmt: skip
# The table's program, at the width of the library's benchmark.
COMPARED = (2048, 4096, 8192), (1, 2, 4)
COMPARED_HEADS, COMPARED_HEAD_DIM = 8, 64


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", file_okay=False, help="Folder for mask.png, loss.png and summary.json.")
    ] = Path("demo-out"),
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="About how long all of it may take; 200, or 9 with --quick.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model and shorter sequences, to see that it works.")] = False,
    text: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of .py files to learn; the standard library.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a small byte-level language model on real text, check its attention, and compare it, in a few minutes.

    Exit code 1 if attention differs from the float64 reference, or the loss does not fall well below the unigram entropy.
    """
    scale = QUICK if quick else FULL
    seconds = seconds or scale.seconds
    say: Callable[[str], None] = (lambda line: typer.echo(line, err=True)) if json else typer.echo
    started = time.perf_counter()
    random = torch.Generator().manual_seed(_SEED)
    torch.manual_seed(_SEED)
    program = longnet(scale.segment_lengths, scale.dilation_rates, causal=True)
    hardware = measure.hardware()
    say(f"{hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}, Python {hardware['python']}\n")

    with bad_usage():
        source = read(text)
    say(
        f"text      {source.files:,} files of {source.folder}: {len(source.training):,} bytes, {len(source.validation):,} more held out"
    )
    say(f"          unigram entropy {source.unigram_bits:.3f} bits a byte\n")
    model = LanguageModel(program, scale.width, scale.heads, scale.layers)
    shape = (1, scale.heads, scale.context, scale.width // scale.heads)
    say(plan(program, shape, training=True).explain() + "\n")

    training = _train(model, source, scale, seconds * scale.training_share, random, say)
    learned = training.held_out_bits <= scale.must_fall_to * source.unigram_bits
    _say_training(training, source, scale, learned, say)
    sample = continuation(model, _PROMPT, scale.sampled_bytes, random).decode(errors="replace")
    say("sample    " + (_PROMPT.decode() + sample).replace("\n", "\n          ") + "\n")

    window = source.held_out(_CHECKED_TOKENS, 1)[:, :-1]
    checked = check(program, *model.first_projection(window))
    _say_check(checked, say)
    cells = _compare(scale, seconds * scale.table_share, say)

    measure.write(out / "mask.png", _mask_picture(scale))
    measure.write(out / "loss.png", _loss_picture(training, source))
    ok = checked.ok and learned
    record = {
        "ok": ok,
        "seconds": time.perf_counter() - started,
        "hardware": hardware,
        "scale": asdict(scale),
        "program": repr(program),
        "text": {"folder": source.folder, "files": source.files, "bytes": len(source.training), "unigram_bits": source.unigram_bits},
        "training": {
            **asdict(training), "steps": len(training.losses), "tokens_per_second": training.tokens_per_second,
            "held_out_bits": training.held_out_bits, "learned": learned,
        },
        "sample": sample,
        "check": asdict(checked) | {"ok": checked.ok},
        "comparison": {"program": _code(*COMPARED), "heads": COMPARED_HEADS, "head_dim": COMPARED_HEAD_DIM, "cells": [asdict(cell) for cell in cells]},
    }  # fmt: skip
    measure.write_json(out / "summary.json", record)
    say(f"wrote     {out / 'mask.png'}, {out / 'loss.png'}, {out / 'summary.json'}")
    say(f"{'passed' if ok else 'FAILED'} in {record['seconds']:.0f} s")
    if json:
        print_json(record)
    raise typer.Exit(0 if ok else 1)


def _train(
    model: LanguageModel, text: Text, scale: Scale, seconds: float, random: torch.Generator, say: Callable[[str], None]
) -> Training:
    """Trains with a bar on stderr, and a line now and then that stays."""
    with _bar("training", seconds) as (advance, line):
        said = 0

        def report(training: Training) -> None:
            nonlocal said
            bits = training.losses[-1] / math.log(2)
            advance(training.seconds, f"step {len(training.losses)}, {bits:.2f} bits a byte")
            if training.seconds >= seconds * (said + 1) / 8:
                said = int(8 * training.seconds / seconds)
                line(f"          {training.seconds:4.0f} s  step {len(training.losses):4}  {bits:.2f} bits a byte")

        return train(model, text, scale.context, seconds, random, report)


@contextmanager
def _bar(name: str, total: float) -> Iterator[tuple[Callable[[float, str], None], Callable[[str], None]]]:
    """A progress bar on stderr: (advance(done, description), line that stays)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield (
            lambda done, description: progress.update(task, completed=done, description=f"{name}: {description}"),
            lambda line: progress.console.print(line, markup=False, highlight=False),
        )


def _say_training(training: Training, text: Text, scale: Scale, learned: bool, say: Callable[[str], None]) -> None:
    say(
        f"trained   {training.parameters:,} parameters, {len(training.losses)} steps of {scale.context:,} bytes in {training.seconds:.0f} s: "
        f"{training.tokens_per_second:,.0f} tokens/s, at most {training.peak_bytes / 2**20:,.0f} MiB of memory in all"
    )
    say(
        f"loss      {training.held_out_bits:.3f} bits a byte ({training.held_out_nats:.3f} nats) on held-out files, unigram entropy {text.unigram_bits:.3f}: "
        + (f"at or below {scale.must_fall_to:.0%} of it\n" if learned else f"NOT at or below {scale.must_fall_to:.0%} of it\n")
    )


def _say_check(checked: Check, say: Callable[[str], None]) -> None:
    say(
        f"check     the first layer's attention on {checked.tokens:,} bytes of held-out text, against the float64 reference: "
        f"{'passed' if checked.ok else 'FAILED'}"
    )
    say(
        f"          largest error {checked.error:.1e}, at most {checked.most_error:.1e} allowed (twice that of dense SDPA and one rounding)"
    )
    say(f"          of the gradients {checked.gradient_error:.1e}, at most {checked.most_gradient_error:.1e}\n")


def _compare(scale: Scale, seconds: float, say: Callable[[str], None]) -> list[Cell]:
    """The table, measured with a bar that names what is measured."""
    from tabulate import tabulate

    cells: list[Cell] = []
    total = 3 * len(scale.compared_tokens)
    with _bar("one call", total) as (advance, _):
        for cell in compare(
            longnet(*COMPARED, causal=True), scale.compared_tokens, COMPARED_HEADS, COMPARED_HEAD_DIM, seconds, scale.with_flex
        ):
            cells.append(cell)
            advance(len(cells), f"{cell.system} at {cell.tokens:,} tokens")
    headers = ["tokens", "attention", "ms", "useful GFLOP/s", "MiB beyond q, k, v", ""]
    say(f"one call of {_code(*COMPARED)}, {COMPARED_HEADS} heads of {COMPARED_HEAD_DIM}, float32, forward:")
    say(
        tabulate(
            [_row(cell) for cell in cells],
            headers=headers,
            disable_numparse=True,
            colalign=("right", "left", "right", "right", "right", "left"),
        )
    )
    say("useful: the program's own pairs. Dense SDPA sees all earlier keys; FlexAttention counts a pair of two branches once.\n")
    return cells


def _code(lengths: tuple[int, ...], rates: tuple[int, ...]) -> str:
    return f"longnet({lengths}, {rates}, causal=True)"


def _row(cell: Cell) -> list[str]:
    if cell.seconds is None or cell.useful_gflops is None or cell.memory_bytes is None:
        return [f"{cell.tokens:,}", cell.system, "-", "-", "-", cell.note]
    return [
        f"{cell.tokens:,}",
        cell.system,
        f"{cell.seconds * 1e3:,.1f}",
        f"{cell.useful_gflops:,.0f}",
        f"{cell.memory_bytes / 2**20:,.0f}",
        cell.note,
    ]


def _mask_picture(scale: Scale) -> bytes:
    """The model's mask as one head sees it, at 1/16 of its size, where each pair can be seen."""
    smaller = 16 if scale.context // 16 >= 64 else 4
    lengths = tuple(length // smaller for length in scale.segment_lengths)
    tokens = scale.context // smaller
    program = longnet(lengths, scale.dilation_rates, causal=True)
    drawn = pictures.panels(program, tokens, scale.heads, 0, 16)
    title = f"{_code(lengths, scale.dilation_rates)}, {tokens} tokens, head 0: the model's mask at 1/{smaller} of its size"
    return pictures.png(title, drawn)


def _loss_picture(training: Training, text: Text) -> bytes:
    """Bits a byte over the bytes seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    seen = [(step + 1) * training.tokens_per_step / 1e6 for step in range(len(training.losses))]
    ax.plot(seen, [value / math.log(2) for value in training.losses], linewidth=1, label="training, each step")
    ax.axhline(text.unigram_bits, color="gray", linestyle="--", label=f"unigram entropy {text.unigram_bits:.2f}")
    ax.plot(seen[-1:], [training.held_out_bits], "o", color="#d2691e", label=f"held-out files {training.held_out_bits:.2f}")
    ax.set(
        xlabel="million bytes seen",
        ylabel="bits a byte",
        ylim=(0, 8.2),
        title=f"{training.parameters:,} parameters, {training.seconds:.0f} s",
    )
    ax.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
