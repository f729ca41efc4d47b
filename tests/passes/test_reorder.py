"""Node orders and buffers: precedences, the same bits, lower measured peaks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from passes.analysis import footprint, peak
from passes.analysis.liveness import lifetimes
from passes.protocol import Pass, Stage
from passes.rewrites.materialize import Materialize
from passes.rewrites.order_search import search
from passes.rewrites.reorder import Reorder, candidates, precedences, rearrange, steps_of
from tests.compiling import compiled, inference
from tests.graphs import (
    CASES,
    WIDTH,
    Block,
    Gelu,
    Swiglu,
    Traced,
    in_place,
    random_dag,
    without_subgraphs,
)

aten = torch.ops.aten


class Products(nn.Module):
    """Matrix products in a random order.

    Their results have several widths and are used late.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.plan = [(draw.randrange(i + 1), draw.choice((16, 64, 256))) for i in range(14)]
        self.weights = nn.ParameterDict()
        for rows, columns in itertools.product((16, 64, 256), repeat=2):
            self.weights[f"{rows}_{columns}"] = torch.randn(rows, columns) / rows**0.5

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for source, columns in self.plan:
            values.append(values[source] @ self.weights[f"{values[source].shape[1]}_{columns}"])
        unused = set(range(len(values))) - {source for source, _ in self.plan}
        total = torch.stack([values[i].sum() for i in sorted(unused)]).sum()
        # Every third value is used again with its operand.
        again: list[Tensor] = []
        for (source, _), value in list(zip(self.plan, values[1:], strict=True))[::3]:
            again.append((value.t() @ values[source]).sum())
        return total + torch.stack(again).sum()


def layers(
    mlp: Callable[[], nn.Module] = Gelu, count: int = 4, tokens: int = 1024
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(mlp()) for _ in range(count))), torch.randn(1, tokens, WIDTH)


def random_order(graph: Graph, seed: int) -> list[Node]:
    """A random order that the precedences allow."""
    draw, before = random.Random(seed), precedences(graph, lifetimes(graph))
    order = [node for node in graph.nodes if node.op not in ("call_function", "output")]
    waiting = list(before)
    while waiting:
        node = draw.choice([call for call in waiting if before[call] <= set(order)])
        order.append(node)
        waiting.remove(node)
    return [*order, *graph.find_nodes(op="output")]


def assert_same_bits(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def noisy(x: Tensor) -> tuple[Tensor, ...]:
    """Random numbers among writes to a tensor and its view."""
    wide = x.repeat(2, 1)
    first, second = torch.rand_like(x), torch.rand_like(wide)
    wide.add_(second)
    y = wide[:4].clone()
    wide.mul_(2)
    third = torch.bernoulli(x.sigmoid())
    return (wide.sum() + y.sum(), first, third)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_any_legal_order_gives_the_same_bits(seed: int) -> None:
    """Of random numbers and of in-place operators on tensors and views."""
    for function in (noisy, in_place):
        x = torch.randn(8, 16)
        module = make_fx(function, tracing_mode="fake")(x)
        torch.manual_seed(1)
        expected = Interpreter(module).run(x.clone())
        rearrange(module.graph, random_order(module.graph, seed))
        torch.manual_seed(1)
        assert_same_bits(Interpreter(module).run(x.clone()), expected)


def test_precedences_allow_several_orders() -> None:
    module = make_fx(in_place, tracing_mode="fake")(torch.randn(8, 16))
    orders = [random_order(module.graph, seed) for seed in range(10)]
    assert any(order != list(module.graph.nodes) for order in orders)


def test_collectives_keep_their_order() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    gathered = [
        graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"))
        for _ in range(3)
    ]
    sines = [graph.call_function(aten.sin.default, (x,)) for _ in range(2)]
    graph.output((gathered, sines))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4, device="meta")
    before = precedences(graph, lifetimes(graph))
    assert before[gathered[2]] == {gathered[1]}
    assert before[gathered[1]] == {gathered[0]}
    assert not before[sines[1]]


@pytest.mark.parametrize("case", without_subgraphs(CASES), ids=str)
def test_the_search_counts_the_bytes_of_liveness(case: Traced) -> None:
    """For the graph's own order and for the best one."""
    module, inputs = case.example
    living = lifetimes(module)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    steps = steps_of([[node] for node in calls], living, precedences(module.graph, living))
    assert steps.peak(range(len(calls))) == peak.find(living).added_bytes
    # The best order, in a copy of the graph.
    trial = footprint.copied(module)
    copies = dict(zip(module.graph.nodes, trial.graph.nodes, strict=True))
    best = search(steps, width=16)
    first = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
    order = [*first, *(calls[step] for step in best), *module.graph.find_nodes(op="output")]
    rearrange(trial.graph, [copies[node] for node in order])
    assert peak.find(lifetimes(trial)).added_bytes == steps.peak(best)
    assert_same_bits(Interpreter(trial).run(*inputs), Interpreter(module).run(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_orders_are_never_worse_than_those_of_inductor(seed: int) -> None:
    graph = inference(Products(seed), torch.randn(256, 64))
    before = footprint.in_compilation(graph)
    lines = Reorder()(graph.graph)
    after = footprint.in_compilation(graph)
    assert after < before if lines else after == before


@pytest.mark.slow
def test_a_lower_peak_is_measured_with_the_same_bits() -> None:
    torch.manual_seed(0)
    model, x = Products(1), torch.randn(512, 64)
    plain, reordered = compiled(model, x), compiled(model, x, passes=[Reorder()])
    assert len(reordered.lines) == 1
    assert reordered.peak_bytes < 0.9 * plain.peak_bytes
    assert torch.equal(reordered.result, plain.result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mlp", "least", "most"), [(Gelu, 11.0, 9.0), (Swiglu, 15.0, 13.0)], ids=["gelu", "swiglu"]
)
def test_the_peak_of_four_layers_falls(
    mlp: Callable[[], nn.Module], least: float, most: float
) -> None:
    """Peaks are in units of x.

    There are so many tokens that attention's workspace is below the MLP's values.

    least: of a step without passes
    most: of a step with Reorder; Materialize saves three more
    """
    model, x = layers(mlp, tokens=8192)
    plain = compiled(model, x)
    reordered = compiled(model, x, passes=[Reorder()])
    materialized = compiled(model, x, passes=[Materialize(), Reorder()])
    assert plain.peak_bytes / x.nbytes > least
    assert reordered.peak_bytes / x.nbytes <= most
    assert materialized.peak_bytes / x.nbytes <= most - 3
    assert "shared elementwise values become buffers" in materialized.lines[0]
    assert torch.equal(reordered.result, plain.result)
    assert torch.equal(materialized.result, plain.result)


def test_shared_values_become_buffers() -> None:
    """By the predicted peak; the test above measures it."""
    model, x = layers(count=3)
    graph = inference(model, x)
    before = footprint.in_compilation(graph)
    (line,) = Materialize()(graph.graph)
    assert line.startswith("5 shared elementwise values become buffers: peak ")
    assert before - footprint.in_compilation(graph) >= 2 * x.nbytes
    assert Materialize()(graph.graph) == ()


@pytest.mark.parametrize("member", [Reorder(), Materialize()], ids=["reorder", "materialize"])
def test_graphs_of_unknown_peak_are_left_alone(member: Pass) -> None:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin() + x
            return (y.cos() @ y)[y.sum(1).nonzero()[:, 0]] * 2

    program = torch.export.export(Nonzero(), (torch.randn(4, 4),))
    module = program.run_decompositions(select_decomp_table()).graph_module
    before = str(module.graph)
    assert member(module.graph) == ()
    assert str(module.graph) == before


def test_they_are_passes() -> None:
    members: tuple[Any, ...] = (Reorder(), Materialize())
    for member in members:
        assert isinstance(member, Pass)
        assert member.stage is Stage.LOWERED
        assert eval(repr(member)) == member
    assert Reorder(width=3) != Reorder()


def test_a_graph_with_one_order_has_no_candidates() -> None:
    module: GraphModule = make_fx(lambda x: x.sin() @ x, tracing_mode="fake")(torch.ones(4, 4))
    assert candidates(module.graph) == []
    assert Reorder()(module.graph) == ()
    assert candidates(random_dag(0)[0].graph, width=4) is not None
