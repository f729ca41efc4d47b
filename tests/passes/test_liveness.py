"""Lifetimes of hand-made graphs, and of the table's graphs against what running them really allocates."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._higher_order_ops import scan
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from passes.analysis import peak
from passes.analysis.liveness import Lifetimes, Storage, lifetimes
from tests.graphs import (
    CASES,
    Branches,
    Gelu,
    Traced,
    exported,
    interpreted,
    measured_peak,
    random_dag,
)

aten = torch.ops.aten
X = torch.ones(4, 8)
BYTES = X.nbytes


def of(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Lifetimes:
    return lifetimes(make_fx(function, tracing_mode="fake")(*(inputs or (X,))), **options)


def named(found: Lifetimes, name: str) -> Storage:
    return next(each for each in found.storages if each.name == name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_peak_is_what_running_it_takes(case: Traced) -> None:
    module, inputs = case.made
    predicted = peak.find(lifetimes(module)).added_bytes
    assert predicted == pytest.approx(
        measured_peak(interpreted(module, inputs)), rel=0.02 if case.exact else 0.05
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_random_graphs_take_exactly_what_is_predicted(seed: int) -> None:
    module, inputs = random_dag(seed, nodes=60)
    assert peak.find(lifetimes(module)).added_bytes == measured_peak(interpreted(module, inputs))


def test_the_measurement_sees_what_is_held() -> None:
    def hold() -> None:
        kept = torch.ones(2**20)
        torch.ones(2**18)
        del kept

    assert measured_peak(hold) == 5 * 2**20


def test_the_example_of_the_module() -> None:
    def example(x: Tensor) -> Tensor:
        a = x @ x
        w = x + 1
        return a.view(-1).view(8, 8).add_(w)

    found = of(example, torch.ones(8, 8))
    assert [(each.lower, each.upper) for each in found.storages] == [(0, 7), (1, 7), (2, 6)]
    assert named(found, "mm").aliases == ("mm", "view", "view_1", "add_")
    assert named(found, "mm").is_output
    assert found.input_bytes == 256


def test_views_prolong_their_base() -> None:
    found = of(lambda x: (x + 1).t()[1:].unsqueeze(0).sin())
    assert named(found, "add").aliases == ("add", "t", "slice_1", "unsqueeze")
    assert named(found, "add").upper == 6
    assert len(found.storages) == 3


def test_operations_in_place_prolong_what_they_change() -> None:
    def function(x: Tensor) -> Tensor:
        wide = x.repeat(2, 1)
        part = wide[:2]
        y = x.cos()
        part.mul_(2)
        return y

    found = of(function)
    assert named(found, "repeat").aliases == ("repeat", "slice_1", "mul_")
    assert (named(found, "repeat").lower, named(found, "repeat").upper) == (1, 5)


def test_results_of_one_node_die_apart() -> None:
    def function(x: Tensor) -> Tensor:
        values, indices = x.topk(4, dim=1)
        return values.cos().gather(1, indices)

    found = of(function)
    assert named(found, "topk[1]").size == 2 * named(found, "topk").size
    assert named(found, "topk").upper < named(found, "topk[1]").upper


def test_a_value_that_nobody_uses_dies_where_it_is_made() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    unused = graph.call_function(aten.sin.default, (x,))
    graph.output(x)
    for node in (x, unused):
        node.meta["val"] = torch.empty(4, device="meta")
    assert (
        named(lifetimes(graph), "sin_default").lower,
        named(lifetimes(graph), "sin_default").upper,
    ) == (1, 2)


def test_schemas_stand_in_where_metadata_does_not_tell() -> None:
    """Values made node by node share no storage; views and operations in place are known by their operators."""
    graph = Graph()
    x = graph.placeholder("x")
    view = graph.call_function(aten.view.default, (x, [-1]))
    changed = graph.call_function(aten.add_.Tensor, (view, 1))
    halves = graph.call_function(aten.split.Tensor, (changed, 16))
    made = graph.call_function(aten.reshape.default, (changed, [8, 4]))
    graph.output((halves, made))
    for node in (x, view, changed, made):
        node.meta["val"] = torch.empty(4, 8, device="meta")
    halves.meta["val"] = [torch.empty(16, device="meta") for _ in range(2)]
    found = lifetimes(graph)
    assert [each.name for each in found.storages] == ["x", "reshape_default"]
    assert named(found, "x").aliases == ("x", "view_default", "add__tensor", "split_tensor")


def test_copied_metadata_does_not_make_two_storages_one() -> None:
    """A pass that recomputes copies a node with its meta: the same fake tensor, but another allocation."""
    module = make_fx(lambda x: x.sin().cos(), tracing_mode="fake")(X)
    sin, cos = (node for node in module.graph.nodes if node.op == "call_function")
    with module.graph.inserting_before(cos):
        again = module.graph.node_copy(sin, lambda node: node)
    cos.args = (again,)
    assert len({each.name for each in lifetimes(module).storages}) == 4


def test_inputs_live_to_the_end_unless_donated() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x + y).sin().cos()

    assert [each.upper for each in of(function, X, X.clone()).storages if each.is_input] == [6, 6]
    found = of(function, X, X.clone(), donated=["y_1"])
    assert [each.upper for each in found.storages if each.is_input] == [6, 3]
    assert peak.find(found).added_bytes == BYTES


def test_tied_inputs_are_one() -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((a, b))
    weight = torch.empty(4, device="meta")
    a.meta["val"], b.meta["val"] = weight, weight.view(2, 2)
    (only,) = lifetimes(graph).storages
    assert only.aliases == ("a", "b")
    assert only.size == 16


def test_constants_count_as_inputs() -> None:
    weight = torch.ones(8, 8)
    found = lifetimes(make_fx(lambda x: x @ weight)(X))
    assert found.input_bytes == BYTES + weight.nbytes


def test_symbols_take_the_sizes_given_or_their_hints() -> None:
    def dynamic() -> GraphModule:
        length = torch.export.Dim("length", min=2)
        with torch.no_grad():
            return torch.export.export(
                Gelu(), (torch.randn(16, 64),), dynamic_shapes=({0: length},)
            ).graph_module

    module = dynamic()
    symbol = str(next(node for node in module.graph.nodes if node.name == "x").meta["val"].shape[0])
    hidden = [
        peak.find(lifetimes(module, sizes=sizes)).added_bytes
        for sizes in (None, {symbol: 16}, {symbol: 1600})
    ]
    assert hidden == [2 * 16 * 256 * 4, 2 * 16 * 256 * 4, 2 * 1600 * 256 * 4]


def test_subgraphs_count_at_their_node() -> None:
    module, _ = exported(Branches, 256, 64)
    found = lifetimes(module)
    at = found.steps.index("cond")
    assert found.nested[at] > 0
    assert sum(found.nested) == found.nested[at]
    assert "inside the subgraphs of cond" in str(peak.find(found))


def test_flex_attention_is_counted() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))

    program = torch.export.export(Attention(), (torch.randn(1, 2, 128, 16),))
    found = lifetimes(program.run_decompositions().graph_module)
    out, statistics = 2 * 128 * 16 * 4, 2 * 128 * 4
    assert out + statistics <= peak.find(found).added_bytes <= out + 3 * statistics
    with pytest.raises(ValueError, match=r"not one strided storage.*run_decompositions"):
        lifetimes(
            program.graph_module
        )  # block masks are made by vmap, which stands in this graph as it is


def test_the_report_names_lines_and_bytes() -> None:
    module, _ = exported(Gelu, 2, 4096, 64)
    found = peak.find(lifetimes(module))
    assert (found.node, found.peak_bytes - found.input_bytes) == ("gelu", 16 * 2**20)
    assert [each.name for each in found.live if not each.is_input] == ["addmm", "gelu"]
    lines = str(found).splitlines()
    assert re.fullmatch(
        r"peak 18\.1 MiB at step \d+ of 15, gelu: 16\.0 MiB beyond 2\.1 MiB of inputs", lines[0]
    )
    assert re.fullmatch(
        r" +8\.0 MiB  addmm  \[7, 10\) +graphs\.py:\d+ in forward: return self\.down\(F\.gelu.*",
        lines[1],
    )


def test_timeline() -> None:
    found = Lifetimes(
        ("x", "a", "b", "output"),
        (
            Storage("x", 4, 0, 4, ("x",), is_input=True),
            Storage("a", 8, 1, 3, ("a",)),
            Storage("b", 2, 2, 4, ("b",)),
        ),
        (0, 0, 0, 0),
    )
    assert peak.timeline(found).splitlines() == [
        "          10 B   %@:  beyond the inputs, darkest at the peak",
        "           8 B   ##   a",
        "           2 B    ##  b",
    ]
    assert len(peak.timeline(found, rows=1, width=2).splitlines()) == 2


def test_picture(tmp_path: Path) -> None:
    peak.draw(lifetimes(exported(Gelu, 2, 256, 64)[0]), tmp_path / "peak.png")
    assert (tmp_path / "peak.png").read_bytes().startswith(b"\x89PNG")


@given(st.integers(0, 10**6))
def test_bytes_at_is_the_sum_of_what_lives(seed: int) -> None:
    storages = tuple(
        Storage(
            str(i), (seed >> i) % 50, lower := (seed >> i) % 7, lower + 1 + (seed >> 2 * i) % 3, ()
        )
        for i in range(6)
    )
    found = Lifetimes(tuple("abcdefghi"), storages, (0,) * 9)
    for step, held in enumerate(found.bytes_at):
        assert held == sum(each.size for each in storages if each.lower <= step < each.upper)


def without_values() -> GraphModule:
    return symbolic_trace(lambda x: torch.sin(x))


def replacing() -> Lifetimes:
    module = make_fx(lambda x: x.sin(), tracing_mode="fake")(X)
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    node.target = aten.set_.source_Tensor
    return lifetimes(module)


def unbacked() -> Lifetimes:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero() * 2

    return lifetimes(torch.export.export(Nonzero(), (X,)).graph_module)


def scanning() -> Lifetimes:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return scan(lambda total, row: (total + row, total * row), torch.zeros_like(x[0]), x)

    return lifetimes(exported(Sums, 4, 8)[0])


def sparse() -> Lifetimes:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.eye(4).to_sparse()
    graph.output(x)
    return lifetimes(graph)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lifetimes(nn.Linear(2, 2)), TypeError, "graph must be an fx Graph or GraphModule; got Linear. Trace it"),  # type: ignore[arg-type]
    (lambda: lifetimes(without_values()), ValueError, 'x (placeholder x) has no meta["val"], so its size is unknown. Trace with'),
    (lambda: lifetimes(symbolic_trace(nn.Linear(2, 2))), ValueError, "Trace with torch.export or make_fx"),
    (lambda: of(torch.sin, donated=["y"]), ValueError, "donated must name placeholders of the graph; got 'y'. It has"),
    (replacing, ValueError, "sin (aten.set_.source_Tensor) replaces a tensor's storage"),
    (unbacked, ValueError, "and nothing says what u0 is. Pass sizes={'u0': ...}"),
    (scanning, ValueError, "is a scan, and what it holds from turn to turn is not known. Unroll it"),
    (sparse, ValueError, "x is a Tensor of layout torch.sparse_coo, not one strided storage"),
    (lambda: peak.find(Lifetimes((), (), ())), ValueError, "at least one step; got those of an empty graph"),
    (lambda: peak.timeline(of(torch.sin), rows=0), ValueError, "rows must be at least 1; got 0"),
    (lambda: peak.timeline(of(torch.sin), width=-3), ValueError, "width must be at least 1; got -3"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "message"), BAD)
def test_bad_input_is_named(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        act()


def test_import_is_light(fresh_python: Any) -> None:
    """Neither the solver, which brings pandas, nor pictures, nor torch's compiler come before they are used."""
    probe = "import sys, passes; print(*sorted({'ortools', 'pandas', 'matplotlib', 'compiled_dilated'} & set(sys.modules)))"
    run = fresh_python("-c", probe)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
