"""Exported and compiled models compute the same after their caches are emptied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.caches import forget
from tests.support.exported import MODELS, N, same

pytestmark = pytest.mark.usefixtures("fresh")

CACHED = ("longnet", "ring", "tiled", "data", "parameters", "closures")


@pytest.mark.parametrize("name", [*CACHED, "many documents"])
def test_exported_models_work_with_emptied_caches(name: str) -> None:
    """Between forward and backward, and between calls."""
    check_with_emptied_caches(name, "eager")


@pytest.mark.parametrize("name", [*CACHED, "many documents"])
def test_compiled_models_work_with_emptied_caches(name: str) -> None:
    """Between compiling and running too."""
    check_with_emptied_caches(name, "aot_eager")


def check_with_emptied_caches(name: str, how: str) -> None:
    model = MODELS[name]
    built = model.make()
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in model.inputs(N)]
    leaves = [x for x in (*inputs, *built.parameters()) if x.requires_grad]

    def results(run: Any, empty: bool) -> list[Tensor]:
        out = run(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        if empty:
            forget()
        grads = torch.autograd.grad(
            sum(x.masked_fill(x.isinf(), 0).sin().sum() for x in out), leaves
        )
        if empty:
            forget()
        return [*out, *grads]

    expected = results(built, empty=False)

    def emptying(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        forget()
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, list(inputs))
        forget()
        return compiled

    run = built if how == "eager" else torch.compile(built, backend=emptying, fullgraph=True)
    forget()
    for _ in range(3):
        same(results(run, empty=True), expected)
