"""Predicted footprints against peaks measured by the profiler's memory events."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from passes.analysis import footprint
from passes.analysis.footprint import Footprint
from tests.compiling import Loss, lowered, trained
from tests.graphs import CASES, WIDTH, Block, Gelu, Traced, measured_peak, without_subgraphs

LENGTH = 256


@torch.library.custom_op("footprint::halves", mutates_args=())
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.cat([x, x, x, x])
    return wide[: len(x)] + 1, wide[len(x) : 2 * len(x)] * 2


@halves.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.ops.footprint.halves(x.sin())
        return left + right.cos()


def compiled(case: Traced) -> tuple[Footprint, int]:
    """The predicted footprint of a compiled graph, and its measured peak."""
    module, inputs = case.example
    steps: list[Callable[..., object]] = []

    def compile_and_run() -> None:
        steps.append(torch._inductor.compile(module, list(inputs)))
        steps[0](*inputs)

    (graph,) = lowered(compile_and_run)
    return footprint.of_graph(graph), measured_peak(lambda: steps[0](*inputs))


QUICK = [case for case in CASES if case.name == "in place"]
SLOW = [case for case in without_subgraphs(CASES) if case not in QUICK]


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_inference_peaks_as_predicted(case: Traced) -> None:
    predicted, measured = compiled(case)
    assert predicted.added_bytes == pytest.approx(measured, rel=1e-3)


def test_a_custom_operator_is_counted_with_its_registered_workspace() -> None:
    x = torch.randn(256, WIDTH)
    model = torch.compile(Custom())
    (graph,) = lowered(lambda: model(x))
    assert footprint.of_graph(graph).added_bytes == 3 * x.nbytes
    footprint.workspace(torch.ops.footprint.halves.default, lambda x: 4 * x.nbytes)
    assert footprint.of_graph(graph).added_bytes == 7 * x.nbytes
    assert measured_peak(lambda: model(x)) == pytest.approx(7 * x.nbytes, rel=1e-3)


@pytest.mark.parametrize(
    "layer",
    [Gelu, pytest.param(lambda: Block(Gelu()), marks=pytest.mark.slow)],
    ids=["gelu", "gelu block"],
)
def test_a_training_step_peaks_as_predicted_at_any_length(layer: Callable[[], nn.Module]) -> None:
    """Traced at one length, predicted and measured at others.

    Blocks with attention are measured in every run under a budget: test_wrapping_budget.py.
    """
    (forward, backward), measure = trained(
        Loss(layer()), torch.randn(1, LENGTH, WIDTH), dynamic=True
    )
    values = [node.meta.get("val") for node in forward.graph.nodes]
    symbol = next(str(value) for value in values if isinstance(value, torch.SymInt))
    for length in (LENGTH, 1000, 4099):
        predicted = footprint.of_step(forward, backward, sizes={symbol: length}).added_bytes
        assert predicted == pytest.approx(measure(torch.randn(1, length, WIDTH)), rel=0.03)


# On torch 2.11 a trace has the wrong dtype for the logsumexp of float64.
TORCH: Any = torch.__version__
FLOAT64 = pytest.param(
    torch.float64,
    marks=pytest.mark.skipif(TORCH < (2, 13), reason="traces have another lse"),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FLOAT64]
ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTEND_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(1, 32), (100, 32), (767, 31), (1000, 32), (1025, 33)]
)
def test_the_workspace_of_attention_is_predicted(
    tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(1, 2, tokens, head_dim, dtype=dtype) for _ in range(3))
    module = make_fx(lambda q, k, v: ATTEND(q, k, v), tracing_mode="fake")(q, k, v)
    assert footprint.of_graph(module).added_bytes == measured_peak(lambda: ATTEND(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 100, 767, 1000])
def test_the_workspace_of_attentions_backward_is_predicted(tokens: int, dtype: torch.dtype) -> None:
    """The workspace of oneDNN is left out.

    It depends on the CPU, and not on the length.
    """
    q, k, v = (torch.randn(1, 2, tokens, 32, dtype=dtype) for _ in range(3))
    out, lse = ATTEND(q, k, v)
    operands = (torch.randn_like(out), q, k, v, out, lse)

    def backward(*operands: Tensor) -> Any:
        return ATTEND_BACKWARD(*operands, 0.0, False)

    module = make_fx(backward, tracing_mode="fake")(*operands)
    predicted = footprint.of_graph(module).added_bytes
    # 1. Without oneDNN.
    with torch.backends.mkldnn.flags(enabled=False):
        assert measured_peak(lambda: backward(*operands)) == pytest.approx(predicted, rel=0.01)
    # 2. With it, at most 1 MiB a thread more, for products of 16-bit tiles.
    limit = 0.01 * predicted
    if dtype.itemsize == 2:
        limit += torch.get_num_threads() * 2**20
    assert abs(measured_peak(lambda: backward(*operands)) - predicted) <= limit


def test_donated_inputs_are_freed_by_the_program() -> None:
    module = make_fx(lambda x, y: (x @ y).sin() @ y, tracing_mode="fake")(
        torch.ones(64, 64), torch.ones(64, 64)
    )
    nbytes = 64 * 64 * 4
    assert footprint.of_graph(module) == Footprint(4 * nbytes, 2 * nbytes)
    assert footprint.of_graph(module, donated=["x_1"]) == Footprint(3 * nbytes, 2 * nbytes)


def test_the_graph_is_not_changed() -> None:
    module = make_fx(lambda x: x.view(-1).sin(), tracing_mode="fake")(torch.ones(8, 8))
    before = str(module.graph)
    footprint.of_graph(module)
    assert str(module.graph) == before


def depending_on_data() -> GraphModule:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero() * 2

    return torch.export.export(Nonzero(), (torch.ones(4),)).run_decompositions({}).graph_module


def sine() -> GraphModule:
    return make_fx(torch.sin, tracing_mode="fake")(torch.ones(2))


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no values", lambda: footprint.of_graph(symbolic_trace(lambda x: x.sin())), ValueError,
     'has no meta["val"], so its size'),
    ("unknown donated", lambda: footprint.of_graph(sine(), donated=["y"]), ValueError,
     "donated must name placeholders of the graph; got ['y']. It has "),
    ("sizes by data", lambda: footprint.of_graph(depending_on_data()), ValueError,
     "depend on its data"),
    ("no operator", lambda: footprint.workspace(torch.sin, len), TypeError,  # type: ignore[arg-type]
     "op must be an operator's overload"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("act", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_input_is_named(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        act()
