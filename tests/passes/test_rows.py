"""What is a row follows from the graph: random graphs whose sizes coincide, against their plain results and gradients.

The graphs are written node by node, so that nothing but the pass is between the two, and thousands take seconds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional as F

import passes
from passes import Chunk, Materialize, Pass, Remat, Reorder, Spill

Draw = Callable[[st.SearchStrategy[Any]], Any]
ACTIVATIONS = [F.gelu, F.silu, torch.tanh, torch.sigmoid, torch.square, torch.relu]
ELEMENTWISE = [torch.add, torch.mul, torch.sub, operator.mul]
KINDS = [
    "linear",
    "linear",
    "elementwise",
    "elementwise",
    "activation",
    "norm",
    "reduction",
    "view",
    "parts",
    "nothing",
]


def value(node: Node) -> Any:
    return node.meta["example_value"]


class Writer:
    """Writes a graph whose nodes have the values that they compute. Operands are drawn by shape alone, whatever they mean."""

    def __init__(self, draw: Draw, inputs: Sequence[Tensor]) -> None:
        self.draw, self.graph = draw, Graph()
        self.nodes = [self.graph.placeholder(f"p{number}") for number in range(len(inputs))]
        for node, tensor in zip(self.nodes, inputs, strict=True):
            node.meta["example_value"] = tensor

    def call(self, target: Any, *arguments: Any, **options: Any) -> Node:
        """Writes a call, of a method where `target` is a name."""
        plain, named = map_arg(arguments, value), map_arg(options, value)
        if isinstance(target, str):
            node = self.graph.call_method(target, arguments, options)
            node.meta["example_value"] = getattr(plain[0], target)(*plain[1:], **named)
        else:
            node = self.graph.call_function(target, arguments, options)
            node.meta["example_value"] = target(*plain, **named)
        if isinstance(value(node), Tensor):
            self.nodes.append(node)
        return node

    def operand(self, fits: Callable[[Tensor], bool]) -> Node | None:
        """One of the tensors that fit, the latest first."""
        fitting = [node for node in reversed(self.nodes) if fits(value(node))]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    def step(self, kind: str) -> None:
        x = self.operand(lambda tensor: tensor.ndim >= 2)
        shape = value(x).shape
        if kind == "linear":
            self.linear(x, lambda weight: True)
        elif kind == "elementwise":
            y = self.operand(lambda tensor: _broadcasts(tensor.shape, shape))
            self.call(self.draw(st.sampled_from(ELEMENTWISE)), *self.draw(st.permutations((x, y))))
        elif kind == "activation":
            self.call(self.draw(st.sampled_from(ACTIVATIONS)), x)
        elif kind == "norm":
            weight = self.operand(lambda tensor: tensor.shape == shape[-1:])
            self.call(self.draw(st.sampled_from([F.layer_norm, F.rms_norm])), x, shape[-1:], weight)
        elif kind == "reduction":
            reduction = self.draw(st.sampled_from([torch.logsumexp, torch.mean]))
            self.call(
                reduction, x, self.draw(st.sampled_from([-1, 0])), keepdim=self.draw(st.booleans())
            )
        elif kind == "view":
            self.call(torch.transpose, x, *self.draw(st.sampled_from([(0, 1), (-1, -2)])))
        elif kind == "parts":
            parts = self.call(torch.chunk, x, 2, self.draw(st.sampled_from([-1, 0])))
            self.call(operator.getitem, parts, self.draw(st.sampled_from([0, -1])))
        else:
            self.call("contiguous", x)

    def linear(self, x: Node | None, fits: Callable[[Tensor], bool]) -> None:
        if x is None:
            return
        weight = self.operand(
            lambda tensor: (
                tensor.ndim == 2 and tensor.shape[-1] == value(x).shape[-1] and fits(tensor)
            )
        )
        if weight is not None:
            bias = (
                self.operand(lambda tensor: tensor.shape == value(weight).shape[:1])
                if self.draw(st.booleans())
                else None
            )
            self.call(F.linear, x, weight, bias)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of one shape can be expanded to another."""
    return len(shape) <= len(to) and all(
        size in (1, other) for size, other in zip(reversed(shape), reversed(to), strict=False)
    )


@st.composite
def graphs(draw: Draw) -> tuple[Graph, list[Tensor]]:
    """An MLP with work before, in and after it, on rows as many as it has features, or hidden ones, or other small numbers."""
    features = draw(st.integers(1, 4))
    hidden = draw(st.sampled_from([3 * features, 2 * features + 1]))
    sizes = st.sampled_from([features, hidden, 1, 2])
    lead = tuple(draw(sizes) for _ in range(draw(st.sampled_from([1, 1, 2]))))
    shapes = [
        (*lead, features),
        (hidden, features),
        (features, hidden),
        (features, features),
        (features,),
        (hidden,),
        (),
    ]
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (*shapes, shapes[0])
    ]
    writer = Writer(draw, inputs)
    steps = st.lists(st.sampled_from(KINDS), max_size=3)
    for kind in draw(steps):
        writer.step(kind)
    writer.linear(
        writer.operand(lambda x: x.ndim >= 2 and x.shape[-1] == features),
        lambda weight: len(weight) == hidden,
    )
    for kind in draw(steps):
        writer.step(kind)
    writer.linear(
        writer.operand(lambda x: x.ndim >= 2 and x.shape[-1] == hidden),
        lambda weight: len(weight) < hidden,
    )
    for kind in draw(steps)[:2]:
        writer.step(kind)
    writer.graph.output(writer.nodes[-1])
    writer.graph.eliminate_dead_code()
    return writer.graph, inputs


def results(graph: Graph, inputs: Sequence[Tensor], training: bool) -> list[Tensor]:
    """What the graph gives, and in training the gradient of each input, zeros where there is none."""
    out = GraphModule({}, graph)(*inputs)
    if not training or not out.requires_grad:
        return [out]
    grad = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    gradients = torch.autograd.grad(out, inputs, grad, allow_unused=True, materialize_grads=True)
    return [out, *gradients]


@pytest.mark.parametrize("training", [True, False])
def test_sizes_decide_nothing_in_random_graphs(training: bool) -> None:
    chunked = 0

    @settings(max_examples=400)
    @given(graphs(), st.integers(1, 3))
    def check(written: tuple[Graph, list[Tensor]], rows: int) -> None:
        nonlocal chunked
        graph, inputs = written
        with torch.set_grad_enabled(training):
            expected = results(graph, inputs, training)
            chunked += len(Chunk(rows=rows)(graph))
            graph.lint()
            torch.testing.assert_close(results(graph, inputs, training), expected, equal_nan=True)

    check()
    assert chunked > 50


@pytest.mark.parametrize(
    "chosen", [(Remat(0),), (Spill(least_bytes=1),), (Materialize(), Reorder())], ids=str
)
def test_passes_on_sizes_that_are_all_equal(chosen: Sequence[Pass]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
    )
    x = torch.randn(8, 8, requires_grad=True)
    leaves = [x, *model.parameters()]
    step = passes.compile(model, passes=chosen, dynamic=False)
    found, expected = (
        [out, *torch.autograd.grad(out.square().sum(), leaves)] for out in (step(x), model(x))
    )
    torch.testing.assert_close(found, expected)
