"""Tapes of single operators and of look-ups, against torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_dilated.mods import over_pairs, trace_mask_mod, trace_score_mod
from compiled_dilated.native.expressions import TYPES
from tests.functions import Parameters
from tests.support.tape import (
    HEADS,
    N,
    Native,
    arguments,
    compare_masks,
    compare_scores,
    positions,
    same,
)

POINTS = (
    0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 1e-8, -3e-5, 0.3, 7.5, -9.25, 19.0, 25.0, -40.0, 88.5,
    -100.0, 1e-40, 3e30,
)  # fmt: skip
EXTREMES = (math.inf, -math.inf, math.nan)
OF_TORCH = (
    "abs", "neg", "sign", "exp", "exp2", "expm1", "sin", "cos", "tan", "sinh", "cosh", "atan",
    "tanh", "sigmoid", "erf", "floor", "ceil", "round", "trunc", "relu", "square", "isnan",
    "isinf", "isfinite", "reciprocal",
)  # fmt: skip
ACTIVATIONS = ("softplus", "silu", "gelu", "elu", "leaky_relu", "hardtanh", "relu6")


def comparisons(x: Tensor) -> Tensor:
    small = (x < 1).to(x.dtype) + (x >= 0.5)
    return small + (x != x.abs()) * 2 + (x == 1) * (x <= 2) + (x > 0)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in OF_TORCH},
    **{name: getattr(torch.nn.functional, name) for name in ACTIVATIONS},
    "gelu of tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 1e-3).rsqrt(),
    "log": lambda x: x.abs().log(),
    "log of negatives": torch.log,
    "log2": lambda x: x.abs().log2(),
    "log10": lambda x: x.abs().log10(),
    "log1p": lambda x: x.abs().log1p(),
    "asin": lambda x: torch.asin(x.clamp(-0.9, 0.9)),
    "acos": lambda x: torch.acos(x.clamp(-0.9, 0.9)),
    "clamp": lambda x: x.clamp(-1, 2),
    "clamp min": lambda x: x.clamp(min=0.5),
    "squares": lambda x: x**2 + x**3,
    "powers": lambda x: x.abs() ** 1.5 + (x.abs() + 0.1) ** -2,
    "power of tensors": lambda x: (x.abs() + 0.5) ** torch.sigmoid(x),
    "floor divide": lambda x: x // 0.75,
    "remainder": lambda x: x % 0.75,
    "fmod": lambda x: torch.fmod(x, -1.5),
    "divide to floor": lambda x: torch.div(x, 3, rounding_mode="floor"),
    "divide to zero": lambda x: torch.div(x, 3, rounding_mode="trunc"),
    "maximum": lambda x: torch.maximum(x, torch.square(x)),
    "minimum": lambda x: torch.minimum(x, torch.square(x)),
    "atan2": lambda x: torch.atan2(x, x + 2),
    "comparisons": comparisons,
    "where": lambda x: torch.where((x > 0) & (x < 8) | ~(x > -20), x * 2, -x),
    "logical": lambda x: torch.where(torch.logical_xor(x > 0, torch.logical_not(x > 2)), x, 3.0),
    "lerp": lambda x: torch.lerp(x, x * x, 0.25),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "masked_fill": lambda x: x.masked_fill(x > 1, -2.0),
    "half": lambda x: (x.half() * 1.5 + 0.1).to(x.dtype),
    "bfloat16": lambda x: (x.bfloat16() * 1.5).to(x.dtype) + x,
    "double": lambda x: x.double().exp().to(x.dtype) * 0.5,
    "whole": lambda x: (x.to(torch.int64) // 3 + x.clamp(-100, 100).to(torch.int32)).to(x.dtype),
    "rsub": lambda x: torch.rsub(x, 2, alpha=3) + torch.sub(x, 1, alpha=2),
    "softmax of three": lambda x: torch.logsumexp(torch.stack([x, x * 0.5, x - 1]), 0),
    "amax": lambda x: torch.stack([x, x.abs(), x * 1, x * 0]).amax(),
    "amin": lambda x: torch.stack([x, x.abs(), x * 2, x * 0]).amin(0),
    "prod": lambda x: torch.stack([x, x + 1, x * 0.5]).prod(),
}
# Compared at finite numbers only: elsewhere torch's results depend on its code path, or are matters
# of definition.
FINITE = {
    "whole", "tan", "sin", "cos", "floor divide", "divide to floor", "power of tensors",
    "softmax of three", "amax", "amin", "lerp", "gelu", "gelu of tanh",
}  # fmt: skip
CANCELLING = {"gelu", "gelu of tanh", "softmax of three"}
WITHOUT_GRADIENT = {"floor divide"}  # in torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_scores(native: Native, name: str, dtype: torch.dtype) -> None:
    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return FUNCTIONS[name](s).to(dtype)

    # 1. Values at special points and on a grid.
    points: tuple[float, ...] = POINTS if name in FINITE else (*POINTS, *EXTREMES)
    if name in ("whole", "half", "tan", "sin", "cos"):
        points = tuple(x for x in points if not abs(x) > 1e9)
    grid = torch.linspace(-6, 6, 64 - len(points), dtype=dtype)
    scores = torch.cat([torch.tensor(points, dtype=dtype), grid]).reshape(16, 4)
    graph, operands = trace_score_mod(mod, dtype)
    q, k = positions(16, 0), positions(4, 1)
    x = scores.clone().requires_grad_()
    expected = over_pairs(lambda *scalars: graph.scalar(operands, *scalars), x, *arguments(q, k))
    expected = expected.broadcast_to(x.shape)
    out = native.score(graph, operands, scores, q, k)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    if name == "half":
        tolerance = 1e-3
    least = 1e-6 if name in CANCELLING else 1e-38
    torch.testing.assert_close(out, expected.detach(), rtol=tolerance, atol=least, equal_nan=True)
    # 2. Gradients, where torch's are finite.
    if not expected.requires_grad or name in WITHOUT_GRADIENT:
        return
    (expected_gradient,) = torch.autograd.grad(expected, x, torch.ones_like(expected))
    of_scores, _ = native.backward(graph, operands, scores, torch.ones_like(scores), q, k)
    compared = expected_gradient.isfinite() & (scores.abs() > 1e-30) & (scores.abs() < 60)
    limit = 1e-9 if dtype == torch.float64 else 3e-5
    if name in ("bfloat16", "half"):
        limit = 1e-2
    same(of_scores[compared], expected_gradient[compared], limit)


def quotients(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j) // 3 - (i - j) // -4 + torch.div(i - 20, 7, rounding_mode="trunc")


def signs(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() * (i - j).sign() + torch.maximum(i, j) - torch.minimum(-i, j)


def bools(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    signs = torch.sign(i > j) & torch.sgn(j > 2)
    return ((i > j) + (i > 3)) * ((j > 2) * (i > 1)) + (i > j).to(torch.int64) * 2 + signs


def sums_of_bools(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.stack([i > j, j > 7]).sum() + torch.count_nonzero(torch.stack([i - j, i]))


INTEGER: dict[str, Callable[..., Any]] = {
    "quotients": quotients,
    "remainders": lambda b, h, i, j: (i - j) % 3 + torch.fmod(i - j, 5) + (j - i) % -7,
    "of varying divisors": lambda b, h, i, j: (i - 20) // (j + 1) + (i - 20) % (j + 1),
    "large": lambda b, h, i, j: (i * 2654435761 + j * 40503) % 1000003 // 7,
    "wraps": lambda b, h, i, j: (i * 2**62 + j * 2**61) >> 50,
    "32 bits": lambda b, h, i, j: (i.to(torch.int32) * 2**28 + j.to(torch.int32) * 2**27) // 1024,
    "8 bits": lambda b, h, i, j: (i.to(torch.int8) * 17 - j.to(torch.uint8) * 3).to(torch.int64),
    "bits": lambda b, h, i, j: (i & j) + (i | 3) * 2 - (i ^ j) + (~i) + (i << 3) + ((j - 20) >> 2),
    "signs": signs,
    "clamped": lambda b, h, i, j: (i - j).clamp(-4, 9) * 3 + torch.clamp(i, min=7),
    "powers": lambda b, h, i, j: (i - j) ** 3 + i**2 + j**0,
    "bools": bools,
    "sums of bools": sums_of_bools,
    "means": lambda b, h, i, j: (i * 0.5 - j / 3 + b * h).floor().to(torch.int64),
}


@pytest.mark.parametrize("name", INTEGER)
def test_integer_operators(native: Native, name: str) -> None:
    function = INTEGER[name]
    mod = lambda s, b, h, i, j: s + function(b, h, i, j).double()  # noqa: E731
    compare_scores(native, mod, 24, 40, torch.float64)
    compare_masks(native, lambda b, h, i, j: function(b, h, i, j) % 3 == 0, 24, 40)


def tables(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return numbers.to(dtype).requires_grad_()

    a, b3, weights = leaf(N, N), leaf(HEADS, 4, 6), leaf(3, 3)

    def distances_by_steps(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s - (a[i, :3] - a[j, :3]).square().sum(dim=0, keepdim=True)[0]

    return {
        "negative indices": lambda s, b, h, i, j: s + a[i - j, -1],
        "transposed": lambda s, b, h, i, j: s * a.T[i][j],
        "slices": lambda s, b, h, i, j: s + a[4:30:2][i % 13, j - N] + a[:, 3][j],
        "flipped": lambda s, b, h, i, j: s + a.flip(0)[i, 1],
        "of a head": lambda s, b, h, i, j: s + b3[h, i % 4, j % 6] * b3[h].sum(),
        "computed tables": lambda s, b, h, i, j: s * (a.exp() * 0.1 + 1)[i, j],
        "unsqueezed": lambda s, b, h, i, j: s + a[None, i, None].squeeze()[j],
        "chosen of computed": lambda s, b, h, i, j: torch.stack([s, s * 2, a[i, j]])[(i + j) % 3],
        "rows by a matrix": lambda s, b, h, i, j: s + torch.dot(weights @ a[i, :3], a[j, 3:6]),
        "whole rows": lambda s, b, h, i, j: s + a[i].mean() * a[:, j].amax(),
        "by tensors": lambda s, b, h, i, j: s + a[torch.stack([i, j]), torch.stack([j, j])].sum(),
        "views": lambda s, b, h, i, j: s + b3.view(HEADS, 24)[h, 5] + b3.reshape(-1)[7],
        "joined": lambda s, b, h, i, j: s + torch.cat([a[i, :2], a[j, :2]]).square().sum(),
        "distances by steps": distances_by_steps,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", tables(torch.float32))
def test_tables(native: Native, name: str, dtype: torch.dtype) -> None:
    compare_scores(native, tables(dtype)[name], 24, 40, dtype)


@pytest.mark.parametrize("dtype", [*TYPES])
def test_tables_of_all_dtypes(native: Native, dtype: torch.dtype) -> None:
    """With strides."""
    numbers = torch.randn(2 * N, N, generator=torch.Generator().manual_seed(0)) * 9
    table = numbers.to(dtype).T[:, ::2]

    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (s + table[i, j] * 0.5).double()

    compare_scores(native, mod, 24, 40, torch.float64)
    compare_masks(native, lambda b, h, i, j: table[i, j] > 0, 24, 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_of_16_bits_learn(native: Native, dtype: torch.dtype) -> None:
    table = torch.randn(N, N).to(dtype).requires_grad_()
    graph, operands = trace_score_mod(lambda s, b, h, i, j: s + table[i, j], torch.float32)
    q, k = positions(16, 0), positions(16, 1)
    grad = torch.randn(16, 16)
    _, (total,) = native.backward(graph, operands, torch.randn(16, 16), grad, q, k)
    places = (q.long()[:, None], k.long()[None])
    expected = torch.zeros(N, N).index_put(places, grad, accumulate=True)
    assert total is not None
    same(total, expected, 1e-6)


def test_sums_of_operands_that_do_not_learn_are_left_out(native: Native) -> None:
    parameters = Parameters.of(HEADS, N, torch.float32)
    table, gain = parameters.table, parameters.gain.detach()
    compare_scores(native, lambda s, b, h, i, j: s * gain + table[i, j], 24, 40, torch.float32)


@pytest.mark.parametrize(
    "index", [lambda i, j: i + 1, lambda i, j: j - N - 1, lambda i, j: i - j * N]
)
def test_indices_out_of_range_are_errors(native: Native, index: Callable[..., Any]) -> None:
    table = torch.zeros(N)
    graph, operands = trace_score_mod(lambda s, b, h, i, j: s + table[index(i, j)], torch.float32)
    indices = torch.arange(N, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="index out of range"):
        native.score(graph, operands, torch.zeros(N, N), indices, indices)


def test_division_of_whole_numbers_by_zero_is_an_error(native: Native) -> None:
    graph, operands = trace_mask_mod(lambda b, h, i, j: i // j == 0)
    with pytest.raises(RuntimeError, match="by zero"):
        native.mask(graph, operands, positions(16, 0), torch.zeros(4, dtype=torch.int32))


def test_hidden_pairs_pass_no_gradient_whatever_their_score(native: Native) -> None:
    gain = torch.ones((), requires_grad=True)
    graph, operands = trace_score_mod(lambda s, b, h, i, j: s * gain, torch.float32)
    scores, grad = torch.full((16, 8), math.nan), torch.zeros(16, 8)
    q, k = positions(16, 0), positions(8, 1)
    of_scores, (total,) = native.backward(graph, operands, scores, grad, q, k)
    assert (of_scores == 0).all()
    assert total == 0
