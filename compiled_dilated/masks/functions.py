"""Masks by a function: a FlexAttention mask_mod, traced to a graph.

from_mod(fn, within)     FromMod: the user's function, traced again at every call

traced.py has the result of tracing: a graph, equal by value, and the operands that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..mods import MaskMod, check_callable, name_of, over_pairs, trace_mask_mod
from ..regions import Regions, Verdicts
from .contents import Contents
from .core import Data, Mask, Positions
from .traced import (
    OfFunction,
    Traced,
    are_scalars,
    at_pairs,
)


@dataclass(frozen=True, repr=False)
class FromMod(OfFunction):
    """The user's fn(b, h, q, kv), inside `within`.

    Every method traces fn again, as numbers and tensors that it captures may have changed.
    """

    fn: MaskMod
    within: Mask | None

    def trace(self) -> tuple[Traced, tuple[Tensor, ...]]:
        """The mask as a graph, and the tensors that fn captures."""
        graph, operands = trace_mask_mod(self.fn)
        slots, contents = tuple(range(len(operands))), Contents.of(operands)
        mask = Traced(graph, slots, self.within, contents=contents, name=name_of(self.fn))
        return mask, operands

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        if are_scalars(b, h, q, kv):  # FlexAttention calls a mask_mod with scalars, under vmap
            allowed = self.fn(b, h, q, kv)
        else:
            allowed = at_pairs(lambda *indices: over_pairs(self.fn, *indices), b, h, q, kv)
        if self.within is None:
            return allowed
        return allowed & self.within.allows(b, h, q, kv, data)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        mask, operands = self.trace()
        verdicts = mask.classify(q, kv)
        del operands  # not before: the mask has only weak references to them
        return verdicts

    @property
    def per_call(self) -> bool:
        return self.trace()[0].per_call

    def at_head(self, head: int, heads: int) -> Mask:
        mask = self._map(lambda part: part.at_head(head, heads))
        # A function that reads the head index is a different mask for every head.
        if self.trace()[0].graph.reads("h"):
            return replace(mask, fn=_OfHead(self.fn, head))
        return mask

    def __repr__(self) -> str:
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, write: Callable[[Mask], str]) -> str:
        if self.within is None:
            return f"from_mod({name_of(self.fn)})"
        return f"from_mod({name_of(self.fn)}, within={write(self.within)})"


@dataclass(frozen=True)
class _OfHead:
    """A mask_mod evaluated for one head."""

    fn: MaskMod
    head: int

    def __call__(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        # A constant, so that the graph reads no head.
        return self.fn(b, torch.full_like(h, self.head), q, kv)


def from_mod(fn: MaskMod, within: Mask | None = None) -> Mask:
    """A FlexAttention mask_mod as a mask.

    fn is called with scalars, as torch calls it, and traced to a graph at every call: captured
    numbers and tensors are read as they are then. Captured tensors with equal contents reuse the
    plan; new contents are planned again. Data that changes from call to call is cheaper as
    `documents(ids=...)` or `padding(...)`.

    fn: (b, h, q_idx, kv_idx) -> bool tensor, evaluated tile by tile inside `within`.
    within: a mask that contains all allowed pairs; without it at most 2**28 pairs are accepted.

    Raises TypeError if fn is not a function of four arguments. The call raises ModError (a
    ValueError) if fn branches on values, draws random numbers, or does not return one bool per
    pair.
    """
    check_callable("fn", fn, scores=False)
    if within is not None and not isinstance(within, Mask):
        raise TypeError(f"within must be a mask; got {arguments.kind_and_text(within)}")
    return FromMod(fn, within)


def functions_of(mask: Mask) -> tuple[MaskMod, ...]:
    """All functions of a mask's `from_mod` parts, inner ones first."""
    return tuple(part.fn for part in mask.walk() if isinstance(part, FromMod))
