"""Measure peak memory and time of each pass on its model.

python benchmarks/single_passes.py [--json FILE] [--repeats 3] [--only NAME]

Attention is SDPA, in float32. Peaks are torch's allocations beyond the inputs, with gradients of
parameters, in units U of one activation of the residual stream. `before` is plain torch.compile;
for Remat it is a checkpoint for each block, compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.runs import origin
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import passes
from compiled_dilated import measure
from passes import Chunk, LinearCrossEntropy, Materialize, Remat, Reorder, Spill, StreamQKV
from passes.planning.reports import allocated_bytes

VOCABULARY = 32768


class Gelu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Swiglu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, 4 * width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in backward."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Loss(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().mean()


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        targets = torch.zeros(x.shape[1], dtype=torch.int64)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets)


def block(mlp: type[nn.Module], width: int) -> nn.Module:
    return nn.Sequential(Residual(Attention(width), width), Residual(mlp(width), width))


def layers(mlp: type[nn.Module], width: int) -> nn.Module:
    return nn.Sequential(*(block(mlp, width) for _ in range(4)))


def training(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda width: Loss(make(width))


@dataclass(frozen=True)
class Case:
    """A model, and passes for it.

    make: makes the model of a width.
    chosen: the passes, for the bytes of one activation.
    trains: whether a step is forward and backward.
    most_units: bar of the peak, in units of one activation.
    most_time: bar of the time, as a share of the time before.
    checkpointed: whether `before` is a checkpoint for each block, instead of plain torch.compile.
    """

    make: Callable[[int], nn.Module]
    chosen: Callable[[int], list[passes.Pass]]
    tokens: int
    width: int
    trains: bool = False
    most_units: float | None = None
    most_time: float | None = None
    checkpointed: bool = False

    def row(self, name: str, repeats: int) -> dict[str, Any]:
        """Measure before and after in turn, in this process."""
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, x = self.make(self.width), torch.randn(1, self.tokens, self.width)
        chosen = self.chosen(x.nbytes)
        before = Loss(Checkpointed(*model.inner)) if self.checkpointed else model  # type: ignore[arg-type, misc]
        # `before` shares its parameters with the model that the passes compile.
        steps = {
            "before": torch.compile(before, dynamic=False),
            "after": passes.compile(model, passes=chosen, dynamic=False),
        }
        parameters = [*model.parameters()]
        runs = {}
        for way, step in steps.items():
            runs[way] = partial(self._run, step, parameters, x)
        seconds = measure.medians(measure.interleaved(runs, repeats))
        units = {}
        for way, run in runs.items():
            units[way] = allocated_bytes(run) / x.nbytes
        return {
            "step": name,
            "tokens": self.tokens,
            "width": self.width,
            "passes": ", ".join(map(repr, chosen)),
            "before U": units["before"],
            "U": units["after"],
            "bar U": self.most_units,
            "before s": seconds["before"],
            "time of before": seconds["after"] / seconds["before"],
            "bar time": self.most_time,
        }

    def _run(self, step: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> object:
        with torch.set_grad_enabled(self.trains):
            result = step(x)
            if not self.trains:
                return result
            return torch.autograd.grad(result, parameters)


def residual(mlp: type[nn.Module], width: int) -> nn.Module:
    return Residual(mlp(width), width)


def chunked(unit: int) -> list[passes.Pass]:
    return [Chunk()]


def streamed(unit: int) -> list[passes.Pass]:
    return [StreamQKV(chunk_bytes=unit // 16)]


GELU_MLP, SWIGLU_MLP = training(partial(residual, Gelu)), training(partial(residual, Swiglu))
GELU_BLOCK, SWIGLU_BLOCK = partial(block, Gelu), partial(block, Swiglu)
LAYERS, LAYERS_TRAIN = partial(layers, Gelu), training(partial(layers, Gelu))
# model, passes, tokens, width, whether it trains, most units U, most share of the time before
CASES = {
    "a GELU MLP trains": Case(GELU_MLP, chunked, 32768, 512, True, 5.3, 1.2),
    "a SwiGLU MLP trains": Case(SWIGLU_MLP, chunked, 32768, 512, True, 5.3, 1.2),
    "a GELU block": Case(GELU_BLOCK, chunked, 8192, 512, most_units=4.1),
    "a SwiGLU block": Case(SWIGLU_BLOCK, chunked, 8192, 512, most_units=4.1),
    "a GELU block, streamed": Case(GELU_BLOCK, streamed, 16384, 512, most_units=3.2),
    "a SwiGLU block, streamed": Case(SWIGLU_BLOCK, streamed, 16384, 512, most_units=3.2),
    "four GELU layers": Case(
        LAYERS, lambda _: [Materialize(), Reorder()], 8192, 256, most_units=9.0
    ),
    "four GELU layers train, against checkpoints": Case(
        LAYERS_TRAIN, lambda unit: [Remat(28 * unit)], 8192, 256, True, 28.0, 1.0, checkpointed=True
    ),
    "four GELU layers train, spilled": Case(LAYERS_TRAIN, lambda _: [Spill()], 8192, 256, True),
    "a head and its loss train": Case(Head, lambda _: [LinearCrossEntropy()], 8192, 256, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count (%(default)s)")
    parser.add_argument(
        "--only", choices=CASES, action="append", help="cases to measure; all if not given"
    )
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only or CASES:
        print(f"{name} ...", flush=True)
        row = CASES[name].row(name, arguments.repeats)
        rows.append(row)
        peaks = f"{row['before U']:.1f} U -> {row['U']:.1f} U"
        print(f"    {peaks} in {row['time of before']:.2f} of the time", flush=True)
    print(f"\n{tabulate(rows, headers='keys', floatfmt='.3g')}")
    if arguments.json:
        measure.write_json(arguments.json, origin() | {"passes": rows})


if __name__ == "__main__":
    main()
