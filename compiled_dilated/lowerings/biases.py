"""Biases of tiles: -inf where a pair is hidden, else log of how often it counts. Those that last are kept from call to call.

One table keeps those of all programs, up to MOST_BYTES; the one used longest ago goes first. Tiles that begin alike share one,
whatever their size: the smaller bias is the upper left corner of the larger.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..masks import Mask, Padding, conjuncts
from .kernels import Tiles, dead_rows
from .lattice import Lattice, Rows

MOST_BYTES = 64 * 2**20
# A bias is made for sizes up to the next multiple of this, so that lengths which grow do not make one each.
_GROWS_BY = 256


@dataclass(frozen=True)
class Bias:
    """What the masks of a batch say of its tiles; they are summed. heads: one bias for each, the query head that it speaks for.

    open: this many leading keys are seen by every query, whatever the masks say. shared: the first tile speaks for all.
    """

    masks: tuple[Mask, ...]
    heads: tuple[int, ...]
    queries: Rows
    keys: Rows
    open: int = 0
    shared: bool = False

    @property
    def key_only(self) -> bool:
        """Whether the masks look at keys alone: then one row of bias serves a whole tile."""
        return len(self.masks) == 1 and all(isinstance(part, Padding) for part in conjuncts(self.masks[0]))

    @property
    def lasting_entries(self) -> int:
        """Entries of a bias that is the same in every call and for every tile; 0 where there is none."""
        lasting = self.masks and self.shared and not any(mask.per_call for mask in self.masks)
        return len(self.heads) * self.queries.size * self.keys.size if lasting else 0

    def made(self, b: Tensor, data: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """(tiles, heads or 1, 1, T or 1, S) for the batch indices b (B, 1, 1, 1)."""
        q = indices(self.queries, b.device, self.shared)[:, None, :, None]
        kv = indices(self.keys, b.device, self.shared)[:, None, None, self.open :]
        if self.key_only:
            q = q[:, :, :1]
        h = torch.tensor(self.heads, device=b.device)[:, None, None, None]
        if len(self.masks) == 1:
            seen = self.masks[0].allows(b, h, q, kv, data)
            bias = torch.zeros(seen.shape, dtype=dtype, device=b.device).masked_fill_(~seen, -math.inf)
        else:
            # log c does not survive bfloat16; the kernels take a float32 bias beside lower precisions.
            counts = sum(
                mask.allows(b, h, q, kv, data).to(torch.float64 if dtype == torch.float64 else torch.float32)
                for mask in self.masks
            )
            bias = counts.log()
        return torch.nn.functional.pad(bias, (self.open, 0)) if self.open else bias

    def beginning(self) -> Bias:
        """The same of the first tile alone, and of rows that go on for ever where they are one run: those of other sizes too."""
        bounded = any(mask.is_bounded for mask in self.masks)
        queries, keys = (rows if bounded else _endless(rows) for rows in (_first(self.queries), _first(self.keys)))
        return replace(self, queries=queries, keys=keys)

    def grown(self, rows: int, columns: int) -> Bias:
        """Of a `beginning`, the tile of at least so many queries and keys."""
        return replace(self, queries=_ended(self.queries, rows), keys=_ended(self.keys, columns))


def batch_indices(unit: slice, device: torch.device) -> Tensor:
    """(B, 1, 1, 1)"""
    return torch.arange(unit.start, unit.stop, device=device)[:, None, None, None]


def indices(rows: Rows, device: torch.device, shared: bool) -> Tensor:
    """Positions (tiles, T), of the first tile alone where it speaks for all."""
    positions = rows.positions()
    # Half the bytes where no product of positions, as masks form them, can overflow.
    dtype = torch.int32 if rows.last < 2**15 else torch.int64
    return torch.from_numpy(positions[:1] if shared else positions).to(device, dtype)


def _first(rows: Rows) -> Lattice:
    assert isinstance(rows, Lattice)
    return replace(rows, tiles=((1, 0),))


def _endless(rows: Lattice) -> Lattice:
    return replace(rows, rows=((0, rows.rows[0][1]),)) if len(rows.rows) == 1 else rows


def _ended(rows: Rows, size: int) -> Lattice:
    assert isinstance(rows, Lattice)
    return replace(rows, rows=((-(-size // _GROWS_BY) * _GROWS_BY, rows.rows[0][1]),)) if not rows.size else rows


@dataclass
class _Entry:
    bias: Tensor
    tiles: dict[tuple[int, int, bool], Tiles] = field(default_factory=dict)


class Kept:
    """Lasting biases, by what they say, as tiles of scale 1 without a score_mod."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.held_bytes = most_bytes, 0
        self._entries: OrderedDict[tuple[Bias, torch.device, torch.dtype], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def tiles(self, beginning: Bias, rows: int, columns: int, causal: bool, device: torch.device, dtype: torch.dtype) -> Tiles:
        """Tiles of so many queries and keys."""
        key = beginning, device, dtype
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.bias.shape[-2] < rows or entry.bias.shape[-1] < columns:
                entry = self._make(key, rows, columns, entry)
            self._entries.move_to_end(key)
            if (tiles := entry.tiles.get((rows, columns, causal))) is None:
                tiles = Tiles(1.0, entry.bias[..., :rows, :columns], causal)
                tiles = entry.tiles[rows, columns, causal] = replace(tiles, dead=dead_rows(tiles, rows))
        return tiles

    def clear(self) -> None:
        """Forget all biases."""
        with self._lock:
            self._entries.clear()
            self.held_bytes = 0

    def _make(self, key: tuple[Bias, torch.device, torch.dtype], rows: int, columns: int, smaller: _Entry | None) -> _Entry:
        beginning, device, dtype = key
        if smaller is not None:
            rows, columns = max(rows, smaller.bias.shape[-2]), max(columns, smaller.bias.shape[-1])
            self.held_bytes -= self._entries.pop(key).bias.nbytes
        bias = beginning.grown(rows, columns).made(batch_indices(slice(0, 1), device), {}, dtype)
        self._entries[key] = entry = _Entry(bias)
        self.held_bytes += bias.nbytes
        while self.held_bytes > self.most_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self.held_bytes -= oldest.bias.nbytes
        return entry


KEPT = Kept()
