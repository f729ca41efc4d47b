"""Tensors of expressions, evaluated entry by entry.

A mod's tensors are small, or captured ones that it looks up. Only the entries that the result reads
are computed: (table * 2)[i] is one load and one product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..symbolic import example_size
from .expressions import Expressions, Register, Untranslatable, register_of
from .ranges import Range

MOST_ENTRIES = 512  # of a reduction, or of a look-up among computed entries


@dataclass(frozen=True)
class Place:
    """An index that is computed.

    node: the expression.
    bare: whether it is the user's own, in which a negative index counts from the end.
    """

    node: int
    bare: bool = True


Index = int | Place
Entry = Callable[[tuple[Index, ...]], int]


@dataclass(frozen=True)
class Cells:
    """A tensor whose entry at an index is the node at(index)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    at: Entry

    @property
    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def entries(self) -> list[int]:
        """The nodes of all entries in row-major order."""
        check_entries(math.prod(self.shape))
        return [self.at(index) for index in itertools.product(*map(range, self.shape))]


def check_entries(count: int) -> None:
    """Raise Untranslatable for a reduction of too many entries."""
    if count > MOST_ENTRIES:
        raise Untranslatable(
            f"it reduces {count:,} numbers for each pair, more than {MOST_ENTRIES}"
        )


def cells(dtype: torch.dtype, shape: Sequence[int], at: Entry) -> Cells:
    """A tensor of these entries.

    The entry of a scalar is computed at once.
    """
    if shape:
        return Cells(dtype, tuple(shape), at)
    node = at(())
    return Cells(dtype, (), lambda _: node)


def positive_dim(dim: int, dims: int) -> int:
    """A dimension counted from the first."""
    return dim + dims if dim < 0 else dim


def broadcast_entry(x: Cells, index: tuple[Index, ...]) -> int:
    """The entry at an index of the broadcast tensor."""
    place: list[Index] = []
    # Broadcasting aligns the last dimensions.
    first = len(index) - len(x.shape)
    for position, size in zip(index[first:], x.shape, strict=True):
        place.append(0 if size == 1 else position)
    return x.at(tuple(place))


@dataclass
class Tensors:
    """Builder of tensors over one set of expressions.

    x: the expressions, to which nodes are added.
    fixed: size of each (operand, dimension) that the expressions depend on.
    """

    x: Expressions
    fixed: dict[tuple[int, int], int] = field(default_factory=dict)

    def operand(self, number: int, dtype: torch.dtype, shape: Sequence[Any]) -> Cells:
        """A captured tensor; its sizes may be symbolic."""
        register = register_of(dtype)
        limits: Range | None = None
        if not dtype.is_floating_point and dtype != torch.bool:
            info = torch.iinfo(dtype)
            limits = Range(info.min, info.max)

        def at(index: tuple[Index, ...]) -> int:
            for dim, position in enumerate(index):
                # Any position but the user's own index was computed from the size.
                if isinstance(position, int) or not position.bare:
                    if not isinstance(shape[dim], int):
                        raise Untranslatable("it counts along a dimension whose size varies")
                    self.fixed[number, dim] = shape[dim]
            inputs = map(self.node, index)
            return self.x.add("load", register, *inputs, number=number, within=limits)

        sizes = [example_size(size) for size in shape]
        return cells(dtype, sizes, at)

    def converted(self, x: Cells, index: tuple[Index, ...], dtype: torch.dtype) -> int:
        """An entry converted to a dtype."""
        node = x.at(index)
        return node if x.dtype == dtype else self.x.cast(node, dtype)

    # Index arithmetic -----------------------------------------------------------------------

    def node(self, index: Index) -> int:
        """The node of an index."""
        return self.x.whole(index) if isinstance(index, int) else index.node

    def within(self, index: Index, size: int) -> Index:
        """An index as a position 0 .. size - 1."""
        if isinstance(index, int):
            return index + size if index < 0 else index
        if not index.bare:
            return index
        limits = Range(0, size - 1)
        node = self.x.add("within", Register.I64, index.node, number=size, within=limits)
        return Place(node, bare=False)

    def times(self, index: Index, factor: int) -> Index:
        """index * factor."""
        if isinstance(index, int):
            return index * factor
        if factor == 1:
            return index
        return Place(self.x.binary("multiply", index.node, self.x.whole(factor)), bare=False)

    def plus(self, a: Index, b: Index) -> Index:
        """a + b."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0:
            return b
        if b == 0:
            return a
        return Place(self.x.binary("add", self.node(a), self.node(b)), bare=False)

    def divided(self, index: Index, by: int) -> tuple[Index, Index]:
        """Quotient and remainder of a position."""
        if isinstance(index, int):
            return divmod(index, by)
        divisor = self.x.whole(by)
        quotient = self.x.binary("floor_divide", index.node, divisor)
        remainder = self.x.binary("remainder", index.node, divisor)
        return Place(quotient, bare=False), Place(remainder, bare=False)

    def strided(self, index: Index, size: int, start: int, step: int) -> Index:
        """start + step * index, along a dimension of `size` entries."""
        return self.plus(self.times(self.within(index, size), step), start)

    def choose(self, index: Index, size: int, entry: Callable[[int], int]) -> int:
        """entry(index); a computed index is compared with all `size` positions."""
        index = self.within(index, size)
        if isinstance(index, int):
            return entry(index)
        if size > MOST_ENTRIES:
            raise Untranslatable(
                f"it looks up one of {size:,} computed numbers, more than {MOST_ENTRIES}"
            )
        # A chain of choices, the last entry innermost.
        out = entry(size - 1)
        for position in reversed(range(size - 1)):
            is_here = self.x.binary("equal", index.node, self.x.whole(position))
            out = self.x.choice(is_here, entry(position), out)
        return out
