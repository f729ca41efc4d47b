"""Masks computed from positions, as linear conditions on element indices.

arange(n)[:, None] <= arange(m) + 3        (i, j) where 3 - i + j >= 0
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...analysis.effects import writes
from .calls import example_value, signature

aten = torch.ops.aten


@dataclass(frozen=True)
class Sum:
    """An integer: constant + sum of steps[axis] * index along the axis.

    Axes count backwards from 1, the last.
    """

    steps: Mapping[int, int]
    constant: int = 0

    def __add__(self, addend: Sum) -> Sum:
        steps = dict(self.steps)
        for axis, step in addend.steps.items():
            steps[axis] = steps.get(axis, 0) + step
        nonzero = {axis: step for axis, step in steps.items() if step}
        return Sum(nonzero, self.constant + addend.constant)

    def times(self, factor: int) -> Sum:
        """The sum times a factor."""
        steps = {axis: step * factor for axis, step in self.steps.items() if factor}
        return Sum(steps, self.constant * factor)

    def moved(self, to: Mapping[int, int]) -> Sum:
        """The same sum with its axes renumbered."""
        return Sum({to[axis]: step for axis, step in self.steps.items()}, self.constant)

    def within(self, shape: torch.Size) -> Sum:
        """The sum without axes of one element: their index is 0."""
        steps = {axis: step for axis, step in self.steps.items() if not _is_one(shape[-axis])}
        return Sum(steps, self.constant)

    def is_never_negative(self, shape: torch.Size) -> bool:
        """Whether the sum is at least 0 everywhere in a tensor."""
        least = self.constant
        for axis, step in self.steps.items():
            if step >= 0:
                continue
            size = shape[-axis]
            if not isinstance(size, int):  # dynamic: unknown
                return False
            least += step * (size - 1)
        return least >= 0


# A mask: True where all of these are at least 0. The empty one is True everywhere.
Conditions = tuple[Sum, ...]
_Read = Sum | Conditions | None
# Called with a node's traced value and arguments; a call that does not bind is not read.
Rule = Callable[..., _Read]


def conditions(mask: Node) -> Conditions | None:
    """Read a boolean mask as conditions.

    None if it depends on anything but indices, or calls an operator that is not in the table.
    """
    read = _read(mask)
    if not isinstance(read, tuple) or _is_written_to(mask):
        return None
    return read


def _is_written_to(mask: Node) -> bool:
    """Whether any source of a mask is written in-place, views included."""
    sources, waiting = set[Node](), [mask]
    while waiting:
        node = waiting.pop()
        if node not in sources:
            sources.add(node)
            waiting += node.all_input_nodes
    for node in filter(writes, mask.graph.nodes):
        for target in (*node.args[:1], node.kwargs.get("out")):
            # A view's base is its first operand, and so on down to what was allocated.
            while isinstance(target, Node):
                if target in sources:
                    return True
                target = target.args[0] if target.args else None
    return False


def _read(node: Any) -> _Read:
    """Read integers as a Sum, masks as Conditions, the rest as None."""
    if isinstance(node, int) and not isinstance(node, bool):
        return Sum({}, node)
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    rule, value = _RULES.get(node.target), example_value(node)
    if rule is None or not isinstance(value, Tensor):
        return None
    if value.dtype not in (torch.bool, torch.int32, torch.int64):
        return None
    try:
        bound = signature(rule).bind(value, *node.args, **node.kwargs)
    except TypeError:
        return None
    read = rule(*bound.args, **bound.kwargs)
    # Integers are sums, booleans are conditions: a rule may return either.
    if isinstance(read, Sum):
        if value.dtype == torch.bool:
            return None
        return read.within(value.shape)
    if read is None or value.dtype != torch.bool:
        return read
    return tuple(condition.within(value.shape) for condition in read)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _arange(result: Tensor, *bounds: Any, **settings: Any) -> _Read:
    if {"start", "end", "step", "out"} & settings.keys():
        return None
    start = bounds[0] if len(bounds) > 1 else 0
    step = bounds[2] if len(bounds) > 2 else 1
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    return Sum({1: step}, start)


def _ones(result: Tensor, *arguments: Any, **settings: Any) -> _Read:
    return ()


def _full(result: Tensor, size: Any, fill_value: Any, **settings: Any) -> _Read:
    if fill_value is not True:
        return None
    return ()


def _same(result: Tensor, x: Any, *arguments: Any, **settings: Any) -> _Read:
    read = _read(x)
    # Not a conversion between integers and masks.
    if isinstance(read, tuple) != (result.dtype == torch.bool):
        return None
    return read


def _unsqueeze(result: Tensor, x: Any, dim: int) -> _Read:
    new = result.ndim - dim % result.ndim
    return _moved(x, {axis: axis + (axis >= new) for axis in range(1, result.ndim)})


def _getitem(result: Tensor, x: Any, index: Any) -> _Read:
    """Read an index of None, ":" and "..."."""
    items = list(index) if isinstance(index, tuple) else [index]
    value = example_value(x)
    if not isinstance(value, Tensor):
        return None
    if not all(item is None or item is ... or item == slice(None) for item in items):
        return None
    # Write "..." out, then number the axes that are not new.
    missing = value.ndim - sum(isinstance(item, slice) for item in items)
    place = items.index(...) if ... in items else len(items)
    items[place : place + 1] = [slice(None)] * missing
    old_axes = [axis for axis, item in enumerate(reversed(items), start=1) if item is not None]
    return _moved(x, dict(enumerate(old_axes, start=1)))


def _reshape(result: Tensor, x: Any, *shape: Any) -> _Read:
    """Read a reshape that only adds axes of one element."""
    value = example_value(x)
    axes = [axis for axis in range(1, result.ndim + 1) if not _is_one(result.shape[-axis])]
    if not isinstance(value, Tensor) or value.ndim != 1 or len(axes) != 1:
        return None
    return _moved(x, {1: axes[0]})


def _expand(result: Tensor, x: Any, *shape: Any, **settings: Any) -> _Read:
    return _read(x)


def _moved(x: Any, to: Mapping[int, int]) -> _Read:
    """Read x with its axes renumbered."""
    read = _read(x)
    if read is None:
        return None
    if isinstance(read, Sum):
        return read.moved(to)
    return tuple(condition.moved(to) for condition in read)


def _add(result: Tensor, x: Any, y: Any) -> _Read:
    return _sum(x, y, 1)


def _sub(result: Tensor, x: Any, y: Any) -> _Read:
    return _sum(x, y, -1)


def _sum(x: Any, y: Any, factor: int) -> Sum | None:
    """x + factor * y, if both are integers."""
    first, second = _read(x), _read(y)
    if not isinstance(first, Sum) or not isinstance(second, Sum):
        return None
    return first + second.times(factor)


def _comparison(factor: int, least: int) -> Rule:
    """The rule of a comparison.

    x OP y is true where factor * (x - y) - least >= 0.
    """

    def rule(result: Tensor, x: Any, y: Any) -> _Read:
        difference = _sum(x, y, -1)
        if difference is None:
            return None
        return (difference.times(factor) + Sum({}, -least),)

    return rule


def _and(result: Tensor, x: Any, y: Any) -> _Read:
    first, second = _read(x), _read(y)
    if not isinstance(first, tuple) or not isinstance(second, tuple):
        return None
    return first + second


def _not(result: Tensor, x: Any) -> _Read:
    read = _read(x)
    # Of several conditions the negation is an "or", which no conditions express.
    if not isinstance(read, tuple) or len(read) != 1:
        return None
    return (read[0].times(-1) + Sum({}, -1),)


def _tril(result: Tensor, x: Any, diagonal: Any = 0) -> _Read:
    read = _read(x)
    if not isinstance(read, tuple) or not isinstance(diagonal, int):
        return None
    return (*read, Sum({2: 1, 1: -1}, diagonal))


def _triu(result: Tensor, x: Any, diagonal: Any = 0) -> _Read:
    read = _read(x)
    if not isinstance(read, tuple) or not isinstance(diagonal, int):
        return None
    return (*read, Sum({2: -1, 1: 1}, -diagonal))


# Each rule with what graphs call: functions and operators, methods by name.
_TABLE: tuple[tuple[Rule, tuple[Any, ...]], ...] = (
    (_arange, (torch.arange, aten.arange.default, aten.arange.start, aten.arange.start_step)),
    (_ones, (torch.ones, aten.ones.default, "new_ones", aten.new_ones.default)),
    (_full, (torch.full, aten.full.default)),
    (_same, ("to", "long", "int", "bool", aten._to_copy.default, aten.to.dtype)),
    (_same, ("contiguous", "clone", torch.clone, aten.clone.default)),
    (_unsqueeze, ("unsqueeze", torch.unsqueeze, aten.unsqueeze.default)),
    (_getitem, (operator.getitem,)),
    (_reshape, ("view", "reshape", torch.reshape, aten.view.default, aten.reshape.default)),
    (_expand, ("expand", aten.expand.default, "expand_as", torch.broadcast_to, "broadcast_to")),
    (_add, (operator.add, torch.add, "add", aten.add.Tensor)),
    (_sub, (operator.sub, torch.sub, "sub", aten.sub.Tensor)),
    (_comparison(1, 0), (operator.ge, torch.ge, "ge", aten.ge.Tensor, aten.ge.Scalar)),
    (_comparison(1, 1), (operator.gt, torch.gt, "gt", aten.gt.Tensor, aten.gt.Scalar)),
    (_comparison(-1, 0), (operator.le, torch.le, "le", aten.le.Tensor, aten.le.Scalar)),
    (_comparison(-1, 1), (operator.lt, torch.lt, "lt", aten.lt.Tensor, aten.lt.Scalar)),
    (_and, (operator.and_, "__and__", aten.__and__.Tensor)),
    (_and, (torch.logical_and, "logical_and", aten.logical_and.default)),
    (_and, (torch.bitwise_and, "bitwise_and", aten.bitwise_and.Tensor)),
    (_not, (operator.invert, torch.logical_not, "logical_not", aten.logical_not.default)),
    (_not, (torch.bitwise_not, "bitwise_not", aten.bitwise_not.default)),
    (_tril, (torch.tril, "tril", aten.tril.default)),
    (_triu, (torch.triu, "triu", aten.triu.default)),
)
_RULES: dict[Any, Rule] = {}
for _rule, _targets in _TABLE:
    _RULES.update(dict.fromkeys(_targets, _rule))
