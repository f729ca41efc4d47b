"""Attention inside a user's torch.compile.

There are no graph breaks and few graphs for many lengths, and the numbers are eager's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.masks import Mask
from tests.cases import by_name

# Twenty lengths as they come, ragged ones, both sides of a power of two, and 1.
LENGTHS = (100, 64, 128, 127, 129, 1, 2, 37, 200, 331, 256, 255, 257, 96, 3, 500, 61, 144, 31, 250)


pytestmark = pytest.mark.usefixtures("fresh")


class Model(nn.Module):
    """A user's block with grouped heads and learned sinks.

    Projections, attention and a residual.
    """

    def __init__(
        self,
        program: Program | Mask,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        **options: Any,
    ) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.widths = (dim, kv_heads * self.head_dim, kv_heads * self.head_dim)
        self.attend, self.options = cd.compile(program), options
        self.qkv, self.out = nn.Linear(dim, sum(self.widths)), nn.Linear(dim, dim)
        self.sinks = nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        projections = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projections)
        out = self.attend(q, k, v, sink_logits=self.sinks, **self.options, **options)
        return x + self.out(out.transpose(1, 2).flatten(2))


def compiled(
    function: Any, backend: str = "aot_eager", **options: Any
) -> tuple[Any, CompileCounterWithBackend]:
    """The function in one graph, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def same(actual: Any, expected: Any) -> None:
    """Tensors, or sequences of them, are equal to float32's rounding."""
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


LONGNET = cd.longnet((16, 48, 144), (1, 3, 9), causal=True)
WINDOW_OR_SINKS = masks.causal() & (masks.window(20) | masks.sinks(3))


@pytest.mark.parametrize(
    ("program", "lengths", "dynamic"),
    [(LONGNET, LENGTHS, None), (WINDOW_OR_SINKS, LENGTHS[:7], True)],
    ids=["longnet", "window or sinks"],
)
def test_few_graphs_for_many_lengths(
    program: Program | Mask, lengths: tuple[int, ...], dynamic: bool | None
) -> None:
    """At most 4 graphs for 20 lengths of training.

    Forward and gradients are those of eager calls.
    """
    model = Model(program)
    fast, counter = compiled(model, dynamic=dynamic)
    for n in lengths:
        check(fast, model, torch.randn(2, n, 32))
    assert 1 <= counter.frame_count <= 4


def check(fast: Any, model: Model, x: Tensor) -> None:
    """Forward and gradients as in eager."""
    actual, expected = fast(x), model(x)
    same(actual, expected)
    grads = gradients(model, actual.square().mean())
    same(grads, gradients(model, expected.square().mean()))


def test_few_graphs_without_gradients() -> None:
    model = Model(LONGNET)
    fast, counter = compiled(model)
    with torch.no_grad():
        for n in LENGTHS:
            x = torch.randn(1, n, 32)
            same(fast(x), model(x))
    assert 1 <= counter.frame_count <= 4


def test_inductor() -> None:
    """torch's own backend, forward and backward: 2 graphs for three lengths."""
    model = Model(LONGNET)
    fast, counter = compiled(model, "inductor")
    for n in (40, 131, 64):
        check(fast, model, torch.randn(2, n, 32))
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize(
    "name",
    [
        "hilbert window",
        "branches of different orders",
        "congruent grouped",
        "neighborhood shifted",
        "tiles",
        "from_mod per head",
    ],
)
def test_every_kind_of_program_compiles_to_one_graph(name: str) -> None:
    case = by_name(name)
    inputs, attend = case.inputs(129, torch.float32), cd.compile(case.program(129))
    q, k, v = inputs.q, inputs.k, inputs.v
    fast, counter = compiled(lambda q, k, v: attend(q, k, v, return_lse=True))
    same(fast(q, k, v), attend(q, k, v, return_lse=True))
    assert counter.frame_count == 1


def test_one_operator_in_the_graph() -> None:
    attend = cd.compile(LONGNET)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    explained = torch._dynamo.explain(lambda: attend(q, k, v))()
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


@pytest.mark.parametrize("name", ["documents by ids, causal", "padding and documents"])
def test_new_data_compiles_nothing(name: str) -> None:
    case = by_name(name)
    attend = cd.compile(case.program(128))
    inputs = case.inputs(128, torch.float32)
    q, k, v = inputs.q, inputs.k, inputs.v
    fast, counter = compiled(lambda q, k, v, data: attend(q, k, v, data=data))
    for step in range(6):
        data = {key: value.roll(step, dims=1) for key, value in inputs.data.items()}
        same(fast(q, k, v, data), attend(q, k, v, data=data))
    assert counter.frame_count == 1


def test_decoding_compiles_a_few_times_at_most() -> None:
    """The cache's length and the position become variables of the graph."""
    attend = cd.compile(cd.longnet((16, 48), (1, 3), causal=True))
    q, k, v = (torch.randn(1, 2, 120, 8) for _ in range(3))
    expected = attend(q, k, v)
    fast, counter = compiled(lambda q, k, v, at: attend(q, k, v, q_offset=at))
    with torch.no_grad():
        for at in range(0, 120, 3):
            row = fast(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], at)
            same(row, expected[:, :, at : at + 1])
        for at in range(0, 110, 7):  # the complete cache, several tokens at a time
            same(fast(q[:, :, at : at + 5], k, v, at), expected[:, :, at : at + 5])
    assert 1 <= counter.frame_count <= 5


def slopes(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score - abs(q - kv) * (h + 1) / 64


OPTIONS: dict[str, dict[str, Any]] = {"score_mod": {"score_mod": slopes}, "scale": {"scale": 0.3}}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_inside_a_compiled_model(name: str) -> None:
    model = Model(LONGNET, **OPTIONS[name])
    fast, counter = compiled(model)
    for n in (40, 64, 131):
        check(fast, model, torch.randn(2, n, 32))
    assert 1 <= counter.frame_count <= 2


def test_gradient_through_the_lse() -> None:
    attend = cd.compile(LONGNET)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attend(q, k, v, return_lse=True)
        return out.sin().sum() + lse.cos().sum()

    inputs = tuple(torch.randn(1, 2, 50, 8, requires_grad=True) for _ in range(3))
    fast, _ = compiled(loss)
    grads = torch.autograd.grad(fast(*inputs), inputs)
    same(grads, torch.autograd.grad(loss(*inputs), inputs))


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_modes(mode: Callable[[], Any]) -> None:
    model = Model(WINDOW_OR_SINKS)
    fast, _ = compiled(model)
    x = torch.randn(2, 40, 32)
    with mode():
        same(fast(x), model(x))
    same(fast(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)


def test_bad_input_is_refused_in_a_compiled_model() -> None:
    attend = cd.compile(masks.causal())
    fast, _ = compiled(lambda q, k, v: attend(q, k, v))
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(Exception, match="q and k must have one head_dim"):
        fast(q, torch.randn(1, 2, 8, 6), q)
