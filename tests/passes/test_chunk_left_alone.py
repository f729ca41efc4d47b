"""Graphs whose row-wise work is not chunked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passes.rewrites.chunk import Chunk
from tests.graphs import Gelu
from tests.hooked import captured

WIDTH = 8


def dropped(x: Tensor, w: list[Tensor]) -> Tensor:
    return F.linear(F.dropout(F.gelu(F.linear(x, w[0])), 0.5, True), w[1])


def used_elsewhere(x: Tensor, w: list[Tensor]) -> tuple[Tensor, Tensor]:
    hidden = F.gelu(F.linear(x, w[0]))
    return F.linear(hidden, w[1]), hidden


def mixed_by_softmax(x: Tensor, w: list[Tensor]) -> Tensor:
    return F.linear(F.linear(x, w[0]).softmax(1), w[1])


def mixed_by_a_sum(x: Tensor, w: list[Tensor]) -> Tensor:
    hidden = F.linear(x, w[0])
    return F.linear(hidden - hidden.mean(1, keepdim=True), w[1])


def written_between(x: Tensor, w: list[Tensor]) -> Tensor:
    x = x.clone()
    hidden = F.linear(x, w[0])
    x.zero_()
    return F.linear(F.gelu(hidden), w[1])


def overwritten(x: Tensor, w: list[Tensor]) -> Tensor:
    hidden = F.linear(x, w[0])
    activated = F.relu(hidden, inplace=True)
    return F.linear(activated + hidden, w[1])


def bottleneck(x: Tensor, w: list[Tensor]) -> Tensor:
    """Its operands and its result are wider than the values between."""
    return F.linear(F.gelu(F.linear(x.repeat(1, 1, 4), w[1])), w[0])


def constant_by_position(x: Tensor, w: list[Tensor]) -> Tensor:
    hidden = F.linear(x, w[0])
    return F.linear(hidden + torch.ones(hidden.shape[1:], dtype=x.dtype), w[1])


def laid_out_otherwise(x: Tensor, w: list[Tensor]) -> Tensor:
    """A later view relies on the strides of the input."""
    x = x.transpose(0, 1)
    out = x + F.linear(F.gelu(F.linear(x, w[0])), w[1])
    return out.transpose(0, 1).view(-1)


def switched(x: Tensor, w: list[Tensor]) -> Tensor:
    hidden = F.linear(x, w[0])
    with torch.no_grad():
        hidden = F.gelu(hidden)
    return F.linear(hidden, w[1])


def raised_to_nothing(x: Tensor, w: list[Tensor]) -> Tensor:
    return F.linear(F.linear(x, w[0]).relu() ** 0, w[1])


def complex_numbers(x: Tensor, w: list[Tensor]) -> Tensor:
    """Their gradients have conjugates."""
    hidden = F.linear(torch.complex(x, x), torch.complex(w[0], w[0]))
    return F.linear(hidden.tanh(), torch.complex(w[1], w[1]))


LEFT_ALONE = [
    dropped,
    used_elsewhere,
    mixed_by_softmax,
    mixed_by_a_sum,
    written_between,
    overwritten,
    bottleneck,
    constant_by_position,
    laid_out_otherwise,
    switched,
    raised_to_nothing,
    complex_numbers,
]


def weights() -> list[Tensor]:
    shapes = [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH, WIDTH)]
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda function: function.__name__)
def test_graphs_that_cannot_be_chunked_are_left_alone(function: Callable[..., Any]) -> None:
    """Static sizes: weights that are arguments have dynamic ones, which no region takes."""
    w = weights()
    step, lines = captured(function, Chunk(rows=3), dynamic=False)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    torch.manual_seed(1)
    out = step(x, w)
    torch.manual_seed(1)
    torch.testing.assert_close(out, function(x, w), rtol=0, atol=0)
    assert lines == []


INFINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "inf": lambda hidden: hidden * math.inf,
    "-inf": lambda hidden: -math.inf * hidden,
    "nan": lambda hidden: hidden - math.nan,
    "an exponent": lambda hidden: hidden**math.inf,
}


def test_graphs_like_these_are_chunked_without_their_obstacle() -> None:
    def function(x: Tensor, w: list[Tensor]) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w[0]) * 2.0), w[1])

    w, x = weights(), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    step, lines = captured(function, Chunk(rows=3), dynamic=False)
    torch.testing.assert_close(step(x, w), function(x, w))
    assert len(lines) == 1


@pytest.mark.parametrize("name", INFINITE)
def test_numbers_without_a_literal_are_left_alone(name: str) -> None:
    """Recipes are text, which such a number is not written in."""

    def function(x: Tensor, w: list[Tensor]) -> Tensor:
        return F.linear(F.gelu(INFINITE[name](F.linear(x, w[0]))), w[1])

    w, x = weights(), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    step, lines = captured(function, Chunk(rows=3), dynamic=False)
    torch.testing.assert_close(step(x, w), function(x, w), equal_nan=True)
    assert lines == []


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_left_alone(inside: bool) -> None:
    model = Gelu(WIDTH)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    step, lines = captured(function if inside else model, Chunk(rows=3))
    x = torch.randn(2, 7, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = step(x), model(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert lines == []
