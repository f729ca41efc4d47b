"""Compiling in tests of passes/: the graphs that inductor is given, with a pass or without, and what a training step takes."""

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
    """A model whose step is one compiled graph, with its loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class _Enough(Exception):
    """There is no need to go on compiling."""


def lowered(run: Callable[[], object], *, stop: bool = False) -> list[GraphModule]:
    """The graphs that inductor is given while something is compiled; with `stop` the first one alone, and nothing is compiled."""
    found: list[GraphModule] = []

    def keep(graph: Graph) -> None:
        assert graph.owning_module is not None
        found.append(footprint.copied(graph.owning_module))
        if stop:
            raise _Enough

    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=keep, force_disable_caches=True):
        try:
            run()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Enough):
                raise
    return found


def joint(model: nn.Module, *inputs: Tensor, **options: Any) -> GraphModule:
    """The forward and backward of a model in one graph, as inductor is given it; nothing is compiled."""
    found: list[GraphModule] = []

    def keep(graph: Graph) -> None:
        assert graph.owning_module is not None
        found.append(footprint.copied(graph.owning_module))
        raise _Enough

    torch._dynamo.reset()
    with config.patch(joint_custom_post_pass=keep, force_disable_caches=True), torch.enable_grad():
        try:
            torch.compile(model, **options)(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Enough):
                raise
    return found[0]


def inference(model: nn.Module, *inputs: Tensor, **options: Any) -> GraphModule:
    """The graph of a model that inductor is given; nothing is compiled."""
    with torch.no_grad():
        (graph,) = lowered(lambda: torch.compile(model, **options)(*inputs), stop=True)
    return graph


@dataclass(frozen=True)
class Compiled:
    """What a compiled inference gives, the bytes it takes, and the lines of its passes."""

    result: Any
    peak_bytes: int
    lines: list[str]


def compiled(model: nn.Module, *inputs: Tensor, passes: Sequence[Any] = ()) -> Compiled:
    """Compiles with passes at the lowered stage and what they ask for, and runs."""
    lines: list[str] = []
    options = {
        name: value for each in passes for name, value in getattr(each, "options", {}).items()
    }

    def apply(graph: Graph) -> None:
        for each in passes:
            lines.extend(each(graph))

    torch._dynamo.reset()
    with (
        config.patch(
            {"post_grad_custom_post_pass": apply, "force_disable_caches": True, **options}
        ),
        torch.no_grad(),
    ):
        run = torch.compile(model)
        result = run(*inputs)
        return Compiled(result, measured_peak(lambda: run(*inputs)), lines)


def trained(
    model: nn.Module, x: Tensor, **options: Any
) -> tuple[list[GraphModule], Callable[[Tensor], int]]:
    """The two graphs of a training step, and what measures the bytes that a step takes."""
    step = torch.compile(model, **options)

    def run(x: Tensor) -> None:
        with torch.enable_grad():
            step(x).backward()

    def measure(x: Tensor) -> int:
        for parameter in model.parameters():
            parameter.grad = None
        return measured_peak(lambda: run(x))

    return lowered(lambda: run(x)), measure
