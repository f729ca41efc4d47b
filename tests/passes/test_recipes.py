"""Recipes in chunks of rows against recipes run whole: results, gradients, memory."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from psutil import Process
from torch import Tensor

from passes.allocators import give_back_freed_memory
from passes.rewrites.chunk import chunked, chunked_backward
from passes.rewrites.rows.primitives import PRIMITIVES
from passes.rewrites.rows.recipes import Recipe
from tests.graphs import measured_peak

WIDTH = 8
RECIPES = [
    """
v0 = linear(x0, w0, w1)
v1 = gelu(v0, approximate='none')
v2 = linear(v1, w2, None)
v3 = add(v2, x0)
""",
    """
v0 = linear(x0, w0, None)
v1 = silu(v0)
v2 = linear(x0, w0, w1)
v3 = mul(v1, v2)
v4 = linear(v3, w2, w3)
""",
    """
v0 = layer_norm(x0, w3, w4, eps=1e-05)
v1 = linear(v0, w0, w1)
v2 = gelu(v1, approximate='tanh')
v3 = sub(v2, 2)
""",
    """
v0 = rms_norm(x0, w3, eps=None)
v1 = linear(v0, w0, w1)
v2 = relu(v1)
v3 = pow(v2, exponent=2)
v4 = linear(v3, w2, w4)
""",
    """
v0 = layer_norm(x0, None, None, eps=0.01)
v1 = rms_norm(v0, None, eps=0.01)
v2 = div(v1, 3.0)
v3 = mul(v2, w5)
""",
    """
v0 = pow(x0, exponent=2)
v1 = mean(v0)
v2 = add(v1, 1e-06)
v3 = rsqrt(v2)
v4 = mul(x0, v3)
v5 = mul(w3, v4)
""",
    """
v0 = narrow(x0, start=0, length=4)
v1 = narrow(x0, start=4, length=4)
v2 = sigmoid(v0)
v3 = tanh(v1)
v4 = div(v2, v3)
v5 = cat(v1, v4, x0)
""",
    """
v0 = linear(x0, w0, w1)
v1 = sub(x1, v0)
v2 = neg(v1)
v3 = to(v2, dtype='float64')
v4 = logsumexp(v3, keepdim=False)
""",
    """
v0 = linear(x0, w0, w1)
v1 = logsumexp(v0, keepdim=True)
v2 = sub(x0, v1)
v3 = add(v2, w3)
v4 = mul(v3, v1)
""",
]
RECIPES = [text.strip() for text in RECIPES]


def operands(
    dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = (5,), hidden: int = 4 * WIDTH
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of WIDTH and of `hidden` features, and shared operands.

    The shared operands have all shapes of the recipes.
    """
    rows = [torch.randn(*lead, width, dtype=dtype, requires_grad=True) for width in (WIDTH, hidden)]
    shapes = [(hidden, WIDTH), (hidden,), (WIDTH, hidden), (WIDTH,), (WIDTH,), ()]
    return rows, [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def used(text: str, rows: list[Tensor], shared: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The operands up to the last that a recipe names."""
    counts: list[int] = []
    for letter in "xw":
        numbers = map(int, re.findall(rf"\b{letter}(\d+)", text))
        counts.append(max(numbers, default=-1) + 1)
    return rows[: counts[0]], shared[: counts[1]]


# Rows and hidden features; in some as many rows as features, or as hidden features.
SIZES = [(5, 4 * WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, 4 * WIDTH), (5, WIDTH), (WIDTH, WIDTH)]


@pytest.mark.parametrize(("count", "hidden"), SIZES)
@pytest.mark.parametrize("text", RECIPES)
def test_chunks_give_the_recipes_result_and_derivative(text: str, count: int, hidden: int) -> None:
    rows, shared = used(text, *operands(lead=(count,), hidden=hidden))
    assert str(Recipe.parse(text)) == text
    expected = Recipe.parse(text).run(rows, shared)
    for chunk_rows in (1, 2, 5, 7):
        torch.testing.assert_close(chunked(rows, shared, text, chunk_rows), expected)

    def split(*tensors: Tensor) -> Tensor:
        return chunked(list(tensors[: len(rows)]), list(tensors[len(rows) :]), text, 2)

    assert torch.autograd.gradcheck(split, (*rows, *shared), fast_mode=True)


# A head whose result is computed from indices, and from rounded numbers.
WITHOUT_GRADIENT = [
    """
v0 = linear(x0, w0, w1)
v1 = argmax(v0, keepdim=True)
v2 = to(v1, dtype='float64')
v3 = mul(v2, w3)
""",
    """
v0 = linear(x0, w0, w1)
v1 = to(v0, dtype='int32')
v2 = to(v1, dtype='float64')
v3 = linear(v2, w2, w3)
""",
]


@pytest.mark.parametrize("text", WITHOUT_GRADIENT, ids=["argmax", "to"])
def test_gradients_stop_at_integers(text: str) -> None:
    text = text.strip()
    rows, shared = used(text, *operands())
    out = chunked(rows, shared, text, 2)
    expected = Recipe.parse(text).run(rows, shared)
    grad = torch.randn_like(out)
    # A custom operator has zeros where torch has no gradient.
    of_chunks, of_torch = (
        torch.autograd.grad(
            result, [*rows, *shared], grad, allow_unused=True, materialize_grads=True
        )
        for result in (out, expected)
    )
    torch.testing.assert_close(of_chunks, of_torch)
    assert of_torch[-1].count_nonzero() > 0


def test_every_primitive_with_a_gradient_is_in_a_recipe() -> None:
    tested = set[str]()
    for text in RECIPES:
        tested.update(step.primitive for step in Recipe.parse(text).steps)
    with_gradient = {
        name for name, primitive in PRIMITIVES.items() if primitive.backward is not None
    }
    assert tested == with_gradient


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators keep freed memory")
def test_the_memory_of_chunks_is_returned_to_the_system() -> None:
    rows = [torch.randn(2**15, 64)]
    shared = [torch.randn(1024, 64), torch.randn(1024), torch.randn(64, 1024)]
    # The first run loads libraries, and sets the size up to which glibc keeps freed blocks.
    chunked(rows, shared, RECIPES[0], 2048)
    give_back_freed_memory()
    before = Process().memory_info().rss
    out = chunked(rows, shared, RECIPES[0], 2048)
    assert Process().memory_info().rss - before == pytest.approx(out.nbytes, abs=2**20)


@pytest.mark.parametrize("lead", [(1,), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dims_are_rows(lead: tuple[int, ...]) -> None:
    rows, shared = used(RECIPES[0], *operands(lead=lead))
    at_once = Recipe.parse(RECIPES[0]).run(rows, shared)
    split = chunked(rows, shared, RECIPES[0], 2)
    grad = torch.randn_like(at_once)
    torch.testing.assert_close(split, at_once)
    grads, expected = (torch.autograd.grad(out, [*rows, *shared], grad) for out in (split, at_once))
    torch.testing.assert_close(grads, expected)


def test_the_operators_pass_opcheck() -> None:
    """Schema, fake kernels, autograd registration, dynamic shapes."""
    rows, shared = used(RECIPES[1], *operands(lead=(2, 3)))
    torch.library.opcheck(chunked, (rows, shared, RECIPES[1], 4))
    with torch.no_grad():
        grad = torch.randn(2, 3, WIDTH, dtype=torch.float64)
        needs_grad = [True, True, False, True, False]
        arguments = (grad, rows, shared, RECIPES[1], 4, needs_grad)
        torch.library.opcheck(chunked_backward, arguments, test_utils="test_schema")


def test_backward_recomputes_only_values_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two linears the first."""
    calls: list[int] = []
    linear = PRIMITIVES["linear"].forward

    def counting(x: Tensor, *weights: Tensor) -> Tensor:
        calls.append(weights[0].shape[0])
        return linear(x, *weights)

    monkeypatch.setattr(
        "passes.rewrites.rows.steps.PRIMITIVES",
        {**PRIMITIVES, "linear": replace(PRIMITIVES["linear"], forward=counting)},
    )
    rows, shared = used(RECIPES[0], *operands())
    out = chunked(rows, shared, RECIPES[0], 5)
    calls.clear()
    out.sum().backward()
    assert calls == [4 * WIDTH]


# The last recipe's logsumexp has more workspace in backward.
@pytest.mark.parametrize("text", RECIPES[:-1])
def test_a_chunk_takes_the_predicted_bytes(text: str) -> None:
    """A chunk's bytes beyond its results.

    Forward they are the values live at one time, backward at most all values twice.
    """
    rows, shared = used(text, *operands(torch.float32, (8192,)))
    recipe = Recipe.parse(text)
    chunk_bytes = 2048 * recipe.row_bytes(rows, shared)
    live_bytes = 2048 * recipe.live_bytes(rows, shared)
    out = chunked(rows, shared, text, 2048)
    forward = measured_peak(lambda: chunked(rows, shared, text, 2048))
    leaves, grad = [*rows, *shared], torch.ones_like(out)
    backward = measured_peak(
        lambda: chunked_backward(grad, rows, shared, text, 2048, [True] * len(leaves))
    )
    slack = 4096 * len(leaves)
    assert forward <= out.nbytes + chunk_bytes + slack
    if "logsumexp" not in text:  # whose kernel allocates exponentials
        assert forward == pytest.approx(out.nbytes + live_bytes, abs=slack)
    assert backward <= sum(leaf.nbytes for leaf in leaves) + 2 * chunk_bytes + slack
