"""Masks that a function decides: any FlexAttention mask_mod, traced to a graph that is equal by value.

from_mod(fn, within)     FromMod, as the user writes it: fn may change, and is traced at every call
traced(graph, slots)     Traced, as a program travels: a graph, and which of the call's operands it reads
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..mods import Graph, Kind, MaskMod, check_callable, kind_of, name_of, over_pairs, trace_mask_mod
from ..regions import EMPTY, FULL, PARTIAL, Regions, Verdicts, both, verdicts
from .core import Data, Full, Mask, Positions

# A bare function has to be asked about every pair. 2**28 pairs (16K x 16K) take seconds; past that the user says where to look.
MOST_PAIRS_WITHOUT_WITHIN = 2**28
# Tiles of up to this many pairs are evaluated; larger regions are left PARTIAL, to be split further.
_MOST_PAIRS_PER_TILE = 2**16
_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Contents:
    """What the operands of a call hold: equal by digest, so that a plan made for them is found again.

    tensors: weak, so that no cache of plans keeps them alive; they are there while a call plans. kinds: dtype and shape of each.
    """

    digests: tuple[str, ...]
    tensors: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    kinds: tuple[Kind, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def of(tensors: Sequence[Any]) -> Contents:
        """Of tensors with data; of fake ones and those on meta the shapes alone."""
        return Contents(tuple(map(digest, tensors)), tuple(map(weakref.ref, tensors)), tuple(map(kind_of, tensors)))

    def alive(self) -> list[Any] | None:
        """The tensors; None where one is gone or has no data."""
        tensors = [reference() for reference in self.tensors]
        gone = any(tensor is None for tensor in tensors) or any(digest.startswith("unknown") for digest in self.digests)
        return None if gone else tensors


def digest(x: Any) -> str:
    """A text that says what a tensor holds: shape, dtype and a hash of its numbers; of one without data, the first two."""
    kind = f"{tuple(x.shape)} {x.dtype}"
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    if x.device.type == "meta" or not is_plain:
        return f"unknown {kind}"
    with _disable_current_modes():
        numbers = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{kind} {hashlib.blake2b(numbers, digest_size=16).hexdigest()}"


def slot_name(slot: int) -> str:
    """The name under which a call's data holds the operand of a number; users' names cannot be such."""
    return f"<{slot}>"


class _OfFunction(Mask):
    """Pairs that a function allows inside `within`."""

    within: Mask | None

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return (q, kv) if self.within is None else self.within.shrink(q, kv)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return () if self.within is None else (self.within,)

    @property
    def period(self) -> int | None:
        return None

    def _map(self, change: Callable[[Mask], Mask]) -> Self:
        return self if self.within is None else replace(self, within=change(self.within))  # type: ignore[type-var]

    def check(self, queries: range, keys: int) -> None:
        super().check(queries, keys)
        pairs = len(queries) * keys
        if (self.within is None or isinstance(self.within, Full)) and pairs > MOST_PAIRS_WITHOUT_WITHIN:
            raise ValueError(
                f"{self} would be asked about {len(queries)} x {keys} = {pairs:,} pairs, "
                f"more than {MOST_PAIRS_WITHOUT_WITHIN:,}. "
                "Say where to look: from_mod(fn, within=mask), for example within=window(4096)"
            )


@dataclass(frozen=True, repr=False)
class Traced(_OfFunction):
    """A graph(b, h, q, kv) and `within`.

    slots: numbers of the call's operands that the graph reads. contents: what they hold, once that is known.
    head: set once the mask is asked for one head.
    """

    graph: Graph
    slots: tuple[int, ...]
    within: Mask | None = None
    head: int | None = None
    contents: Contents = Contents(())
    name: str = field(default="function", compare=False)

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        operands = self._operands(data)
        if operands is None:
            raise ValueError("the tensors that a mask_mod captures are gone; they must live as long as the mask is asked")
        h = h if self.head is None else h * 0 + self.head
        if _are_scalars(b, h, q, kv):  # as FlexAttention asks, under vmap
            seen = self.graph.scalar(operands, b, h, q, kv)
        else:
            seen = _over_pairs(lambda *indices: self.graph.mask(operands, *indices), b, h, q, kv)
        return seen if self.within is None else seen & self.within.allows(b, h, q, kv, data)

    def _operands(self, data: Data | None) -> list[Any] | None:
        if data is not None and all(slot_name(slot) in data for slot in self.slots):
            return [data[slot_name(slot)] for slot in self.slots]
        return self.contents.alive()

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        out = np.full(len(q), FULL) if self.within is None else self.within.classify(q, kv).copy()
        pairs = q.extent.prod(axis=1) * kv.extent.prod(axis=1)
        asked = np.flatnonzero(out != EMPTY)
        small = asked[pairs[asked] <= _MOST_PAIRS_PER_TILE]
        answer = np.full(len(q), PARTIAL)
        operands = self._operands(None)
        known = operands is not None and not self.graph.reads("b") and (self.head is not None or not self.graph.reads("h"))
        if operands is not None and known:
            answer[small] = self._evaluate(operands, q[small], kv[small])
        return np.where(out == EMPTY, EMPTY, both(out, answer))

    def _evaluate(self, operands: Sequence[Any], q: Regions, kv: Regions) -> Verdicts:
        """Ask the function about every pair of small regions, regions of equal shape together, a bounded number at a time."""
        device = operands[0].device if operands else torch.device("cpu")
        out = np.empty(len(q), dtype=np.uint8)
        shapes = np.concatenate([q.extent, q.stride, kv.extent, kv.stride], axis=1)
        distinct, which = np.unique(shapes, axis=0, return_inverse=True)
        zero = torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
        head = zero + (self.head or 0)
        for shape in range(len(distinct)):
            rows = np.flatnonzero(which.reshape(-1) == shape)
            q_steps, kv_steps = (side.positions(rows[0]) - side.base[rows[0]] for side in (q, kv))
            at_once = max(1, _PAIRS_AT_ONCE // (len(q_steps) * len(kv_steps)))
            for chunk in np.array_split(rows, -(-len(rows) // at_once)):
                q_at = torch.from_numpy(q.base[chunk, None, None] + q_steps[None, :, None]).to(device)
                kv_at = torch.from_numpy(kv.base[chunk, None, None] + kv_steps[None, None, :]).to(device)
                seen = self.graph.mask(operands, zero, head, q_at, kv_at)
                seen = seen.broadcast_to(len(chunk), len(q_steps), len(kv_steps))
                full, empty = (x.cpu().numpy() for x in (seen.all(dim=2).all(dim=1), ~seen.any(dim=2).any(dim=1)))
                out[chunk] = verdicts(full, empty)
        return out

    @property
    def per_call(self) -> bool:
        return self.graph.reads("b") or super().per_call

    def at_head(self, head: int, heads: int) -> Mask:
        # Bound on the first call only: later calls see heads counted from the first of a rank or a group.
        bound = self.head if self.head is not None else head if self.graph.reads("h") else None
        return replace(self._map(lambda part: part.at_head(head, heads)), head=bound)

    def __repr__(self) -> str:
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, write: Callable[[Mask], str]) -> str:
        head = "" if self.head is None else f" of head {self.head}"
        return f"from_mod({self.name}{head}{'' if self.within is None else f', within={write(self.within)}'})"


def of_graph(graph: str, slots: Sequence[int], name: str, within: Mask | None = None) -> Mask:
    """A mask_mod as a graph in text, the numbers of the operands that it reads, and its name for people."""
    traced = Traced(Graph(graph).check(), tuple(slots), within, name=name)
    if not all(isinstance(slot, int) for slot in traced.slots) or len(traced.slots) != traced.graph.operands:
        raise ValueError(f"slots must be {traced.graph.operands} numbers of operands; got {slots!r}")
    if not isinstance(within, Mask | None):
        raise TypeError(f"within must be a mask; got {type(within).__name__}")
    return traced


@dataclass(frozen=True, repr=False)
class FromMod(_OfFunction):
    """fn(b, h, q, kv) and `within`, as the user writes it; what is asked of it is asked of its graph as it is now."""

    fn: MaskMod
    within: Mask | None

    def trace(self) -> tuple[Traced, tuple[Tensor, ...]]:
        """The mask as a graph, and the tensors that fn captures, which are its operands."""
        graph, operands = trace_mask_mod(self.fn)
        return Traced(graph, tuple(range(len(operands))), self.within, None, Contents.of(operands), name_of(self.fn)), operands

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        if _are_scalars(b, h, q, kv):  # as FlexAttention asks, under vmap
            seen = self.fn(b, h, q, kv)
        else:
            seen = _over_pairs(lambda *indices: over_pairs(self.fn, *indices), b, h, q, kv)
        return seen if self.within is None else seen & self.within.allows(b, h, q, kv, data)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        mask, operands = self.trace()
        verdicts = mask.classify(q, kv)
        del operands  # which the mask holds weakly
        return verdicts

    @property
    def per_call(self) -> bool:
        return self.trace()[0].per_call

    def at_head(self, head: int, heads: int) -> Mask:
        # Of a function that looks at heads each is another mask.
        if self.trace()[0].graph.reads("h"):
            return replace(self._map(lambda part: part.at_head(head, heads)), fn=_OfHead(self.fn, head))
        return self._map(lambda part: part.at_head(head, heads))

    def __repr__(self) -> str:
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, write: Callable[[Mask], str]) -> str:
        return f"from_mod({name_of(self.fn)}{'' if self.within is None else f', within={write(self.within)}'})"


@dataclass(frozen=True)
class _OfHead:
    """A mask_mod asked about one head."""

    fn: MaskMod
    head: int

    def __call__(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return self.fn(b, torch.full_like(h, self.head), q, kv)  # a constant, so that the graph reads no head


def from_mod(fn: MaskMod, within: Mask | None = None) -> Mask:
    """Any FlexAttention mask_mod `fn(b, h, q_idx, kv_idx) -> bool tensor` as a mask.

    fn is called as torch calls it, with scalars, and traced to a graph at every call: what it captures, numbers and tensors, is
    read as it is then. Where the tensors hold what they held, the plan is found again; new contents are planned anew (data that
    changes from call to call is cheaper as `documents(ids=...)` or `padding(...)`).

    fn: evaluated tile by tile inside `within`; without `within` at most 2**28 pairs are accepted.

    Raises TypeError for what is no function of four arguments, and at the call ModError (a ValueError) for a function that
    branches on values, draws random numbers, or does not return one bool for each pair.
    """
    check_callable("fn", fn, scores=False)
    if within is not None and not isinstance(within, Mask):
        raise TypeError(f"within must be a mask; got {type(within).__name__} {within}")
    return FromMod(fn, within)


def with_contents(mask: Mask, operands: Sequence[Any]) -> Mask:
    """The mask with what its graphs' operands hold."""
    whole = mask._map(lambda part: with_contents(part, operands))
    if not isinstance(whole, Traced) or not whole.slots:
        return whole
    if not all(0 <= slot < len(operands) for slot in whole.slots):
        raise ValueError(f"{whole} reads the operands {whole.slots} of {len(operands)}")
    return replace(whole, contents=Contents.of([operands[slot] for slot in whole.slots]))


def traced_parts(mask: Mask) -> list[Traced]:
    """The functions of a mask that are graphs, inner ones first."""
    inner = [traced for part in mask.parts for traced in traced_parts(part)]
    return [*inner, mask] if isinstance(mask, Traced) else inner


def reads_operands(mask: Mask) -> bool:
    """Whether a function of the mask captures tensors."""
    return any(part.slots for part in traced_parts(mask))


def functions_of(mask: Mask) -> tuple[MaskMod, ...]:
    """The functions of a mask's `from_mod`s, inner ones first."""
    inner = tuple(fn for part in mask.parts for fn in functions_of(part))
    return (*inner, mask.fn) if isinstance(mask, FromMod) else inner


def _are_scalars(*indices: Positions) -> bool:
    return all(isinstance(x, torch.Tensor) and x.dim() == 0 for x in indices)


def _over_pairs(ask: Callable[..., Any], *indices: Positions) -> Any:
    """ask(b, h, q, kv) of broadcasting positions, numpy arrays or tensors: as 64-bit tensors of one number of dimensions."""
    if not any(isinstance(x, torch.Tensor) for x in indices):
        arrays = (torch.from_numpy(np.array(x, dtype=np.int64)) for x in indices)
        return _over_pairs(ask, *arrays).numpy()
    device = next(x.device for x in indices if isinstance(x, torch.Tensor))
    tensors = [torch.as_tensor(x, device=device) for x in indices]
    rank = max(1, *(x.dim() for x in tensors))
    # 64 bits, as a function may multiply positions.
    seen = ask(*(x.to(torch.int64).reshape((1,) * (rank - x.dim()) + tuple(x.shape)) for x in tensors))
    return seen.reshape(()) if all(x.dim() == 0 for x in tensors) else seen
