"""Masks as explicit lists of tiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import arguments
from ..regions import EMPTY, FULL, PARTIAL, Regions, Verdicts
from .core import Data, Mask, Positions
from .lookup import as_tensor, rank


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
