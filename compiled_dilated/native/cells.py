"""Calls of pointwise operators on single entries, and simple rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .expressions import SHORT, Expressions, Register, Untranslatable, register_of

# An argument: (node, dtype), or a literal.
Argument = Any
# From the call and its arguments to the node of the result.
Pointwise = Callable[..., int]


@dataclass(frozen=True)
class Cell:
    """One call of a pointwise operator.

    x: the expressions, to which nodes are added.
    op: the operator, for errors.
    dtype: of the result.
    compute: the dtype that the arguments are converted to.
    """

    x: Expressions
    op: Any
    dtype: torch.dtype
    compute: torch.dtype

    def node(self, argument: Argument, dtype: torch.dtype | None = None) -> int:
        """An argument as a node of a dtype, by default `compute`."""
        dtype = dtype or self.compute
        if isinstance(argument, tuple):
            node, source = argument
            return self._converted(node, source, dtype)
        if dtype.is_floating_point:
            return self.x.constant(float(argument), register_of(dtype))
        if dtype == torch.bool:
            return self.x.constant(bool(argument), Register.BOOLEAN)
        return self.x.wrapped(self.x.whole(int(argument)), dtype)

    def _converted(self, node: int, source: torch.dtype, dtype: torch.dtype) -> int:
        if source == dtype:
            return node
        # torch computes on float16 and bfloat16 in float32: a float32 argument keeps its digits.
        keeps_digits = dtype in SHORT and source == torch.float32
        return self.x.cast(node, torch.float32 if keeps_digits else dtype)

    def result(self, node: int) -> int:
        """The node of the result, rounded or wrapped to the result's dtype."""
        if self.dtype.is_floating_point:
            return self.x.rounded(self.x.held(node, register_of(self.dtype)), self.dtype)
        return node if self.dtype == torch.bool else self.x.wrapped(node, self.dtype)

    def zero_like(self, node: int) -> int:
        """0.0 in the register of a node."""
        return self.x.constant(0.0, self.x.type(node))

    def unary(self, op: str, a: int) -> int:
        """An operation on a node."""
        return self.x.unary(op, a)

    def binary(self, op: str, a: int, b: int) -> int:
        """An operation on two nodes."""
        return self.x.binary(op, a, b)


def unary(op: str) -> Pointwise:
    """The rule of one operation on one number."""

    def rule(c: Cell, a: Argument, **_: Any) -> int:
        return c.unary(op, c.node(a))

    return rule


def binary(op: str, for_bools: str | None = None) -> Pointwise:
    """The rule of one operation on two numbers; `for_bools` on two bools."""

    def rule(c: Cell, a: Argument, b: Argument) -> int:
        if c.compute != torch.bool:
            return c.binary(op, c.node(a), c.node(b))
        if for_bools is None:
            raise Untranslatable(f"the tape has no {c.op} of bools")
        return c.binary(for_bools, c.node(a), c.node(b))

    return rule
