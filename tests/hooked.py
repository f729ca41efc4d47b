"""Passes at work, for their tests: in the graph that Dynamo captures, run as it is or by inductor, and in an exported one."""

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
    """A pass as inductor takes it. `lines`: what it said, all its graphs together. No graph is taken from the compile cache."""

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
    """`model` with its graph rewritten and run node by node, and the lines of the pass, which come when it first runs.

    A module's floats are numbers in it. dynamic=True makes tensors of them at first; inductor then asks again for those that it
    cannot take so.
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
    """The same compiled by inductor. None: without a pass."""
    hook = Hook(rewriting) if rewriting is not None else None
    torch._dynamo.reset()
    step = torch.compile(
        model,
        dynamic=dynamic,
        fullgraph=True,
        options={"pre_grad_custom_pass": hook} if hook else None,
    )
    return step, hook.lines if hook else []


def exported(
    model: nn.Module, rewriting: Pass, *inputs: Any, dynamic: Any = None
) -> tuple[GraphModule, list[str]]:
    """`model` as torch.export gives it, rewritten."""
    module = torch.export.export(model, inputs, dynamic_shapes=dynamic).module()
    assert isinstance(module, GraphModule)
    lines = list(rewriting(module.graph))
    module.graph.lint()
    module.recompile()
    return module, lines
