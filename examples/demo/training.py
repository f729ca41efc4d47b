"""The demo's training within a time limit, its held-out loss, and sampling."""

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
    """The results of a training.

    losses: loss of each step, in nats a byte.
    peak_bytes: the largest resident memory of the process.
    held_out_nats: loss on held-out text, in nats a byte.
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
        """Mean loss of the last ten steps, in bits a byte."""
        recent = self.losses[-_SMOOTHED_STEPS:]
        return sum(recent) / len(recent) / math.log(2)

    @property
    def held_out_bits(self) -> float:
        return self.held_out_nats / math.log(2)

    def fell_to(self, share: float, text: Text) -> bool:
        """Whether the held-out loss reached a share of the unigram entropy."""
        return self.held_out_bits <= share * text.unigram_bits

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        return asdict(self) | {
            "steps": len(self.losses),
            "tokens_per_second": self.tokens_per_second,
            "held_out_bits": self.held_out_bits,
        }


def train(
    model: LanguageModel,
    text: Text,
    context: int,
    seconds: float,
    random: torch.Generator,
    report: Callable[[Training], None],
) -> Training:
    """Train for a time, and for at least 20 steps.

    context: bytes of a step's window.
    seconds: the time.
    report: called after each step.
    """
    out = Training(sum(weight.numel() for weight in model.parameters()), context)
    optimizers = _optimizers(model)
    started = time.perf_counter()
    with measure.resident_peak() as peak:
        while True:
            # The share of the training that is done, by time and by the least number of steps.
            progress = min(out.seconds / seconds, len(out.losses) / _LEAST_STEPS)
            if progress >= 1:
                break
            warmup = min((len(out.losses) + 1) / _WARMUP_STEPS, 1.0)
            factor = warmup * _decay(progress)
            value = loss(model, text.windows(context, 1, random))
            value.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = factor * _LEARNING_RATE
                optimizer.step()
                optimizer.zero_grad()
            out.losses.append(value.item())
            out.seconds = time.perf_counter() - started
            report(out)
        out.peak_bytes = peak()
    out.held_out_nats = _held_out(model, text, context)
    return out


def _decay(progress: float) -> float:
    """The learning rate's factor: 1 until half time, then linear to 0."""
    return min(1.0, 2.0 * max(0.0, 1.0 - progress))


def _optimizers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all other weights."""
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    distinct = set(matrices)
    weights = [weight for weight in model.parameters() if weight not in distinct]
    muon = torch.optim.Muon(
        matrices, lr=_LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(weights, lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


@torch.no_grad()
def _held_out(model: nn.Module, text: Text, context: int) -> float:
    """Mean nats a byte on held-out text, window by window."""
    windows = text.held_out(context, _HELD_OUT_WINDOWS)
    return sum(float(loss(model, window[None])) for window in windows) / len(windows)


@torch.no_grad()
def continuation(model: nn.Module, prompt: bytes, count: int, random: torch.Generator) -> bytes:
    """Sample `count` bytes behind a prompt, 512 bytes in all at most.

    The model is causal: the text is padded to 512 bytes, so that all calls share one plan.
    """
    text = torch.zeros(1, _SAMPLE_TOKENS, dtype=torch.int64)
    text[0, : len(prompt)] = torch.tensor(list(prompt))
    for position in range(len(prompt), len(prompt) + count):
        logits: Tensor = model(text)[0, position - 1]
        probabilities = torch.softmax(logits / _SAMPLE_TEMPERATURE, dim=-1)
        text[0, position] = torch.multinomial(probabilities, 1, generator=random)[0]
    return bytes(text[0, len(prompt) : len(prompt) + count].tolist())
