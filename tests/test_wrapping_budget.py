"""Models of any kind with attention= under a memory_budget."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import compiled_dilated as cd
import passes
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs
from passes.planning import choice_cache
from passes.planning.tracing import captured
from tests.caches import empty_inductor_caches
from tests.graphs import WIDTH, Block, Gelu
from tests.support.wrapped import gradients

TOKENS = 1024
WINDOW = masks.window(9)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    apart = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=apart.abs() <= 9)


def model(attend: Any = F.scaled_dot_product_attention) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(Gelu(), attend=attend))


def inputs() -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_gradients_sites_report_and_least_budget() -> None:
    torch._dynamo.reset()
    x = inputs()
    message = r"memory_budget must be at least .* Raise it"
    with pytest.raises(passes.BudgetError, match=message) as refused:
        cd.compile(model(), attention=WINDOW, memory_budget="100KiB")(x)
    budget = refused.value.least_bytes
    torch._dynamo.reset()
    net = model()
    planned = cd.compile(net, attention=WINDOW, memory_budget=budget)
    assert planned is net
    expected = gradients(model(windowed), x)
    assert (gradients(planned, x) - expected).norm() <= 1e-5 * expected.norm()
    (row,) = [site.to_json() for site in cd.sites(planned)]
    assert row["path"] == "0"
    assert row["program"] == "Program((Branch(window(9)),))"
    assert row["pairs"] < row["pairs_eager"]
    assert row["flops"] < row["flops_eager"]
    report = passes.report(planned, [x])
    assert report.choices[0].chosen.passes
    inputs_bytes = x.nbytes + sum(weight.nbytes for weight in planned.parameters())
    assert report.measured_bytes is not None
    assert report.measured_bytes + inputs_bytes <= 1.03 * budget
    line = r"graph 0, training: predicted peak .* graphs.py:\d+ in forward"
    assert re.search(line, str(report), re.DOTALL)


def test_copies_are_planned_anew() -> None:
    torch._dynamo.reset()
    planned = cd.compile(model(), attention=WINDOW, memory_budget="1GiB")
    out = planned(inputs())
    copied = copy.deepcopy(planned)
    with pytest.raises(ValueError, match="must have been called once"):
        passes.report(copied)
    assert torch.equal(copied(inputs()), out)
    assert len(passes.report(copied).choices) == 1


def test_choices_of_one_program_are_not_found_for_another() -> None:
    """The graphs differ only in the names of their attention."""
    names = []

    def name(graph: GraphModule, example_inputs: Any) -> Any:
        names.append(choice_cache.name_of(captured(graph, example_inputs), "", ()))
        return graph.forward

    for program in (WINDOW, masks.window(10), WINDOW):
        torch._dynamo.reset()
        # The backend runs nothing, so wrapping reports that nothing was replaced.
        with empty_inductor_caches(), torch.no_grad(), contextlib.suppress(RuntimeError):
            graphs.wrap(model(), program, None, name)(inputs())
    assert names[0] == names[2] != names[1]


@pytest.mark.slow
def test_modules_of_torch_have_lines() -> None:
    """Dynamo records no lines of torch's own modules.

    The report names module and forward.
    """
    torch._dynamo.reset()
    x = torch.randn(2, 32, WIDTH)
    step = cd.compile(
        nn.Transformer(WIDTH, 4, 1, 1, 96, 0.0, batch_first=True),
        attention=None,
        memory_budget="1GiB",
    )
    with torch.no_grad():
        step(x, x)
    (graph,) = passes.report(step).to_json()["graphs"]
    sources = {live["source"] for live in graph["live"] if live["name"] != "(inputs)"}
    assert all(re.match(r"\w+\.py:\d+ in \w+ of (en|de)coder\.", source) for source in sources)
    assert Path(nn.MultiheadAttention.forward.__code__.co_filename).name in " ".join(sources)
