"""Passes applied to graphs of Dynamo, of inductor, and of torch.export."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from passes.protocol import Pass


class Hook(CustomGraphPass):
    """A pass as a hook of inductor, without the compile cache.

    lines: the pass's report, all graphs together.
    """

    def __init__(self, rewriting: Pass) -> None:
        self.rewriting, self.lines = rewriting, list[str]()

    def __call__(self, graph: Graph) -> None:
        self.lines += self.rewriting(graph)
        graph.lint()

    def __deepcopy__(self, _: object) -> Hook:
        """torch.export's compiler copies its settings."""
        return self

    def uuid(self) -> str:
        return uuid.uuid4().hex


def captured(
    model: Callable[..., Any], rewriting: Pass, *, dynamic: bool = True
) -> tuple[Callable[..., Any], list[str]]:
    """The model with its graph rewritten, and the lines of the pass.

    The graph is run node by node.

    The lines are filled by the first call. A module's floats stay numbers in the graph, as in
    inductor, which specializes those that dynamic=True would turn into tensors.
    """
    hook = Hook(rewriting)

    def backend(module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        hook(module.graph)
        module.recompile()
        return module

    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    return torch._dynamo.config.patch(specialize_float=True)(step), hook.lines


def compiled(
    model: Callable[..., Any], rewriting: Pass | None, *, dynamic: bool = True
) -> tuple[Callable[..., Any], list[str]]:
    """The model compiled by inductor, and the lines of the pass.

    rewriting: None to compile without a pass.
    """
    options: dict[str, str | int | bool | Callable[..., Any]] | None = None
    lines: list[str] = []
    if rewriting is not None:
        hook = Hook(rewriting)
        options, lines = {"pre_grad_custom_pass": hook}, hook.lines
    torch._dynamo.reset()
    step = torch.compile(model, dynamic=dynamic, fullgraph=True, options=options)
    return step, lines


def exported(
    model: nn.Module, rewriting: Pass, *inputs: Any, dynamic: Any = None
) -> tuple[GraphModule, list[str]]:
    """The exported model with its graph rewritten, and the pass's lines."""
    module = torch.export.export(model, inputs, dynamic_shapes=dynamic).module()
    assert isinstance(module, GraphModule)
    lines = list(rewriting(module.graph))
    module.graph.lint()
    module.recompile()
    return module, lines
