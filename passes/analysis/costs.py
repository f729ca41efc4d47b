"""Estimated time of a step from its flops and bytes moved.

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
from .values import number_of

Operator = torch._ops.OpOverload
aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """The work of an operator.

    flops: floating-point operations
    memory_bytes: bytes moved to and from memory
    file_bytes: bytes moved to and from files
    """

    flops: float = 0
    memory_bytes: float = 0
    file_bytes: float = 0

    def __add__(self, addend: Work) -> Work:
        return Work(
            self.flops + addend.flops,
            self.memory_bytes + addend.memory_bytes,
            self.file_bytes + addend.file_bytes,
        )


@dataclass(frozen=True)
class Machine:
    """Rates of a machine, per second.

    The defaults are those of two cores with a local disk.
    """

    flops: float = 1.5e11
    memory_bytes: float = 1e10
    file_bytes: float = 1.5e9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            arguments.rate(name, value, zero=False)

    def seconds(self, work: Work) -> float:
        """The time of some work, its three parts one after the other."""
        return (
            work.flops / self.flops
            + work.memory_bytes / self.memory_bytes
            + work.file_bytes / self.file_bytes
        )


MACHINE = Machine()


def register(op: Operator, work: Callable[..., Work]) -> None:
    """Register the work of an operator, in place of an earlier registration.

    Other operators count by torch's flop formulas, else by the bytes of their results.

    work: work(*args, **kwargs, out=result) -> Work, called with tensors without data
    """
    if not isinstance(op, Operator):
        raise TypeError(
            f"op must be an operator's overload, as torch.ops.aten.mm.default; got {op!r}"
        )
    arguments.function("work", work)
    _REGISTERED[op] = work


def register_default(op: Operator, work: Callable[..., Work]) -> None:
    """Register the work of an operator unless it has one.

    work: as for `register`
    """
    _REGISTERED.setdefault(op, work)


def of_graph(graph: Graph, *, sizes: Mapping[str, int] | None = None) -> Work:
    """The work of a graph of operators whose nodes have meta["val"].

    sizes: values of symbols; other symbols count as traced
    """
    arguments.kind("graph", graph, Graph, "Take it from a GraphModule: module.graph")
    sizes = arguments.sizes(sizes)
    total = Work()
    with FakeTensorMode():
        for node in graph.nodes:
            if isinstance(node.target, Operator):
                total += _of_node(node, node.target, sizes)
    return total


def _of_node(node: Node, op: Operator, sizes: Mapping[str, int]) -> Work:
    """The work of one call, with its symbols replaced by numbers."""

    def concrete(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return number_of(value, node, sizes)
        if isinstance(value, Tensor):
            shape = [number_of(size, node, sizes) for size in value.shape]
            return torch.empty(shape, dtype=value.dtype, device=value.device)
        return value

    traced = map_arg((node.args, node.kwargs), lambda operand: operand.meta.get("val"))
    args, kwargs = pytree.tree_map(concrete, traced)
    out = pytree.tree_map(concrete, node.meta.get("val"))
    # Registered work first, then torch's flop formulas, then the bytes of the results.
    if op in _REGISTERED:
        return _REGISTERED[op](*args, **kwargs, out=out)
    if op.overloadpacket in flop_registry:
        flops = flop_registry[op.overloadpacket](*args, **kwargs, out_val=out)
        return Work(flops=float(flops))
    # A view moves nothing, and a fused result stays in registers.
    if op.is_view or _is_fused(node):
        return Work()
    tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return Work(memory_bytes=sum(tensor.nbytes for tensor in tensors))


def _is_fused(node: Node) -> bool:
    """Whether an elementwise result has elementwise readers only: inductor fuses them."""
    return _is_pointwise(node) and all(map(_is_pointwise, _readers(node)))


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, Operator) and torch.Tag.pointwise in node.target.tags


def _readers(node: Node) -> Iterator[Node]:
    """Yield the users of a value, through views."""
    for user in node.users:
        if isinstance(user.target, Operator) and user.target.is_view:
            yield from _readers(user)
        else:
            yield user


def _attention(query_place: int, products: int) -> Callable[..., Work]:
    """The work of a dense attention kernel.

    query_place: the place of the query among the arguments; the key follows it
    products: matrix products of all queries with all keys
    """

    def work(*args: Any, out: Any, **kwargs: Any) -> Work:
        query, key = args[query_place], args[query_place + 1]
        return Work(flops=2.0 * products * math.prod(query.shape) * key.shape[-2])

    return work


# The operators with a work of their own. `register` adds to them.
_REGISTERED: dict[Operator, Callable[..., Work]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention(0, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention(1, 5),
}
