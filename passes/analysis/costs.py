"""How long a step takes, estimated from its graphs: arithmetic of products and attention, bytes of everything else, files.

Good for ordering candidates on one machine; not a forecast of seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from .. import arguments
from .liveness import number_of

Operator = torch._ops.OpOverload
aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What an operator does: floating-point operations, bytes of memory it reads and writes, bytes of files."""

    flops: float = 0
    memory_bytes: float = 0
    file_bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.memory_bytes + other.memory_bytes, self.file_bytes + other.file_bytes)


@dataclass(frozen=True)
class Machine:
    """Rates a second. The defaults are those of two cores with a local disk."""

    flops: float = 1.5e11
    memory_bytes: float = 1e10
    file_bytes: float = 1.5e9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            arguments.rate(name, value, zero=False)

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.memory_bytes / self.memory_bytes + work.file_bytes / self.file_bytes


MACHINE = Machine()
_KNOWN: dict[Operator, Callable[..., Work]] = {}


def register(op: Operator, work: Callable[..., Work]) -> None:
    """Says that op(*args, **kwargs) does work(*args, **kwargs), where args are tensors without data and out= is the result.

    A second call for an operator replaces the first. Of operators that nobody speaks of, the bytes of operands and results count.
    """
    if not isinstance(op, Operator):
        raise TypeError(f"op must be an operator's overload, as torch.ops.aten.mm.default; got {op!r}")
    arguments.function("work", work)
    _KNOWN[op] = work


def of_graph(graph: Graph, *, sizes: Mapping[str, int] | None = None) -> Work:
    """The work of a graph of operators whose nodes carry meta["val"]. sizes: values of symbols, else those of the trace."""
    arguments.kind("graph", graph, Graph, "Take it from a GraphModule: module.graph")
    sizes = arguments.sizes(sizes)
    with FakeTensorMode():
        return sum((_of_node(node, sizes) for node in graph.nodes if isinstance(node.target, Operator)), start=Work())


def _of_node(node: Node, sizes: Mapping[str, int]) -> Work:
    op = node.target
    assert isinstance(op, Operator)

    def plain(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return number_of(value, node, sizes)
        if isinstance(value, Tensor):
            return torch.empty([number_of(size, node, sizes) for size in value.shape], dtype=value.dtype, device=value.device)
        return value

    args, kwargs = pytree.tree_map(plain, map_arg((node.args, node.kwargs), lambda each: each.meta.get("val")))
    out = pytree.tree_map(plain, node.meta.get("val"))
    if op in _KNOWN:
        return _KNOWN[op](*args, **kwargs, out=out)
    if op.overloadpacket in flop_registry:
        return Work(flops=float(flop_registry[op.overloadpacket](*args, **kwargs, out_val=out)))
    return Work() if op.is_view or _is_fused(node) else Work(memory_bytes=_bytes(out))


def _is_fused(node: Node) -> bool:
    """Whether an elementwise result goes into elementwise operators alone, so that it never reaches memory."""
    return _is_pointwise(node) and all(map(_is_pointwise, _readers(node)))


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, Operator) and torch.Tag.pointwise in node.target.tags


def _readers(node: Node) -> Iterator[Node]:
    """Who uses a value, also as a view."""
    for user in node.users:
        is_view = isinstance(user.target, Operator) and user.target.is_view
        yield from _readers(user) if is_view else [user]


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _attention(queries: int, products: int) -> Callable[..., Work]:
    """The queries stand at that place among the arguments, the keys behind them."""

    def work(*args: Any, out: Any, **kwargs: Any) -> Work:
        return Work(flops=2.0 * products * math.prod(args[queries].shape) * args[queries + 1].shape[-2])

    return work


register(aten._scaled_dot_product_flash_attention_for_cpu.default, _attention(0, 2))
register(aten._scaled_dot_product_flash_attention_for_cpu_backward.default, _attention(1, 5))
