"""The operator that runs a recipe in chunks of rows: its forward against the recipe run whole, its backward, what both hold."""

from __future__ import annotations

import re
import sys

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
    "v0 = linear(x0, w0, w1)\nv1 = gelu(v0, approximate='none')\nv2 = linear(v1, w2, None)\nv3 = add(v2, x0)",
    "v0 = linear(x0, w0, None)\nv1 = silu(v0)\nv2 = linear(x0, w0, w1)\nv3 = mul(v1, v2)\nv4 = linear(v3, w2, w3)",
    "v0 = layer_norm(x0, w3, w4, eps=1e-05)\nv1 = linear(v0, w0, w1)\nv2 = gelu(v1, approximate='tanh')\nv3 = sub(v2, 2)",
    "v0 = rms_norm(x0, w3, eps=None)\nv1 = linear(v0, w0, w1)\nv2 = relu(v1)\nv3 = pow(v2, exponent=2)\nv4 = linear(v3, w2, w4)",
    "v0 = layer_norm(x0, None, None, eps=0.01)\nv1 = rms_norm(v0, None, eps=0.01)\nv2 = div(v1, 3.0)\nv3 = mul(v2, w5)",
    "v0 = pow(x0, exponent=2)\nv1 = mean(v0)\nv2 = add(v1, 1e-06)\nv3 = rsqrt(v2)\nv4 = mul(x0, v3)\nv5 = mul(w3, v4)",
    "v0 = narrow(x0, start=0, length=4)\nv1 = narrow(x0, start=4, length=4)\nv2 = sigmoid(v0)\nv3 = tanh(v1)\n"
    "v4 = div(v2, v3)\nv5 = cat(v1, v4, x0)",
    "v0 = linear(x0, w0, w1)\nv1 = sub(x1, v0)\nv2 = neg(v1)\nv3 = to(v2, dtype='float64')\nv4 = logsumexp(v3, keepdim=False)",
    "v0 = linear(x0, w0, w1)\nv1 = logsumexp(v0, keepdim=True)\nv2 = sub(x0, v1)\nv3 = add(v2, w3)\nv4 = mul(v3, v1)",
]


def operands(
    dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = (5,), hidden: int = 4 * WIDTH
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of 8 and of `hidden` features; weights of all shapes that the recipes have."""
    rows = [torch.randn(*lead, width, dtype=dtype, requires_grad=True) for width in (WIDTH, hidden)]
    shapes = [(hidden, WIDTH), (hidden,), (WIDTH, hidden), (WIDTH,), (WIDTH,), ()]
    return rows, [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def used(text: str, rows: list[Tensor], shared: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The first of each up to the last that a recipe names, so that every gradient is one."""
    count = {
        kind: max((int(each) for each in re.findall(rf"\b{kind}(\d+)", text)), default=-1) + 1
        for kind in "xw"
    }
    return rows[: count["x"]], shared[: count["w"]]


# As many rows as features, as hidden ones, as both.
SIZES = [(5, 4 * WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, 4 * WIDTH), (5, WIDTH), (WIDTH, WIDTH)]


@pytest.mark.parametrize(("count", "hidden"), SIZES)
@pytest.mark.parametrize("text", RECIPES)
def test_the_operator_is_its_recipe_and_its_backward_the_derivative(
    text: str, count: int, hidden: int
) -> None:
    rows, shared = used(text, *operands(lead=(count,), hidden=hidden))
    assert str(Recipe.parse(text)) == text
    whole = Recipe.parse(text).run(rows, shared)
    for chunk_rows in (1, 2, 5, 7):
        torch.testing.assert_close(chunked(rows, shared, text, chunk_rows), whole)

    def split(*given: Tensor) -> Tensor:
        return chunked(list(given[: len(rows)]), list(given[len(rows) :]), text, 2)

    assert torch.autograd.gradcheck(split, (*rows, *shared), fast_mode=True)


def test_every_primitive_with_a_gradient_is_in_a_recipe() -> None:
    tested = {step.primitive for text in RECIPES for step in Recipe.parse(text).steps}
    assert tested == {
        name for name, primitive in PRIMITIVES.items() if primitive.backward is not None
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators keep what is freed")
def test_what_chunks_took_leaves_the_process() -> None:
    rows, shared = (
        [torch.randn(2**15, 64)],
        [torch.randn(1024, 64), torch.randn(1024), torch.randn(64, 1024)],
    )
    chunked(
        rows, shared, RECIPES[0], 2048
    )  # loads libraries, and sets the size below which glibc keeps what is freed
    give_back_freed_memory()
    before = Process().memory_info().rss
    out = chunked(rows, shared, RECIPES[0], 2048)
    assert Process().memory_info().rss - before == pytest.approx(out.nbytes, abs=2**20)


@pytest.mark.parametrize("lead", [(1,), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dims(lead: tuple[int, ...]) -> None:
    rows, shared = used(RECIPES[0], *operands(lead=lead))
    whole = Recipe.parse(RECIPES[0]).run(rows, shared)
    split = chunked(rows, shared, RECIPES[0], 2)
    grad = torch.randn_like(whole)
    torch.testing.assert_close(split, whole)
    found, expected = (torch.autograd.grad(out, [*rows, *shared], grad) for out in (split, whole))
    torch.testing.assert_close(found, expected)


def test_the_operator_keeps_torchs_rules() -> None:
    """Schema, fake kernels, autograd registration, dynamic shapes."""
    rows, shared = used(RECIPES[1], *operands(lead=(2, 3)))
    torch.library.opcheck(chunked, (rows, shared, RECIPES[1], 4))
    with torch.no_grad():
        grad = torch.randn(2, 3, WIDTH, dtype=torch.float64)
        wanted = [True, True, False, True, False]
        torch.library.opcheck(
            chunked_backward, (grad, rows, shared, RECIPES[1], 4, wanted), test_utils="test_schema"
        )


def test_backward_computes_again_what_it_reads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two linears the first; with frozen weights nothing but what the activation needs."""
    calls: list[int] = []
    linear = PRIMITIVES["linear"].forward

    def counting(x: Tensor, *weights: Tensor) -> Tensor:
        calls.append(weights[0].shape[0])
        return linear(x, *weights)

    monkeypatch.setattr(
        "passes.rewrites.rows.steps.PRIMITIVES",
        {**PRIMITIVES, "linear": type(PRIMITIVES["linear"])(counting, None)},
    )
    rows, shared = used(RECIPES[0], *operands())
    out = chunked(rows, shared, RECIPES[0], 5)
    calls.clear()
    out.sum().backward()
    assert calls == [4 * WIDTH]


@pytest.mark.parametrize(
    "text", RECIPES[:-1]
)  # the last one's logsumexp takes more in backward too
def test_a_chunk_takes_what_was_said(text: str) -> None:
    """Forward what it holds at once, backward twice the bytes of all its values, beyond the result and the gradients."""
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
    if "logsumexp" not in text:  # its kernel holds exponentials of its own
        assert forward == pytest.approx(out.nbytes + live_bytes, abs=slack)
    assert backward <= sum(each.nbytes for each in leaves) + 2 * chunk_bytes + slack
