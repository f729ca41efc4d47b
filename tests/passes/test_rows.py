"""Passes on graphs whose sizes coincide.

Rows are recognized by the graph, not by sizes.

Random graphs are written node by node and run without a compiler: thousands take seconds.
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
from tests.support.turns import one_in

Draw = Callable[[st.SearchStrategy[Any]], Any]
ACTIVATIONS = [F.gelu, F.silu, torch.tanh, torch.sigmoid, torch.square, torch.relu]
ELEMENTWISE = [torch.add, torch.mul, torch.sub, operator.mul]
# Of calls; those of MLPs twice.
KINDS = [
    *("linear", "linear", "elementwise", "elementwise", "activation"),
    *("norm", "reduction", "view", "parts", "copy"),
]


def value(node: Node) -> Any:
    return node.meta["example_value"]


class Writer:
    """Writes a graph whose nodes have the values that they compute.

    Operands are drawn by shape, whatever their dims mean.
    """

    def __init__(self, draw: Draw, inputs: Sequence[Tensor]) -> None:
        self.draw, self.graph = draw, Graph()
        self.nodes = [self.graph.placeholder(f"p{number}") for number in range(len(inputs))]
        for node, tensor in zip(self.nodes, inputs, strict=True):
            node.meta["example_value"] = tensor

    def call(self, target: Any, *arguments: Any, **options: Any) -> Node:
        """Write a call. target: a function, or a method's name."""
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
        """Draw a tensor that fits, the latest first; without any, None."""
        fitting = [node for node in reversed(self.nodes) if fits(value(node))]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def step(self, kind: str) -> None:
        """Write a call of a kind on a drawn tensor."""
        x = self.operand(lambda tensor: tensor.ndim >= 2)
        assert x is not None
        shape = value(x).shape
        if kind == "linear":
            self.linear(x, lambda weight: True)
        elif kind == "elementwise":
            y = self.operand(lambda tensor: _broadcasts(tensor.shape, shape))
            self.call(self.one_of(*ELEMENTWISE), *self.draw(st.permutations((x, y))))
        elif kind == "activation":
            self.call(self.one_of(*ACTIVATIONS), x)
        elif kind == "norm":
            weight = self.operand(lambda tensor: tensor.shape == shape[-1:])
            self.call(self.one_of(F.layer_norm, F.rms_norm), x, shape[-1:], weight)
        elif kind == "reduction":
            reduction, dim = self.one_of(torch.logsumexp, torch.mean), self.one_of(-1, 0)
            self.call(reduction, x, dim, keepdim=self.draw(st.booleans()))
        elif kind == "view":
            self.call(torch.transpose, x, *self.one_of((0, 1), (-1, -2)))
        elif kind == "parts":
            parts = self.call(torch.chunk, x, 2, self.one_of(-1, 0))
            self.call(operator.getitem, parts, self.one_of(0, -1))
        else:
            self.call("contiguous", x)

    def linear(self, x: Node | None, fits: Callable[[Tensor], bool]) -> None:
        """Write a linear, if there is a weight that fits."""
        if x is None:
            return
        features = value(x).shape[-1]
        weight = self.operand(
            lambda tensor: tensor.ndim == 2 and tensor.shape[-1] == features and fits(tensor)
        )
        if weight is None:
            return
        bias = None
        if self.draw(st.booleans()):
            bias = self.operand(lambda tensor: tensor.shape == value(weight).shape[:1])
        self.call(F.linear, x, weight, bias)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of one shape can be expanded to another."""
    if len(shape) > len(to):
        return False
    aligned = zip(reversed(shape), reversed(to), strict=False)
    return all(size in (1, expanded) for size, expanded in aligned)


@st.composite
def graphs(draw: Draw) -> tuple[Graph, list[Tensor]]:
    """An MLP with other calls before, in and after it.

    Inputs have the same few sizes.
    """
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
    """The result of a graph, and in training the inputs' gradients.

    The gradients of unused inputs are zeros.
    """
    out = GraphModule({}, graph)(*inputs)
    if not training or not out.requires_grad:
        return [out]
    grad = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    gradients = torch.autograd.grad(out, inputs, grad, allow_unused=True, materialize_grads=True)
    return [out, *gradients]


@pytest.mark.parametrize("training", [True, False])
def test_random_graphs_in_chunks_agree_if_sizes_coincide(training: bool) -> None:
    chunked = 0

    @settings(max_examples=200)
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
    "members",
    one_in(3, [(Remat(0),), (Spill(least_bytes=1),), (Materialize(), Reorder())]),
)
def test_other_passes_agree_if_all_sizes_are_equal(members: Sequence[Pass]) -> None:
    torch.manual_seed(0)
    norm, linears = nn.LayerNorm(8), [nn.Linear(8, 8) for _ in range(3)]
    model = nn.Sequential(linears[0], nn.GELU(), linears[1], norm, linears[2])
    x = torch.randn(8, 8, requires_grad=True)
    leaves = [x, *model.parameters()]
    step = passes.compile(model, passes=members, dynamic=False)
    computed, expected = (
        [out, *torch.autograd.grad(out.square().sum(), leaves)] for out in (step(x), model(x))
    )
    torch.testing.assert_close(computed, expected)
