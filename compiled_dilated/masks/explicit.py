"""Masks that somebody else decides: explicit lists of tiles, and any FlexAttention mask_mod."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .. import arguments
from ..regions import EMPTY, FULL, PARTIAL, Regions, Verdicts, both, verdicts
from .core import Data, Full, Mask, Positions
from .lookup import as_tensor, rank

MaskMod = Callable[[Any, Any, Any, Any], Any]

# A bare function has to be asked about every pair. 2**28 pairs (16K x 16K) take seconds; past that the user says where to look.
MOST_PAIRS_WITHOUT_WITHIN = 2**28
# Tiles of up to this many pairs are evaluated; larger regions are left PARTIAL, to be split further.
_MOST_PAIRS_PER_TILE = 2**16
_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True, repr=False)
class Tiles(Mask):
    """q // block and kv // block are a listed pair; `keys` are the pairs as sorted numbers row * columns + column."""

    block: int
    columns: int
    keys: tuple[int, ...]
    table: Any = field(default=None, compare=False)

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        column = kv // self.block
        key = q // self.block * self.columns + column
        return (rank(self.keys, key, self.table) > rank(self.keys, key - 1, self.table)) & (column < self.columns)

    def on(self, device: Any) -> Mask:
        return replace(self, table=as_tensor(self.keys, device))

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        table = np.asarray(self.keys, dtype=np.int64)
        rows = (q.first // self.block, q.last // self.block)
        columns = (kv.first // self.block, np.minimum(kv.last // self.block, self.columns - 1))
        beyond = kv.last // self.block >= self.columns
        out = np.full(len(q), PARTIAL)
        one_row = rows[0] == rows[1]
        listed = np.searchsorted(table, rows[0] * self.columns + columns[1], side="right")
        listed -= np.searchsorted(table, rows[0] * self.columns + columns[0], side="left")
        out[one_row & (listed <= 0)] = EMPTY
        out[one_row & (listed == columns[1] - columns[0] + 1) & ~beyond] = FULL
        # Many rows: only a span of rows without a single pair is known to be empty.
        any_row = np.searchsorted(table, (rows[1] + 1) * self.columns) - np.searchsorted(table, rows[0] * self.columns)
        out[(any_row <= 0) | (columns[0] > columns[1])] = EMPTY
        return out

    @property
    def period(self) -> int | None:
        return None

    def __repr__(self) -> str:
        pairs = ", ".join(f"({key // self.columns}, {key % self.columns})" for key in self.keys)
        return f"tiles([{pairs}], block={self.block}{'' if self._tight else f', columns={self.columns}'})"

    @property
    def _tight(self) -> bool:
        return self.columns == max((key % self.columns for key in self.keys), default=0) + 1


def tiles(pairs: Iterable[tuple[int, int]], block: int = 128, columns: int | None = None) -> Mask:
    """Exactly the listed tiles: (query tile, key tile) pairs of `block` x `block` tokens, each wholly visible."""
    block = arguments.integer("block", block, 1)
    if isinstance(pairs, (str, bytes)) or not arguments.is_iterable(pairs):
        raise TypeError(
            f"pairs must be (query tile, key tile) pairs; got {type(pairs).__name__}. "
            f"Write tiles([(0, 0), (1, 0)], block={block})"
        )
    listed = [arguments.integers(f"pairs[{i}]", pair, 0) for i, pair in enumerate(pairs)]
    if any(len(pair) != 2 for pair in listed):
        raise ValueError("pairs: every tile must be a (query tile, key tile) pair; got one with another number of entries")
    tight = max((column for _, column in listed), default=0) + 1
    width = tight if columns is None else arguments.integer("columns", columns, tight)
    rows = max((row for row, _ in listed), default=0) + 1
    if rows * width > arguments.MOST or max(rows, width) * block > arguments.MOST:
        raise ValueError(
            f"pairs must name at most 2**60 tiles, below position 2**60; got {rows} x {width} tiles of {block} tokens"
        )
    return Tiles(block, width, tuple(sorted({row * width + column for row, column in listed})))


@dataclass(frozen=True, repr=False)
class FromMod(Mask):
    """fn(b, h, q, kv) and `within`; `head` is set once the mask is asked for one head."""

    fn: MaskMod
    within: Mask | None
    head: int | None = None

    def allows(self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None) -> Any:
        if self.head is not None:
            h = h * 0 + self.head
        seen = self.fn(b, h, q, kv)
        return seen if self.within is None else seen & self.within.allows(b, h, q, kv, data)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        out = np.full(len(q), FULL) if self.within is None else self.within.classify(q, kv).copy()
        pairs = q.extent.prod(axis=1) * kv.extent.prod(axis=1)
        asked = np.flatnonzero(out != EMPTY)
        small = asked[pairs[asked] <= _MOST_PAIRS_PER_TILE]
        answer = np.full(len(q), PARTIAL)
        if not _reads(self.fn, 0) and (self.head is not None or not _reads(self.fn, 1)):
            answer[small] = self._evaluate(q[small], kv[small])
        return np.where(out == EMPTY, EMPTY, both(out, answer))

    def _evaluate(self, q: Regions, kv: Regions) -> Verdicts:
        """Ask the function about every pair of small regions, regions of equal shape together, a bounded number at a time."""
        import torch

        out = np.empty(len(q), dtype=np.uint8)
        shapes = np.concatenate([q.extent, q.stride, kv.extent, kv.stride], axis=1)
        distinct, which = np.unique(shapes, axis=0, return_inverse=True)
        zero, head = torch.zeros((), dtype=torch.int64), torch.tensor(self.head or 0)
        for shape in range(len(distinct)):
            rows = np.flatnonzero(which.reshape(-1) == shape)
            q_steps, kv_steps = (side.positions(rows[0]) - side.base[rows[0]] for side in (q, kv))
            at_once = max(1, _PAIRS_AT_ONCE // (len(q_steps) * len(kv_steps)))
            for chunk in np.array_split(rows, -(-len(rows) // at_once)):
                q_at = torch.from_numpy(q.base[chunk, None, None] + q_steps[None, :, None])
                kv_at = torch.from_numpy(kv.base[chunk, None, None] + kv_steps[None, None, :])
                seen = torch.as_tensor(self.fn(zero, head, q_at, kv_at)).broadcast_to(len(chunk), len(q_steps), len(kv_steps))
                out[chunk] = verdicts(seen.all(dim=(1, 2)).numpy(), ~seen.any(dim=(1, 2)).numpy())
        return out

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        return (q, kv) if self.within is None else self.within.shrink(q, kv)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return () if self.within is None else (self.within,)

    @property
    def period(self) -> int | None:
        return None

    @property
    def per_call(self) -> bool:
        return _reads(self.fn, 0) or super().per_call

    def at_head(self, head: int, heads: int) -> Mask:
        # Asked once: the head of a part of the heads, as a rank or a group computes it, is not the head that the function knows.
        known = self.head if self.head is not None else head if _reads(self.fn, 1) else None
        return replace(self._map(lambda part: part.at_head(head, heads)), head=known)

    def _map(self, change: Callable[[Mask], Mask]) -> FromMod:
        return self if self.within is None else replace(self, within=change(self.within))

    def check(self, queries: range, keys: int) -> None:
        super().check(queries, keys)
        if (self.within is None or isinstance(self.within, Full)) and len(queries) * keys > MOST_PAIRS_WITHOUT_WITHIN:
            raise ValueError(
                f"{self!r} would be asked about {len(queries)} x {keys} = {len(queries) * keys:,} pairs, "
                f"more than {MOST_PAIRS_WITHOUT_WITHIN:,}. "
                "Say where to look: from_mod(fn, within=mask), for example within=window(4096)"
            )

    def __repr__(self) -> str:
        name = getattr(self.fn, "__qualname__", repr(self.fn))
        return f"from_mod({name}{'' if self.within is None else f', within={self.within!r}'})"


@lru_cache(maxsize=256)
def _reads(fn: MaskMod, argument: int) -> bool:
    """Whether fn looks at its argument of that number; True where that cannot be found out."""
    import torch.fx

    try:
        graph = torch.fx.symbolic_trace(fn).graph
    except Exception:  # a function that cannot be traced (data-dependent control flow, ...) may read anything
        return True
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return len(placeholders) <= argument or bool(placeholders[argument].users)


def from_mod(fn: MaskMod, within: Mask | None = None) -> Mask:
    """Any FlexAttention mask_mod `fn(b, h, q_idx, kv_idx) -> bool tensor` as a mask.

    It is evaluated tile by tile inside `within`, on positions; without `within` at most 2**28 pairs are accepted.
    The function is part of the structure, by identity: tensors that it captures must not change afterwards.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of (b, h, q_idx, kv_idx); got {type(fn).__name__} {fn!r}")
    if within is not None and not isinstance(within, Mask):
        raise TypeError(f"within must be a mask; got {type(within).__name__} {within!r}")
    return FromMod(fn, within)
