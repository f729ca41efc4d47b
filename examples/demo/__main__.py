"""Train a small language model; check and compare its attention.

python -m examples.demo
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from compiled_dilated import Program, longnet, measure, pictures, plan
from compiled_dilated.commands.arguments import Json, bad_usage, print_json

from . import report
from .comparison import Cell, check, compare
from .model import LanguageModel
from .text import Text, read
from .training import Training, continuation, train

_SEED = 0
_CHECKED_TOKENS = 1200
_PROMPT = b"def main("
# The program of the comparison, with the heads of the library's benchmarks.
_COMPARED = (2048, 4096, 8192), (1, 2, 4)
_COMPARED_HEADS, _COMPARED_HEAD_DIM = 8, 64
# Shares of the time for training and for the comparison.
_TRAINING_SHARE, _TABLE_SHARE = 0.47, 0.45
_PICTURES = ("mask.png", "loss.png")


@dataclass(frozen=True)
class Scale:
    """Sizes of model, text and comparison.

    context: bytes of a training window.
    must_fall_to: the greatest held-out loss, as a share of the unigram entropy.
    sampled_bytes: bytes of the sample.
    compared_tokens: lengths of the comparison.
    with_flex: whether FlexAttention takes part in it.
    seconds: time for all of the demo.
    """

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


FULL = Scale(
    context=8192, width=128, layers=3, heads=4,
    segment_lengths=(512, 2048, 8192), dilation_rates=(1, 2, 4), must_fall_to=0.75,
    sampled_bytes=300, compared_tokens=(4096, 16384, 65536), with_flex=True, seconds=230,
)  # fmt: skip
QUICK = Scale(
    context=1024, width=64, layers=2, heads=4,
    segment_lengths=(128, 512, 1024), dilation_rates=(1, 2, 4), must_fall_to=1.1,
    sampled_bytes=40, compared_tokens=(1024, 4096), with_flex=False, seconds=9,
)  # fmt: skip

_QUICK_HELP = "A smaller model and shorter sequences, to see that it works."


def demo(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", file_okay=False, help="Folder for mask.png, loss.png and summary.json."
        ),
    ] = Path("demo-out"),
    seconds: Annotated[
        float | None,
        typer.Option(min=1.0, help="About how long all of it may take; 230, or 9 with --quick."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=_QUICK_HELP)] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of .py files to learn, not the standard library.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train a byte-level language model in minutes; check and compare its attention.

    Exit code 1 if attention differs from the float64 reference, or if the loss does not fall well
    below the unigram entropy.
    """
    if not pictures.can_draw():
        raise typer.BadParameter(
            "the demo draws its results by matplotlib; "
            "install it with pip install 'compiled-dilated[show]'"
        )
    with bad_usage():
        source = read(text)
    # Stdout has the JSON object alone.
    show = partial(typer.echo, err=json)
    scale = QUICK if quick else FULL
    record = _run(scale, seconds, source, out, show)
    if json:
        print_json(record)
    raise typer.Exit(int(not record["ok"]))


def _run(
    scale: Scale, seconds: float | None, source: Text, out: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Train, sample, check, compare and draw.

    seconds: time for all; the scale's if None.
    out: folder of the pictures and the summary.
    show: prints a text.

    Returns the summary.
    """
    started, seconds = time.perf_counter(), seconds or scale.seconds
    random = torch.Generator().manual_seed(_SEED)
    torch.manual_seed(_SEED)
    program = longnet(scale.segment_lengths, scale.dilation_rates, causal=True)
    hardware = measure.hardware()
    _introduce(scale, source, hardware, show)
    shape = (1, scale.heads, scale.context, scale.width // scale.heads)
    show(plan(program, shape, training=True).explain() + "\n")
    model = LanguageModel(program, scale.width, scale.heads, scale.layers)
    training = _train(model, source, scale, seconds * _TRAINING_SHARE, random)
    show(report.of_training(training, source, scale.must_fall_to))
    sample = _sample(model, scale, random, show)
    # Attention's inputs on real text, and random ones of the benchmark's size.
    result = check(program, *model.first_projection(source.held_out(_CHECKED_TOKENS, 1)[:, :-1]))
    show(report.of_check(result))
    cells = _compare(scale, seconds * _TABLE_SHARE)
    code = report.code(*_COMPARED)
    show(report.of_comparison(cells, code, _COMPARED_HEADS, _COMPARED_HEAD_DIM))

    # Pictures, and the summary of all figures.
    _draw(scale, training, source, out)
    record = {
        "ok": result.ok and training.fell_to(scale.must_fall_to, source),
        "seconds": time.perf_counter() - started,
        "hardware": hardware,
        **_setting(scale, program, source),
        "training": training.to_json(),
        "sample": sample,
        "check": asdict(result) | {"ok": result.ok},
        **_comparison(code, cells),
    }
    _write(record, out, show)
    return record


def _sample(
    model: LanguageModel, scale: Scale, random: torch.Generator, show: Callable[[str], None]
) -> str:
    """The model's continuation of the prompt, printed behind it."""
    sample = continuation(model, _PROMPT, scale.sampled_bytes, random).decode(errors="replace")
    show("sample    " + (_PROMPT.decode() + sample).rstrip().replace("\n", "\n          ") + "\n")
    return sample


def _write(record: dict[str, Any], out: Path, show: Callable[[str], None]) -> None:
    """Write the summary, and print the files and the verdict."""
    measure.write_json(out / "summary.json", record)
    show(f"wrote     {', '.join(str(out / name) for name in (*_PICTURES, 'summary.json'))}")
    show(f"{'passed' if record['ok'] else 'FAILED'} in {record['seconds']:.0f} s")


def _setting(scale: Scale, program: Program, source: Text) -> dict[str, Any]:
    """Scale, program and text of a run, for its summary."""
    return {"scale": asdict(scale), "program": repr(program), "text": source.to_json()}


def _comparison(code: str, cells: list[Cell]) -> dict[str, Any]:
    """Problem and figures of the comparison, for the summary."""
    return {
        "compared": {"program": code, "heads": _COMPARED_HEADS, "head_dim": _COMPARED_HEAD_DIM},
        "comparison": [asdict(cell) for cell in cells],
    }


def _introduce(
    scale: Scale, text: Text, hardware: dict[str, Any], show: Callable[[str], None]
) -> None:
    """Print machine, text and program."""
    versions = f"torch {hardware['torch']}, Python {hardware['python']}"
    show(f"{hardware['cpu']}, {hardware['threads']} threads, {versions}\n")
    show(report.of_text(text))
    show(f"attention {report.code(scale.segment_lengths, scale.dilation_rates)}\n")


def _draw(scale: Scale, training: Training, text: Text, out: Path) -> None:
    """Write the pictures of mask and loss."""
    lengths, rates = scale.segment_lengths, scale.dilation_rates
    mask = report.mask_picture(lengths, rates, scale.context, scale.heads)
    loss = report.loss_picture(training, text)
    for name, picture in zip(_PICTURES, (mask, loss), strict=True):
        measure.write(out / name, picture)


def _train(
    model: LanguageModel, text: Text, scale: Scale, seconds: float, random: torch.Generator
) -> Training:
    """Train with a progress bar on stderr, and eight lasting lines."""
    lines = 8
    with _bar("training", seconds) as (advance, line):
        printed = 0

        def report_step(training: Training) -> None:
            nonlocal printed
            text = f"step {len(training.losses)}, {training.recent_bits:.2f} bits a byte"
            advance(training.seconds, text)
            if training.seconds >= seconds * (printed + 1) / lines:
                printed = int(lines * training.seconds / seconds)
                line(f"          {training.seconds:4.0f} s  {text}")

        return train(model, text, scale.context, seconds, random, report_step)


def _compare(scale: Scale, seconds: float) -> list[Cell]:
    """Measure the cells of the comparison, with a progress bar."""
    cells: list[Cell] = []
    program, tokens = longnet(*_COMPARED, causal=True), scale.compared_tokens
    heads = _COMPARED_HEADS, _COMPARED_HEAD_DIM
    with _bar("one call", 3 * len(tokens)) as (advance, _):
        for cell in compare(program, tokens, *heads, seconds, scale.with_flex):
            cells.append(cell)
            advance(len(cells), f"{cell.system} at {cell.tokens:,} tokens")
    return cells


@contextmanager
def _bar(
    name: str, total: float
) -> Iterator[tuple[Callable[[float, str], None], Callable[[str], None]]]:
    """Show a progress bar on stderr.

    Yields advance(completed, description), and a function that prints a lasting line.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)

        def advance(completed: float, description: str) -> None:
            progress.update(task, completed=completed, description=f"{name}: {description}")

        yield advance, partial(progress.console.print, markup=False, highlight=False)


application = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
application.command(context_settings={"help_option_names": ["-h", "--help"]})(demo)

if __name__ == "__main__":
    application()
