"""Masks that a graph works out from positions, read as conditions on the indices of their elements, in whole numbers.

arange(n)[:, None] <= arange(m) + 3        (i, j) where 3 - i + j >= 0
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...analysis.effects import writes
from .readers import value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Sum:
    """constant + the sum of steps[axis] * index along that axis. Axes count from 1, the last."""

    steps: Mapping[int, int]
    constant: int = 0

    def __add__(self, other: Sum) -> Sum:
        steps = {axis: self.steps.get(axis, 0) + other.steps.get(axis, 0) for axis in {*self.steps, *other.steps}}
        return Sum({axis: step for axis, step in steps.items() if step}, self.constant + other.constant)

    def times(self, factor: int) -> Sum:
        """Each of its numbers times a factor."""
        return Sum({axis: step * factor for axis, step in self.steps.items() if factor}, self.constant * factor)

    def moved(self, to: Mapping[int, int]) -> Sum:
        """The same numbers where each axis has another place."""
        return Sum({to[axis]: step for axis, step in self.steps.items()}, self.constant)

    def within(self, shape: torch.Size) -> Sum:
        """Along an axis of one element there is no index but 0."""
        return Sum({axis: step for axis, step in self.steps.items() if not _is_one(shape[-axis])}, self.constant)

    def is_never_negative(self, shape: torch.Size) -> bool:
        """Whether that is known of a tensor of this shape."""
        sizes = {axis: shape[-axis] for axis, step in self.steps.items() if step < 0}
        if not all(isinstance(size, int) for size in sizes.values()):
            return False
        return self.constant + sum(self.steps[axis] * (size - 1) for axis, size in sizes.items()) >= 0


# A mask: True where all of these are at least 0. Of none, True everywhere.
Conditions = tuple[Sum, ...]
_Read = Sum | Conditions | None
_RULES: dict[Any, Callable[..., _Read]] = {}


def conditions(mask: Node) -> Conditions | None:
    """What a boolean mask says of its indices; None where it depends on anything else, or is made in a way not known here."""
    found = _read(mask)
    return found if isinstance(found, tuple) and not _is_written_to(mask) else None


def _is_written_to(mask: Node) -> bool:
    """Whether a value that it is made of is changed in place, by itself or by a view, whose base is its first operand."""
    made_of, waiting = set[Node](), [mask]
    while waiting:
        node = waiting.pop()
        if node not in made_of:
            made_of.add(node)
            waiting += node.all_input_nodes
    for node in filter(writes, mask.graph.nodes):
        for base in (*node.args[:1], node.kwargs.get("out")):
            while isinstance(base, Node):
                if base in made_of:
                    return True
                base = base.args[0] if base.args else None
    return False


def _read(node: Any) -> _Read:
    """The numbers or the conditions that a node makes, in as many axes as it has."""
    if isinstance(node, int) and not isinstance(node, bool):
        return Sum({}, node)
    rule = _RULES.get(node.target) if isinstance(node, Node) and node.op in ("call_function", "call_method") else None
    value = value_of(node) if rule is not None else None
    if rule is None or not isinstance(value, Tensor) or value.dtype not in (torch.bool, torch.int32, torch.int64):
        return None
    try:
        bound = inspect.signature(rule).bind(value, *node.args, **node.kwargs)
    except TypeError:
        return None
    found = rule(*bound.args, **bound.kwargs)
    if isinstance(found, Sum):
        return found.within(value.shape) if value.dtype != torch.bool else None
    return found if found is None or value.dtype != torch.bool else tuple(each.within(value.shape) for each in found)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _rule(*targets: Any) -> Callable[[Callable[..., _Read]], Callable[..., _Read]]:
    """The rule is called with the value as traced and the arguments of the node; a call that does not bind is not read."""

    def register(rule: Callable[..., _Read]) -> Callable[..., _Read]:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


@_rule(torch.arange, aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(made: Tensor, *bounds: Any, **settings: Any) -> _Read:
    start, step = bounds[0] if len(bounds) > 1 else 0, bounds[2] if len(bounds) > 2 else 1
    named = {"start", "end", "step", "out"} & settings.keys()
    return Sum({1: step}, start) if not named and isinstance(start, int) and isinstance(step, int) else None


@_rule(torch.ones, aten.ones.default, "new_ones", aten.new_ones.default)
def _ones(made: Tensor, *arguments: Any, **settings: Any) -> _Read:
    return ()


@_rule(torch.full, aten.full.default)
def _full(made: Tensor, size: Any, fill_value: Any, **settings: Any) -> _Read:
    return () if fill_value is True else None


@_rule("to", "long", "int", "bool", "contiguous", "clone", torch.clone, aten.clone.default, aten._to_copy.default, aten.to.dtype)
def _same(made: Tensor, x: Any, *arguments: Any, **settings: Any) -> _Read:
    found = _read(x)
    return found if isinstance(found, tuple) == (made.dtype == torch.bool) else None


@_rule("unsqueeze", torch.unsqueeze, aten.unsqueeze.default)
def _unsqueeze(made: Tensor, x: Any, dim: int) -> _Read:
    new = made.ndim - dim % made.ndim
    return _moved(x, {axis: axis + (axis >= new) for axis in range(1, made.ndim)})


@_rule(operator.getitem)
def _getitem(made: Tensor, x: Any, index: Any) -> _Read:
    """New axes, whole axes, and "..."."""
    items, value = list(index) if isinstance(index, tuple) else [index], value_of(x)
    if not isinstance(value, Tensor) or not all(each is None or each is ... or each == slice(None) for each in items):
        return None
    rest = [slice(None)] * (value.ndim - sum(isinstance(each, slice) for each in items))
    at = items.index(...) if ... in items else len(items)
    items[at : at + 1] = rest
    places = [place for place, each in enumerate(reversed(items), start=1) if each is not None]
    return _moved(x, dict(enumerate(places, start=1)))


@_rule("view", "reshape", torch.reshape, aten.view.default, aten.reshape.default)
def _reshape(made: Tensor, x: Any, *shape: Any) -> _Read:
    """Of one axis, and of a result with one axis of more than one element."""
    value, axes = value_of(x), [axis for axis in range(1, made.ndim + 1) if not _is_one(made.shape[-axis])]
    return _moved(x, {1: axes[0]}) if isinstance(value, Tensor) and value.ndim == len(axes) == 1 else None


@_rule("expand", aten.expand.default, "expand_as", torch.broadcast_to, "broadcast_to")
def _expand(made: Tensor, x: Any, *shape: Any, **settings: Any) -> _Read:
    return _read(x)


def _moved(x: Any, to: Mapping[int, int]) -> _Read:
    found = _read(x)
    return found.moved(to) if isinstance(found, Sum) else None if found is None else tuple(each.moved(to) for each in found)


@_rule(operator.add, torch.add, "add", aten.add.Tensor)
def _add(made: Tensor, x: Any, y: Any) -> _Read:
    return _sum(x, y, 1)


@_rule(operator.sub, torch.sub, "sub", aten.sub.Tensor)
def _sub(made: Tensor, x: Any, y: Any) -> _Read:
    return _sum(x, y, -1)


def _sum(x: Any, y: Any, factor: int) -> Sum | None:
    first, second = _read(x), _read(y)
    return first + second.times(factor) if isinstance(first, Sum) and isinstance(second, Sum) else None


# x OP y where factor * (x - y) - least >= 0.
for _name, _factor, _least in (("ge", 1, 0), ("gt", 1, 1), ("le", -1, 0), ("lt", -1, 1)):

    def _compare(made: Tensor, x: Any, y: Any, factor: int = _factor, least: int = _least) -> _Read:
        found = _sum(x, y, -1)
        return None if found is None else (found.times(factor) + Sum({}, -least),)

    _packet = getattr(aten, _name)
    _rule(getattr(operator, _name), getattr(torch, _name), _name, _packet.Tensor, _packet.Scalar)(_compare)


@_rule(
    operator.and_, torch.logical_and, torch.bitwise_and, "logical_and", "bitwise_and", "__and__",
    aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor,
)  # fmt: skip
def _and(made: Tensor, x: Any, y: Any) -> _Read:
    first, second = _read(x), _read(y)
    return first + second if isinstance(first, tuple) and isinstance(second, tuple) else None


@_rule(
    operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not",
    aten.logical_not.default, aten.bitwise_not.default,
)  # fmt: skip
def _not(made: Tensor, x: Any) -> _Read:
    found = _read(x)
    return (found[0].times(-1) + Sum({}, -1),) if isinstance(found, tuple) and len(found) == 1 else None


@_rule(torch.tril, "tril", aten.tril.default)
def _tril(made: Tensor, x: Any, diagonal: Any = 0) -> _Read:
    found = _read(x)
    return (*found, Sum({2: 1, 1: -1}, diagonal)) if isinstance(found, tuple) and isinstance(diagonal, int) else None


@_rule(torch.triu, "triu", aten.triu.default)
def _triu(made: Tensor, x: Any, diagonal: Any = 0) -> _Read:
    found = _read(x)
    return (*found, Sum({2: -1, 1: 1}, -diagonal)) if isinstance(found, tuple) and isinstance(diagonal, int) else None
