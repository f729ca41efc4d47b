"""Masks by a graph traced from a FlexAttention mask_mod.

Equal by value, evaluated on tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch

from ..mods import Graph
from ..regions import EMPTY, FULL, PARTIAL, Regions, Verdicts, both, verdicts
from .contents import NO_CONTENTS, Contents, slot_name
from .core import Data, Mask, Positions
from .full import Full

# Without `within`, the function is evaluated on every pair: 2**28 pairs (16K x 16K) take seconds.
MOST_PAIRS_WITHOUT_WITHIN = 2**28
# Tiles of up to this many pairs are evaluated; larger regions stay PARTIAL, to be split further.
_MOST_PAIRS_PER_TILE = 2**16
_PAIRS_AT_ONCE = 2**22


class OfFunction(Mask):
    """Pairs that a function allows inside `within`; base of `FromMod` and `Traced`."""

    within: Mask | None

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        if self.within is None:
            return q, kv
        return self.within.shrink(q, kv)

    @property
    def parts(self) -> tuple[Mask, ...]:
        if self.within is None:
            return ()
        return (self.within,)

    @property
    def period(self) -> int | None:
        return None

    def _map(self, change: Callable[[Mask], Mask]) -> Self:
        if self.within is None:
            return self
        return replace(self, within=change(self.within))  # type: ignore[type-var]

    def check(self, queries: range, keys: int) -> None:
        super().check(queries, keys)
        pairs = len(queries) * keys
        is_unlimited = self.within is None or isinstance(self.within, Full)
        if is_unlimited and pairs > MOST_PAIRS_WITHOUT_WITHIN:
            raise ValueError(
                f"{self} would be evaluated on {len(queries)} x {keys} = {pairs:,} pairs, "
                f"more than {MOST_PAIRS_WITHOUT_WITHIN:,}. "
                "Say where to look: from_mod(fn, within=mask), for example within=window(4096)"
            )


@dataclass(frozen=True, repr=False)
class Traced(OfFunction):
    """A graph(b, h, q, kv) of a mask_mod, inside `within`.

    slots: numbers of the call's operands that the graph reads.
    head: the head to evaluate for, once `at_head` has bound it.
    contents: values of the operands, once they are available.
    name: the function's name, for messages.
    """

    graph: Graph
    slots: tuple[int, ...]
    within: Mask | None = None
    head: int | None = None
    contents: Contents = NO_CONTENTS
    name: str = field(default="function", compare=False)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        operands = self._operands(data)
        if operands is None:
            raise ValueError(
                "the tensors that a mask_mod captures were freed; "
                "they must live as long as the mask is evaluated"
            )
        if self.head is not None:
            h = h * 0 + self.head
        if are_scalars(b, h, q, kv):  # FlexAttention calls a mask_mod with scalars, under vmap
            allowed = self.graph.scalar(operands, b, h, q, kv)
        else:
            allowed = at_pairs(lambda *indices: self.graph.mask(operands, *indices), b, h, q, kv)
        if self.within is None:
            return allowed
        return allowed & self.within.allows(b, h, q, kv, data)

    def _operands(self, data: Data | None) -> list[Any] | None:
        """Operands from a call's data, else the bound ones, or None."""
        if data is not None and all(slot_name(slot) in data for slot in self.slots):
            return [data[slot_name(slot)] for slot in self.slots]
        return self.contents.alive()

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        # 1. Verdicts of `within`.
        out: Verdicts = np.full(len(q), FULL)
        if self.within is not None:
            out = self.within.classify(q, kv).copy()
        # 2. Verdicts of the function, on regions that are small and not EMPTY already.
        pairs = q.extent.prod(axis=1) * kv.extent.prod(axis=1)
        undecided = np.flatnonzero(out != EMPTY)
        small = undecided[pairs[undecided] <= _MOST_PAIRS_PER_TILE]
        evaluated = np.full(len(q), PARTIAL)
        operands = self._operands(None)
        if operands is not None and self._is_of_positions:
            evaluated[small] = self._evaluate(operands, q[small], kv[small])
        # 3. Verdicts of both.
        return np.where(out == EMPTY, EMPTY, both(out, evaluated))

    @property
    def _is_of_positions(self) -> bool:
        """Whether a pair depends on no batch index and no unbound head."""
        return not self.graph.reads("b") and (self.head is not None or not self.graph.reads("h"))

    def _evaluate(self, operands: Sequence[Any], q: Regions, kv: Regions) -> Verdicts:
        """Evaluate the function on every pair of small regions.

        Regions of equal shape are evaluated together, a bounded number of pairs at a time.
        """
        device = torch.device("cpu")
        if operands:
            device = operands[0].device
        out = np.empty(len(q), dtype=np.uint8)
        shapes = np.concatenate([q.extent, q.stride, kv.extent, kv.stride], axis=1)
        distinct, group = np.unique(shapes, axis=0, return_inverse=True)
        zero = torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
        head = zero + (self.head or 0)
        for shape in range(len(distinct)):
            # Positions relative to the base are the same for all regions of one shape.
            indices = np.flatnonzero(group.reshape(-1) == shape)
            first = indices[0]
            q_steps = (q.positions(first) - q.base[first])[None, :, None]
            kv_steps = (kv.positions(first) - kv.base[first])[None, None, :]
            at_once = max(1, _PAIRS_AT_ONCE // (q_steps.size * kv_steps.size))
            for chunk in np.array_split(indices, -(-len(indices) // at_once)):
                q_at = torch.from_numpy(q.base[chunk, None, None] + q_steps).to(device)
                kv_at = torch.from_numpy(kv.base[chunk, None, None] + kv_steps).to(device)
                allowed = self.graph.mask(operands, zero, head, q_at, kv_at)
                allowed = allowed.broadcast_to(len(chunk), q_steps.size, kv_steps.size)
                full = allowed.all(dim=2).all(dim=1).cpu().numpy()
                empty = ~allowed.any(dim=2).any(dim=1).cpu().numpy()
                out[chunk] = verdicts(full, empty)
        return out

    @property
    def per_call(self) -> bool:
        return self.graph.reads("b") or super().per_call

    def at_head(self, head: int, heads: int) -> Mask:
        # Bound on the first call only: later calls count heads from the first of a rank or a group.
        bound = self.head
        if bound is None and self.graph.reads("h"):
            bound = head
        return replace(self._map(lambda part: part.at_head(head, heads)), head=bound)

    def __repr__(self) -> str:
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, write: Callable[[Mask], str]) -> str:
        text = self.name
        if self.head is not None:
            text += f" of head {self.head}"
        if self.within is not None:
            text += f", within={write(self.within)}"
        return f"from_mod({text})"


def of_graph(graph: str, slots: Sequence[int], name: str, within: Mask | None = None) -> Mask:
    """A mask from the text of a mask_mod's graph.

    slots: numbers of the operands that the graph reads, as many as it has.
    name: the function's name, for messages.

    Raises ValueError or TypeError for a bad graph, slots or `within`.
    """
    traced = Traced(Graph(graph).check(), tuple(slots), within, name=name)
    count = traced.graph.operands
    if len(traced.slots) != count or not all(isinstance(slot, int) for slot in traced.slots):
        raise ValueError(f"slots must be {count} numbers of operands; got {slots!r}")
    if not isinstance(within, Mask | None):
        raise TypeError(f"within must be a mask; got {type(within).__name__}")
    return traced


def with_contents(mask: Mask, operands: Sequence[Any]) -> Mask:
    """Bind a call's operand values to the graphs of a mask."""
    bound = mask._map(lambda part: with_contents(part, operands))
    if not isinstance(bound, Traced) or not bound.slots:
        return bound
    if not all(0 <= slot < len(operands) for slot in bound.slots):
        raise ValueError(f"{bound} reads the operands {bound.slots} of {len(operands)}")
    return replace(bound, contents=Contents.of([operands[slot] for slot in bound.slots]))


def traced_parts(mask: Mask) -> list[Traced]:
    """All `Traced` parts of a mask, inner ones first."""
    return [part for part in mask.walk() if isinstance(part, Traced)]


def reads_operands(mask: Mask) -> bool:
    """Whether a function of the mask captures tensors."""
    return any(part.slots for part in traced_parts(mask))


def are_scalars(*indices: Positions) -> bool:
    """Whether all indices are scalar tensors."""
    return all(isinstance(x, torch.Tensor) and x.dim() == 0 for x in indices)


def at_pairs(evaluate: Callable[..., Any], *indices: Positions) -> Any:
    """Call evaluate(b, h, q, kv) with int64 tensors of one rank.

    indices: broadcasting numpy arrays or tensors; the result is of the same kind.
    """
    if not any(isinstance(x, torch.Tensor) for x in indices):
        arrays = (torch.from_numpy(np.array(x, dtype=np.int64)) for x in indices)
        return at_pairs(evaluate, *arrays).numpy()
    device = next(x.device for x in indices if isinstance(x, torch.Tensor))
    tensors = [torch.as_tensor(x, device=device) for x in indices]
    rank = max(1, *(x.dim() for x in tensors))
    expanded = []
    for x in tensors:
        shape = (1,) * (rank - x.dim()) + tuple(x.shape)
        # 64 bits, as a function may multiply positions.
        expanded.append(x.to(torch.int64).reshape(shape))
    allowed = evaluate(*expanded)
    if all(x.dim() == 0 for x in tensors):
        return allowed.reshape(())
    return allowed
