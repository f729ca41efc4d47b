"""The demo's training: as many steps as fit a time, then the loss on held-out text and a sample."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compiled_dilated import measure

from .model import LanguageModel, loss
from .text import Text

_LEARNING_RATE, _WARMUP_STEPS, _LEAST_STEPS = 1e-2, 10, 20
_HELD_OUT_WINDOWS = 6
_SMOOTHED_STEPS = 10
_SAMPLE_TOKENS, _SAMPLE_TEMPERATURE = 512, 0.6


@dataclass(eq=False)
class Training:
    """The course of a training.

    losses: of each step, in nats a byte.
    peak_bytes: the largest resident memory of the process.
    """

    parameters: int
    tokens_per_step: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    held_out_nats: float = math.nan

    @property
    def tokens_per_second(self) -> float:
        return len(self.losses) * self.tokens_per_step / self.seconds

    @property
    def recent_bits(self) -> float:
        """Mean loss of the last steps, in bits a byte; single steps vary with their text."""
        recent = self.losses[-_SMOOTHED_STEPS:]
        return sum(recent) / len(recent) / math.log(2)

    @property
    def held_out_bits(self) -> float:
        return self.held_out_nats / math.log(2)

    def fell_to(self, share: float, text: Text) -> bool:
        """Whether the loss on held-out text reached a share of the text's unigram entropy."""
        return self.held_out_bits <= share * text.unigram_bits

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        steps = {
            "steps": len(self.losses),
            "tokens_per_second": self.tokens_per_second,
            "held_out_bits": self.held_out_bits,
        }
        return asdict(self) | steps


def train(
    model: LanguageModel,
    text: Text,
    context: int,
    seconds: float,
    random: torch.Generator,
    report: Callable[[Training], None],
) -> Training:
    """Steps of one window of `context` bytes each until the time is over, at least 20; the learning rate falls with it.

    `report` is called after each step.
    """
    out = Training(sum(weight.numel() for weight in model.parameters()), context)
    optimizers = _optimizers(model)
    full_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started = time.perf_counter()
    with measure.resident_peak() as peak:
        while (passed := min(out.seconds / seconds, len(out.losses) / _LEAST_STEPS)) < 1:
            share = min((len(out.losses) + 1) / _WARMUP_STEPS, 1.0) * _decay(passed)
            for optimizer, rates in zip(optimizers, full_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = share * rate
            value = loss(model, text.windows(context, 1, random))
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            out.losses.append(value.item())
            out.seconds = time.perf_counter() - started
            report(out)
        out.peak_bytes = peak()
    out.held_out_nats = _held_out(model, text, context)
    return out


def _decay(passed: float) -> float:
    """The learning rate's share: whole for the first half of the time, then straight to 0."""
    return min(1.0, 2.0 * max(0.0, 1.0 - passed))


def _optimizers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which learns from fewer steps than Adam; AdamW for the rest."""
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    others = [
        weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)
    ]
    return [
        torch.optim.Muon(
            matrices, lr=_LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def _held_out(model: nn.Module, text: Text, context: int) -> float:
    """Mean nats a byte on held-out text, window by window."""
    windows = text.held_out(context, _HELD_OUT_WINDOWS)
    return sum(float(loss(model, window[None])) for window in windows) / len(windows)


@torch.no_grad()
def continuation(model: nn.Module, prompt: bytes, count: int, random: torch.Generator) -> bytes:
    """`count` more bytes, drawn from the model; prompt and all at most 512 bytes.

    The length is kept, so that one plan serves every byte: what stands behind a byte does not change its logits.
    """
    text = torch.zeros(1, _SAMPLE_TOKENS, dtype=torch.int64)
    text[0, : len(prompt)] = torch.tensor(list(prompt))
    for place in range(len(prompt), len(prompt) + count):
        logits: Tensor = model(text)[0, place - 1]
        share = torch.softmax(logits / _SAMPLE_TEMPERATURE, dim=-1)
        text[0, place] = torch.multinomial(share, 1, generator=random)[0]
    return bytes(text[0, len(prompt) : len(prompt) + count].tolist())
