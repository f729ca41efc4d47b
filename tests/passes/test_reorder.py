"""Orders of graphs: what may not move, the same bits, and less at the peak as measured."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from passes.analysis import footprint, peak
from passes.analysis.liveness import lifetimes
from passes.protocol import Pass, Stage
from passes.rewrites.materialize import Materialize
from passes.rewrites.order_search import search
from passes.rewrites.reorder import Reorder, candidates, precedences, rearrange, steps_of
from tests.compiling import compiled, inference
from tests.graphs import CASES, WIDTH, Block, Gelu, Swiglu, Traced, in_place, random_dag

aten = torch.ops.aten


class Products(nn.Module):
    """Matrix products in the order of a random plan, results of several widths that are used late: nothing to fuse."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.plan = [(draw.randrange(i + 1), draw.choice((16, 64, 256))) for i in range(14)]
        self.weights = nn.ParameterDict(
            {f"{a}_{b}": torch.randn(a, b) / a**0.5 for a in (16, 64, 256) for b in (16, 64, 256)}
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for source, columns in self.plan:
            values.append(values[source] @ self.weights[f"{values[source].shape[1]}_{columns}"])
        unused = set(range(len(values))) - {source for source, _ in self.plan}
        total = torch.stack([values[i].sum() for i in sorted(unused)]).sum()
        pairs = list(zip(self.plan, values[1:], strict=True))[::3]
        return (
            total
            + torch.stack([(made.t() @ values[source]).sum() for (source, _), made in pairs]).sum()
        )


def layers(
    mlp: Callable[[], nn.Module] = Gelu, count: int = 4, tokens: int = 1024
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(mlp()) for _ in range(count))), torch.randn(1, tokens, WIDTH)


def legally_random(graph: Graph, seed: int) -> list:
    """Any order that the precedences allow."""
    before = precedences(graph, lifetimes(graph))
    draw, order = (
        random.Random(seed),
        [node for node in graph.nodes if node.op != "call_function" and node.op != "output"],
    )
    left = list(before)
    while left:
        node = draw.choice([each for each in left if before[each] <= set(order)])
        order.append(node)
        left.remove(node)
    return [*order, *graph.find_nodes(op="output")]


def noisy(x: Tensor) -> Tensor:
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
    """Random numbers, changes in place of whole tensors and of views: moved as far as the precedences allow."""
    for function in (noisy, in_place):
        x = torch.randn(8, 16)
        module = make_fx(function, tracing_mode="fake")(x)
        torch.manual_seed(1)
        expected = Interpreter(module).run(x.clone())
        rearrange(module.graph, legally_random(module.graph, seed))
        torch.manual_seed(1)
        for got, due in zip(Interpreter(module).run(x.clone()), expected, strict=True):
            assert torch.equal(got, due)


def test_precedences_allow_other_orders_at_all() -> None:
    module = make_fx(in_place, tracing_mode="fake")(torch.randn(8, 16))
    given = [node.name for node in module.graph.nodes]
    assert any(
        [node.name for node in legally_random(module.graph, seed)] != given for seed in range(10)
    )


def test_collectives_and_custom_operators_keep_their_turn() -> None:
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


@pytest.mark.parametrize(
    "case", [each for each in CASES if each.name not in ("branches", "while loop", "map")], ids=str
)
def test_the_search_counts_as_liveness_does(case: Traced) -> None:
    """The peak of the steps is that of the graph, in the given order and in the one found."""
    module, inputs = case.made
    found = lifetimes(module)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    steps = steps_of([[node] for node in calls], found, precedences(module.graph, found))
    assert steps.peak(range(len(calls))) == peak.find(found).added_bytes
    trial = footprint.copied(module)
    twins = dict(zip(module.graph.nodes, trial.graph.nodes, strict=True))
    order = search(steps, width=16)
    first = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
    placed = [*first, *(calls[step] for step in order), *module.graph.find_nodes(op="output")]
    rearrange(trial.graph, [twins[node] for node in placed])
    assert peak.find(lifetimes(trial)).added_bytes == steps.peak(order)
    for got, due in zip(
        Interpreter(trial).run(*inputs), Interpreter(module).run(*inputs), strict=True
    ):
        assert torch.equal(got, due)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_orders_are_never_worse_than_those_of_inductor(seed: int) -> None:
    graph = inference(Products(seed), torch.randn(256, 64))
    before = footprint.in_compilation(graph)
    lines = Reorder()(graph.graph)
    after = footprint.in_compilation(graph)
    assert after < before if lines else after == before


def test_less_is_measured_and_the_bits_are_the_same() -> None:
    torch.manual_seed(0)
    model, x = Products(1), torch.randn(512, 64)
    plain, ours = compiled(model, x), compiled(model, x, passes=[Reorder()])
    assert len(ours.lines) == 1
    assert ours.peak_bytes < 0.9 * plain.peak_bytes
    assert torch.equal(ours.result, plain.result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mlp", "plain", "less"), [(Gelu, 11.0, 9.0), (Swiglu, 15.0, 13.0)], ids=["gelu", "swiglu"]
)
def test_four_layers(mlp: Callable[[], nn.Module], plain: float, less: float) -> None:
    """In units of x; so many tokens that the workspace of attention stays below what the MLP holds."""
    model, x = layers(mlp, tokens=8192)
    found = [
        compiled(model, x, passes=each) for each in ([], [Reorder()], [Materialize(), Reorder()])
    ]
    units = [each.peak_bytes / x.nbytes for each in found]
    assert units[0] > plain
    assert units[1] <= less
    assert units[2] <= less - 3
    assert "shared elementwise values are made" in found[2].lines[0]
    assert all(torch.equal(each.result, found[0].result) for each in found)


def test_what_is_shared_is_made() -> None:
    """Foretold; test_four_layers measures."""
    model, x = layers(count=3)
    graph = inference(model, x)
    before = footprint.in_compilation(graph)
    (line,) = Materialize()(graph.graph)
    assert line.startswith("5 shared elementwise values are made: peak ")
    assert before - footprint.in_compilation(graph) >= 2 * x.nbytes
    assert Materialize()(graph.graph) == ()


@pytest.mark.parametrize("each", [Reorder(), Materialize()], ids=["reorder", "materialize"])
def test_graphs_that_cannot_be_counted_stay(each: Pass) -> None:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin() + x
            return (y.cos() @ y)[y.sum(1).nonzero()[:, 0]] * 2

    module = (
        torch.export.export(Nonzero(), (torch.randn(4, 4),))
        .run_decompositions(select_decomp_table())
        .graph_module
    )
    before = str(module.graph)
    assert each(module.graph) == ()
    assert str(module.graph) == before


def test_they_are_passes() -> None:
    for each in (Reorder(), Materialize()):
        assert isinstance(each, Pass)
        assert each.stage is Stage.LOWERED
        assert eval(repr(each)) == each
    assert Reorder(width=3) != Reorder()


def test_a_graph_with_one_order_has_no_candidates() -> None:
    module: GraphModule = make_fx(lambda x: x.sin() @ x, tracing_mode="fake")(torch.ones(4, 4))
    assert candidates(module.graph) == []
    assert Reorder()(module.graph) == ()
    assert candidates(random_dag(0)[0].graph, width=4) is not None
