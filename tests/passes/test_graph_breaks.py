"""Models that break into several graphs, under a memory budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx

import passes
from passes.planning import backend
from passes.planning.choose import Choice, Pipeline
from passes.planning.estimates import Estimate
from passes.planning.tracing import Captured, Traced
from tests.compiling import Loss, train
from tests.graphs import WIDTH, Gelu


class Broken(nn.Module):
    """Layers with a graph break after the first."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.rest = layers[0], nn.Sequential(*layers[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.rest(x)


class Looped(nn.Module):
    """Layers with a graph break after each; Dynamo compiles each layer alone."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


class Deeper(nn.Module):
    """Two layers in training, one in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Gelu(), Gelu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if self.training else x


@pytest.fixture(autouse=True)
def _without_earlier_graphs() -> None:
    torch._dynamo.reset()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they are, and get no pass."""

    def choose(self: Pipeline, graph: Captured) -> Choice:
        plain = Estimate((), 0, 0, 0.0, False)
        return Choice(plain, (plain,), Traced((), graph.module, None, ()))

    monkeypatch.setattr(Pipeline, "choose", choose)
    monkeypatch.setattr(compile_fx, "compile_fx", lambda module, inputs, **options: module)


def test_a_budget_warns_once_of_several_graphs() -> None:
    torch.manual_seed(0)
    model, x = Broken(Gelu(), Gelu(), Loss(Gelu())), torch.randn(64, WIDTH)
    parameters = list(model.parameters())
    step = passes.compile(model, memory_budget="1GiB", passes=[], dynamic=False)
    with pytest.warns(UserWarning, match="breaks into several.*1,073,741,824.*fullgraph") as caught:
        grads = train(step, parameters, x)
    assert len([warning for warning in caught if "memory_budget" in str(warning.message)]) == 1
    assert len(backend.choices(step)) == 2
    torch.testing.assert_close(grads, train(model, parameters, x))


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="memory_budget")
        yield


def again(step: Callable[..., Any], reset: Callable[[], None]) -> None:
    """Run a step at several sizes, before and after resets."""
    functions: list[Callable[[Tensor], Tensor]] = [lambda x: x + 1, lambda x: x + 2]
    for number in range(3):
        # Dynamo numbers functions by the order in which it compiles them.
        for function in functions[:number]:
            torch.compile(function, backend="eager")(torch.ones(2))
        for tokens in (8, 16):
            step(torch.randn(tokens, WIDTH))
        reset()


@pytest.mark.usefixtures("uncompiled", "no_warnings")
def test_graphs_for_other_sizes_are_no_parts_of_a_step() -> None:
    step = passes.compile(Gelu(), memory_budget="1GiB", dynamic=False)
    again(step, lambda: None)
    assert len(backend.choices(step)) == 2
    again(step, torch._dynamo.reset)
    # Compiled anew after each reset but the last.
    assert len(backend.choices(step)) == 2 + 2 * 2


@pytest.mark.usefixtures("uncompiled", "no_warnings")
def test_graphs_of_two_modes_are_no_parts_of_a_step() -> None:
    model = Deeper()
    step = passes.compile(model, memory_budget="1GiB")
    for training in (True, False):
        model.train(training)
        step(torch.randn(8, WIDTH))
    assert len(backend.choices(step)) == 2


@pytest.mark.usefixtures("uncompiled", "no_warnings")
def test_without_a_budget_there_is_nothing_to_warn_of() -> None:
    step = passes.compile(Broken(Gelu(), Gelu()), passes=[], dynamic=False)
    step(torch.randn(8, WIDTH))
    assert len(backend.choices(step)) == 2


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", [Broken, Looped])
def test_every_backend_warns_for_itself(kind: Callable[..., nn.Module]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        step = torch.compile(kind(Gelu(), Gelu()), backend=backend.backend("1GiB"))
        with pytest.warns(UserWarning, match="breaks into several"):
            step(torch.randn(8, WIDTH))
