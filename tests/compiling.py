"""Compiling in the tests of passes: inductor's graphs, and measured peaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch.fx import Graph, GraphModule

from passes.analysis import footprint
from tests.graphs import measured_peak


class Loss(nn.Module):
    """Layers and a loss, for steps of one graph."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class _Stopped(Exception):
    """Ends a compilation once its graph is captured."""


def lowered(run: Callable[[], object], *, stop: bool = False) -> list[GraphModule]:
    """The graphs that inductor lowers during a run.

    stop: only the first of them, and nothing is compiled
    """
    graphs: list[GraphModule] = []

    def keep(graph: Graph) -> None:
        assert graph.owning_module is not None
        graphs.append(footprint.copied(graph.owning_module))
        if stop:
            raise _Stopped

    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=keep, force_disable_caches=True):
        try:
            run()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Stopped):
                raise
    return graphs


def joint(model: nn.Module, *inputs: Tensor, **options: Any) -> GraphModule:
    """The joint graph of a model's forward and backward; nothing is compiled."""
    graphs: list[GraphModule] = []

    def keep(graph: Graph) -> None:
        assert graph.owning_module is not None
        graphs.append(footprint.copied(graph.owning_module))
        raise _Stopped

    torch._dynamo.reset()
    with config.patch(joint_custom_post_pass=keep, force_disable_caches=True), torch.enable_grad():
        try:
            torch.compile(model, **options)(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Stopped):
                raise
    return graphs[0]


def inference(model: nn.Module, *inputs: Tensor, **options: Any) -> GraphModule:
    """The graph that inductor lowers for a model's inference; nothing is compiled."""
    with torch.no_grad():
        (graph,) = lowered(lambda: torch.compile(model, **options)(*inputs), stop=True)
    return graph


@dataclass(frozen=True)
class Compiled:
    """A compiled inference: its result, measured peak, and lines of passes."""

    result: Any
    peak_bytes: int
    lines: list[str]


def compiled(model: nn.Module, *inputs: Tensor, passes: Sequence[Any] = ()) -> Compiled:
    """Compile a model with passes of Stage.LOWERED, and run it."""
    lines: list[str] = []

    def apply(graph: Graph) -> None:
        for member in passes:
            lines.extend(member(graph))

    options: dict[str, Any] = {"post_grad_custom_post_pass": apply, "force_disable_caches": True}
    for member in passes:
        options |= getattr(member, "options", {})
    torch._dynamo.reset()
    with config.patch(options), torch.no_grad():
        run = torch.compile(model)
        result = run(*inputs)
        return Compiled(result, measured_peak(lambda: run(*inputs)), lines)


def train(step: Callable[..., Any], parameters: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Run a step that returns a loss; return the parameters' gradients."""
    with torch.enable_grad():
        return torch.autograd.grad(step(x), parameters)


def trained(
    model: nn.Module, x: Tensor, **options: Any
) -> tuple[list[GraphModule], Callable[[Tensor], int]]:
    """The two graphs of a training step, and its peak's measurement."""
    step = torch.compile(model, **options)

    def run(x: Tensor) -> None:
        with torch.enable_grad():
            step(x).backward()

    def measure(x: Tensor) -> int:
        for parameter in model.parameters():
            parameter.grad = None
        return measured_peak(lambda: run(x))

    return lowered(lambda: run(x)), measure
