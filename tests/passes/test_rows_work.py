"""How much work it takes to find what works row by row, in graphs of thousands of nodes.

Counts of calls, not times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from passes import Chunk, Pass, StreamQKV
from passes.rewrites.checkpoint_cuts import values_to_keep
from passes.rewrites.rows import calls, growing, readers
from tests.support.turns import name_of

WIDTH, TOKENS = 8, 4


class Writer:
    """Writes a graph of calls with meta tensors as values."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.x = self.input(2, TOKENS, WIDTH)
        self.up, self.down = self.input(4 * WIDTH, WIDTH), self.input(WIDTH, 4 * WIDTH)
        self.square = self.input(WIDTH, WIDTH)

    def input(self, *shape: int) -> Node:
        node = self.graph.placeholder(f"p{len(self.graph.nodes)}")
        node.meta["example_value"] = torch.empty(shape, device="meta")
        return node

    def call(self, target: Callable[..., Any], *operands: Node, **options: Any) -> Node:
        node = self.graph.call_function(target, operands, options)
        values = [operand.meta["example_value"] for operand in operands]
        node.meta["example_value"] = target(*values, **options)
        return node

    def view(self, method: str, x: Node, *dims: Any) -> Node:
        node = self.graph.call_method(method, (x, *dims))
        node.meta["example_value"] = getattr(x.meta["example_value"], method)(*dims)
        return node

    def mlp(self, x: Node) -> Node:
        hidden = self.call(F.gelu, self.call(F.linear, x, self.up))
        return self.call(F.linear, hidden, self.down)

    def attention(self, x: Node) -> Node:
        """Attention of the tokens, with two heads."""
        heads: list[Node] = []
        for _ in range(3):
            rows = self.call(F.linear, x, self.square)
            split = self.view("unflatten", rows, -1, (2, -1))
            heads.append(self.view("transpose", split, 1, 2))
        attended = self.call(F.scaled_dot_product_attention, *heads)
        joined = self.view("flatten", self.view("transpose", attended, 1, 2), 2)
        return self.call(F.linear, joined, self.square)


def mlps(writer: Writer, x: Node) -> Node:
    """Residual MLPs: each is a region."""
    for _ in range(600):
        x = writer.call(torch.add, x, writer.mlp(x))
    return x


def narrow_chain(writer: Writer, x: Node) -> Node:
    """Linears of one width: no region, and each could be grown back to the first."""
    for _ in range(1200):
        x = writer.call(F.gelu, writer.call(F.linear, x, writer.square))
    return x


def narrowed_chain(writer: Writer, x: Node) -> Node:
    """The same behind a wide linear of a wider input: each is grown back to it."""
    x = writer.call(F.linear, writer.input(2, TOKENS, 99), writer.input(4 * WIDTH, 99))
    return narrow_chain(writer, writer.call(F.linear, x, writer.down))


def spine(writer: Writer, x: Node) -> Node:
    """A chain of one width with a region beside each linear."""
    for _ in range(400):
        side = writer.mlp(writer.input(2, TOKENS, WIDTH))
        x = writer.call(torch.add, writer.call(F.linear, x, writer.square), side)
    return x


def elementwise(writer: Writer, x: Node) -> Node:
    """One region of thousands of calls."""
    x = writer.call(F.linear, x, writer.up)
    for _ in range(2400):
        x = writer.call(F.gelu, x)
    return writer.call(F.linear, x, writer.down)


def blocks(writer: Writer, x: Node) -> Node:
    """Transformer blocks."""
    for _ in range(150):
        normed = writer.call(F.rms_norm, x, normalized_shape=(WIDTH,))
        x = writer.call(torch.add, x, writer.attention(normed))
        x = writer.call(torch.add, x, writer.mlp(x))
    return x


GRAPHS: list[tuple[Callable[[Writer, Node], Node], Pass, int]] = [
    (mlps, Chunk(rows=2), 600),
    (narrow_chain, Chunk(rows=2), 0),
    (narrowed_chain, Chunk(rows=2), 0),
    (spine, Chunk(rows=2), 400),
    (elementwise, Chunk(rows=2), 1),
    (blocks, Chunk(rows=2), 150),
    (blocks, StreamQKV(rows=2), 150),
]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often nodes are read, and tried as members of something."""
    counts = {"reads": 0, "tries": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return call

    calls.signature.cache_clear()
    monkeypatch.setattr(readers, "bound", counted("reads", calls.bound))
    monkeypatch.setattr(growing, "is_used_as_rows", counted("tries", growing.is_used_as_rows))
    return counts


@torch.no_grad()
@pytest.mark.parametrize(("write", "rewriting", "count"), GRAPHS, ids=name_of)
def test_each_node_is_read_a_few_times(
    write: Callable[[Writer, Node], Node], rewriting: Pass, count: int, counts: dict[str, int]
) -> None:
    writer = Writer()
    writer.graph.output(write(writer, writer.x))
    nodes = len(writer.graph.nodes)
    assert nodes > 2000
    assert len(rewriting(writer.graph)) == count
    writer.graph.lint()
    assert counts["reads"] <= 2 * nodes
    # A block is grown back from each result that it may have.
    assert counts["tries"] <= 4 * nodes
    assert calls.signature.cache_info().misses <= len(calls.READERS)


class CountedValue:
    """A value of checkpoint_cuts that counts how often its size is read."""

    reads = 0

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    @property
    def size(self) -> int:
        CountedValue.reads += 1
        return 1


@pytest.mark.parametrize("bound", [10, 3000])
def test_cuts_of_a_long_forward_read_each_size_a_few_times(bound: int) -> None:
    """Not once for each piece that the value may be in."""
    steps, CountedValue.reads = 3000, 0
    values: list[Any] = []
    for step in range(steps):
        values.append(CountedValue(step, min(step + 3, steps - 1)))
    numbers = values_to_keep(values, steps, bound)
    assert CountedValue.reads <= 4 * steps
    assert (len(numbers) == 0) == (bound == steps)
