"""Texts and pictures of the demo."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace

from compiled_dilated import longnet, pictures

from .comparison import Cell, Check
from .text import Text
from .training import Training

_MIB = 2**20
_DRAWN_TOKENS = 128


def code(lengths: Sequence[int], rates: Sequence[int]) -> str:
    """A causal LongNet program as its user writes it."""
    return f"longnet({tuple(lengths)}, {tuple(rates)}, causal=True)"


def of_text(text: Text) -> str:
    """Sizes and entropy of the text."""
    return (
        f"text      {text.files:,} files of {text.folder}: "
        f"{len(text.training):,} bytes, {len(text.validation):,} more held out\n"
        f"          unigram entropy {text.unigram_bits:.3f} bits a byte\n"
    )


def of_training(training: Training, text: Text, must_fall_to: float) -> str:
    """Loss, time and memory of the training."""
    verdict = "at or below" if training.fell_to(must_fall_to, text) else "NOT at or below"
    return (
        f"trained   {training.parameters:,} parameters, {len(training.losses)} steps of "
        f"{training.tokens_per_step:,} bytes in {training.seconds:.0f} s: "
        f"{training.tokens_per_second:,.0f} tokens/s, "
        f"at most {training.peak_bytes / _MIB:,.0f} MiB of memory in all\n"
        f"loss      {training.held_out_bits:.3f} bits a byte ({training.held_out_nats:.3f} nats) "
        f"on held-out files, unigram entropy {text.unigram_bits:.3f}: "
        f"{verdict} {must_fall_to:.0%} of it\n"
    )


def of_check(check: Check) -> str:
    """Errors of attention against the reference, with their bounds."""
    return (
        f"check     {'passed' if check.ok else 'FAILED'}: the first layer's attention on "
        f"{check.tokens:,} held-out bytes against the float64 reference\n"
        f"          largest error {check.error:.1e}, at most {check.most_error:.1e}: "
        "twice that of dense SDPA, one rounding\n"
        f"          of the gradients {check.gradient_error:.1e}, "
        f"at most {check.most_gradient_error:.1e}\n"
    )


def of_comparison(cells: Sequence[Cell], program: str, heads: int, head_dim: int) -> str:
    """The table of single calls."""
    from tabulate import tabulate

    figures = ["ms", "useful GFLOP/s", "MiB beyond q, k, v", "s to prepare"]
    headers = ["tokens", "attention", *figures, ""]
    alignment = ("right", "left", *["right"] * len(figures), "left")
    rows = [_row(cell) for cell in cells]
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=alignment)
    return (
        f"one call of {program}, {heads} heads of {head_dim}, float32, forward\n{table}\n"
        "useful: the program's own pairs. Dense SDPA sees all earlier keys; "
        "FlexAttention counts a pair of two branches once.\n"
        "to prepare: planning, or create_block_mask and torch.compile.\n"
    )


def _row(cell: Cell) -> list[str]:
    if cell.seconds is None or cell.useful_gflops is None or cell.memory_bytes is None:
        return [f"{cell.tokens:,}", cell.system, "-", "-", "-", "-", cell.note]
    figures = (
        f"{cell.seconds * 1e3:,.1f}",
        f"{cell.useful_gflops:,.0f}",
        f"{cell.memory_bytes / _MIB:,.0f}",
        f"{cell.ready_seconds:.1f}",
    )
    return [f"{cell.tokens:,}", cell.system, *figures, cell.note]


def mask_picture(lengths: Sequence[int], rates: Sequence[int], tokens: int, heads: int) -> bytes:
    """PNG of a scaled-down mask of one head."""
    scale = max(1, tokens // _DRAWN_TOKENS)
    lengths = [length // scale for length in lengths]
    program = longnet(lengths, rates, causal=True)
    figure = pictures.show(program, tokens // scale, heads=heads, head=0, branches=True)
    title = f"{code(lengths, rates)}: the model's mask at 1/{scale} of its size"
    return replace(figure, program=title).png()


def loss_picture(training: Training, text: Text) -> bytes:
    """PNG of the loss, in bits a byte, over millions of bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    millions = [(step + 1) * training.tokens_per_step / 1e6 for step in range(len(training.losses))]
    bits = [value / math.log(2) for value in training.losses]
    smooth = []
    for step in range(len(bits)):
        window = bits[max(0, step - 9) : step + 1]
        smooth.append(sum(window) / len(window))
    blue, orange = "#1f77b4", "#d2691e"
    ax.plot(millions, bits, color=blue, linewidth=0.7, alpha=0.35, label="training, each step")
    ax.plot(millions, smooth, color=blue, linewidth=1.6, label="mean of ten steps")
    label = f"unigram entropy {text.unigram_bits:.2f}"
    ax.axhline(text.unigram_bits, color="gray", linestyle="--", label=label)
    label = f"held-out files {training.held_out_bits:.2f}"
    ax.plot(millions[-1:], [training.held_out_bits], "o", color=orange, label=label)
    ax.set(xlabel="million bytes seen", ylabel="bits a byte", ylim=(0, 8.2))
    ax.set_title(f"{training.parameters:,} parameters, {training.seconds:.0f} s")
    ax.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
