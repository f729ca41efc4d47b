"""Budgets of random models, at random lengths, by the profiler's memory events."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
import passes
from passes import BudgetError
from tests.compiling import Loss, train
from tests.graphs import (
    WIDTH,
    Block,
    Gelu,
    Llama,
    Swiglu,
    Unet,
    Vit,
    channels_last,
    measured_peak,
)


def tokens(count: int) -> Tensor:
    return torch.randn(1, count, WIDTH)


def images(count: int) -> Tensor:
    """Images of about `count` patches of 8 x 8."""
    return torch.randn(max(2, count // 64), 3, 64, 64).contiguous(memory_format=torch.channels_last)


def mlp(numbers: random.Random) -> nn.Module:
    return numbers.choice((Gelu, Swiglu))()


def mlps(numbers: random.Random) -> nn.Module:
    return Loss(*(mlp(numbers) for _ in range(numbers.randrange(1, 4))))


def blocks(numbers: random.Random) -> nn.Module:
    return Loss(*(Block(mlp(numbers)) for _ in range(numbers.randrange(1, 4))))


def longnet(numbers: random.Random) -> nn.Module:
    attend = cd.compile(cd.longnet((numbers.choice((128, 200)), 512), (1, 2), causal=True))
    return Loss(*(Block(mlp(numbers), attend=attend) for _ in range(numbers.randrange(1, 4))))


def llama(numbers: random.Random) -> nn.Module:
    return Loss(Llama())


def vit(numbers: random.Random) -> nn.Module:
    return Loss(Vit())


def unet(numbers: random.Random) -> nn.Module:
    return channels_last(Loss(Unet()))


@dataclass(frozen=True)
class Kind:
    """A kind of models.

    inputs: returns inputs of a size
    largest: size of the inputs
    runs: how many; torch compiles images of each size anew
    """

    model: Callable[[random.Random], nn.Module]
    inputs: Callable[[int], Tensor]
    largest: int
    runs: int = 20


RANDOM: dict[str, Kind] = {
    "mlps": Kind(mlps, tokens, 3000),
    "blocks": Kind(blocks, tokens, 3000),
    "longnet": Kind(longnet, tokens, 3000),
    "llama": Kind(llama, tokens, 1500),
    "vit": Kind(vit, images, 2000),
    "unet": Kind(unet, images, 2000, runs=6),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RANDOM)
def test_random_models_of_random_lengths_keep_random_budgets(name: str, seed: int) -> None:
    """No run takes more than 1.03 of its budget.

    There are more than two hundred runs in all.
    """
    numbers, kind = random.Random(f"{name} {seed}"), RANDOM[name]
    torch.manual_seed(seed)
    model = kind.model(numbers)
    parameters, first = list(model.parameters()), kind.inputs(kind.largest // 2)
    peaks = [estimate.peak_bytes for estimate in passes.estimate(model, [first], train=True)]
    runs = 0
    while runs < kind.runs:
        torch._dynamo.reset()
        budget = numbers.randrange(min(peaks), 2 * max(peaks))
        step = passes.compile(model, memory_budget=budget, dynamic=True)
        train(step, parameters, first)
        for _ in range(7):
            x = kind.inputs(numbers.randrange(2, kind.largest))
            input_bytes = x.nbytes + sum(parameter.nbytes for parameter in parameters)
            try:
                train(step, parameters, x)
            except BudgetError:
                continue
            peak = measured_peak(partial(train, step, parameters, x)) + input_bytes
            assert peak <= 1.03 * budget
            runs += 1
