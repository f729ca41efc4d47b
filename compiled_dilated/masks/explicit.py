"""Masks as lists of tiles: the user's, or random ones of BigBird.

BigBird: arXiv 2007.14062.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import arguments
from ..regions import EMPTY, FULL, PARTIAL, IntArray, Regions, Verdicts
from .core import MOST_RANGES, Data, Mask, Positions
from .lookup import as_tensor, rank, runs
from .ranges import NOTHING, clip
from .summaries import MOST_NUMBERS, brief

# Regions of more rows of tiles are classified by all tiles of their rows, without a loop.
_MOST_ROWS = 16
# Random tiles are listed singly, about a microsecond per tile.
_MOST_RANDOM = 2**20
# Positions of the native kernel are below.
_MOST_POSITIONS = 2**30


@dataclass(frozen=True, repr=False)
class Tiles(Mask):
    """The tile (q // block, kv // block) is listed.

    block: tokens per side of a tile.
    columns: tiles per row, to number tiles by row * columns + column.
    keys: the sorted numbers of the listed tiles.
    table: `keys` as a tensor, for compiled kernels.
    code: the expression that creates the mask, if that is shorter than the list.
    """

    block: int
    columns: int
    keys: tuple[int, ...]
    table: Any = field(default=None, compare=False)
    code: str = field(default="", compare=False)

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        column = kv // self.block
        key = q // self.block * self.columns + column
        is_listed = rank(self.keys, key, self.table) > rank(self.keys, key - 1, self.table)
        return is_listed & (column < self.columns)

    def on(self, device: Any) -> Mask:
        return replace(self, table=as_tensor(self.keys, device))

    @cached_property
    def _listed(self) -> IntArray:
        return np.asarray(self.keys, dtype=np.int64)

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        first_row, last_row = q.first // self.block, q.last // self.block
        first, last = kv.first // self.block, np.minimum(kv.last // self.block, self.columns - 1)
        rows = last_row - first_row + 1
        # An upper bound on the listed tiles of a region: those of its rows, in all columns.
        listed = np.searchsorted(self._listed, (last_row + 1) * self.columns)
        listed -= np.searchsorted(self._listed, first_row * self.columns)
        # The exact number for regions of few rows, one row of all these regions at a time.
        few = np.flatnonzero((listed > 0) & (rows <= _MOST_ROWS) & (first <= last))
        exact = np.zeros(len(few), dtype=np.int64)
        for number in range(int(rows[few].max(initial=0))):
            present = number < rows[few]
            key = (first_row[few][present] + number) * self.columns
            exact[present] += np.searchsorted(self._listed, key + last[few][present], side="right")
            exact[present] -= np.searchsorted(self._listed, key + first[few][present])
        listed[few] = exact
        # Full: every tile is listed, and no key lies past the last column.
        full = np.zeros(len(q), dtype=np.bool_)
        full[few] = exact == rows[few] * (last - first + 1)[few]
        full[few] &= kv.last[few] // self.block < self.columns
        return np.where((listed == 0) | (first > last), EMPTY, np.where(full, FULL, PARTIAL))

    @property
    def period(self) -> int | None:
        return None

    def keys_of(self, q: int, kv_len: int) -> tuple[range, ...] | None:
        row = q // self.block
        keys = runs(self._tiles(range(row, row + 1), range(self.columns))[1], self.block)
        if len(keys) > MOST_RANGES:
            return None
        return tuple(
            range(span.start, min(span.stop, kv_len)) for span in keys if span.start < kv_len
        )

    def shrink(self, q: range, kv: range) -> tuple[range, range]:
        rows, columns = self._tiles(self._touched(q), self._touched(kv))
        if not len(rows):
            return NOTHING
        q, kv = self._clipped(q, rows), self._clipped(kv, columns)
        if not q or not kv:
            return NOTHING
        return q, kv

    def _clipped(self, side: range, tiles: IntArray) -> range:
        """The part of a range from the first to the last tile."""
        return clip(side, int(tiles.min()) * self.block, (int(tiles.max()) + 1) * self.block)

    def pairs(self, q: range, kv: range) -> int | None:
        rows, columns = self._tiles(self._touched(q), self._touched(kv))
        queries, keys = self._overlaps(q, rows), self._overlaps(kv, columns)
        # Python integers where the product may exceed 64 bits.
        if (q.stop - q.start) * (kv.stop - kv.start) > np.iinfo(np.int64).max:
            queries, keys = queries.astype(object), keys.astype(object)
        return int((queries * keys).sum())

    def _touched(self, side: range) -> range:
        """Tiles that a range of positions touches."""
        if side:
            return range(side[0] // self.block, side[-1] // self.block + 1)
        return range(0)

    def _tiles(self, rows: range, columns: range) -> tuple[IntArray, IntArray]:
        """Rows and columns of the listed tiles among some rows and columns."""
        ends = rows.start * self.columns, rows.stop * self.columns
        start, stop = np.searchsorted(self._listed, ends)
        row, column = np.divmod(self._listed[start:stop], self.columns)
        inside = (column >= columns.start) & (column < columns.stop)
        return row[inside], column[inside]

    def _overlaps(self, side: range, tiles: IntArray) -> Any:
        """Number of positions of a contiguous range in each tile."""
        stops = np.minimum((tiles + 1) * self.block, side.stop)
        return stops - np.maximum(tiles * self.block, side.start)

    def __repr__(self) -> str:
        if self.code:
            return self.code
        pairs = ", ".join(f"({key // self.columns}, {key % self.columns})" for key in self.keys)
        return f"tiles([{pairs}]{self._options})"

    def __str__(self) -> str:
        if self.code or not isinstance(self.keys, tuple) or len(self.keys) <= MOST_NUMBERS:
            return repr(self)
        return f"tiles({brief(self.keys, 'tiles', '')}{self._options})"

    @property
    def _options(self) -> str:
        if self._tight:
            return f", block={self.block}"
        return f", block={self.block}, columns={self.columns}"

    @property
    def _tight(self) -> bool:
        """Whether the last column has a listed tile, as by default."""
        return self.columns == max((key % self.columns for key in self.keys), default=0) + 1


def tiles(pairs: Iterable[tuple[int, int]], block: int = 128, columns: int | None = None) -> Mask:
    """Exactly the listed tiles, all pairs of a tile visible.

    pairs: (query tile, key tile) indices.
    block: tokens per side of a tile.
    columns: key tiles per row; keys past them are never visible. Default: as many as listed.
    """
    block = arguments.integer("block", block, 1)
    if isinstance(pairs, (str, bytes)) or not arguments.is_iterable(pairs):
        raise TypeError(
            f"pairs must be (query tile, key tile) pairs; got {type(pairs).__name__}. "
            f"Write tiles([(0, 0), (1, 0)], block={block})"
        )
    # 1. The listed tiles.
    listed = [arguments.integers(f"pairs[{i}]", pair, 0) for i, pair in enumerate(pairs)]
    if any(len(pair) != 2 for pair in listed):
        raise ValueError(
            "pairs: every tile must be a (query tile, key tile) pair; "
            "got one with another number of entries"
        )
    # 2. The table of tiles: its numbers and positions must fit into 64 bits.
    tight = max((column for _, column in listed), default=0) + 1
    width = tight
    if columns is not None:
        width = arguments.integer("columns", columns, tight)
    rows = max((row for row, _ in listed), default=0) + 1
    if rows * width > arguments.MOST or max(rows, width) * block > arguments.MOST:
        raise ValueError(
            "pairs must name at most 2**60 tiles, below position 2**60; "
            f"got {rows} x {width} tiles of {block} tokens"
        )
    # Of rows past the listed ones too: queries of any position are looked up.
    most = arguments.MOST // (_MOST_POSITIONS // block + 1)
    if width > most:
        raise ValueError(
            f"columns must be at most {most:,} for tiles of {block} tokens; got {width:,}. "
            "Leave it out for as many columns as pairs names"
        )
    return Tiles(block, width, tuple(sorted({row * width + column for row, column in listed})))


def random_blocks(block: int, count: int, tokens: int, seed: int = 0) -> Mask:
    """Every block of queries sees `count` random blocks of keys.

    The random part of BigBird (arXiv 2007.14062). The draw is for `tokens` tokens. In a shorter
    sequence, blocks past its end are missing; queries past the last block see nothing. The query's
    own block is drawn like any other. Blocks are the same on every platform and version: SplitMix64
    of the seed, the row and the draw.

    block: tokens per block.
    count: distinct key blocks per query block.

    >>> random_blocks(64, 2, tokens=320, seed=3)
    random_blocks(64, 2, tokens=320, seed=3)
    """
    block, count = arguments.integer("block", block, 1), arguments.integer("count", count, 0)
    tokens, seed = arguments.integer("tokens", tokens, 1), arguments.integer("seed", seed, 0)
    blocks = -(-tokens // block)
    if count > blocks:
        raise ValueError(
            f"count must be at most the {blocks} blocks of {block} tokens "
            f"that {tokens} tokens have; got {count}. Take fewer blocks, or smaller ones"
        )
    if blocks * count > _MOST_RANDOM:
        raise ValueError(
            f"random_blocks lists at most {_MOST_RANDOM:,} tiles; got {blocks:,} blocks "
            f"of {block} tokens that see {count} each. Take larger blocks"
        )
    keys: list[int] = []
    for row, draws in enumerate(_draws(blocks, count, seed)):
        for column in sorted(_sample(draws, blocks)):
            keys.append(row * blocks + column)
    code = f"random_blocks({block}, {count}, tokens={tokens}, seed={seed})"
    return Tiles(block, blocks, tuple(keys), code=code)


def _draws(blocks: int, count: int, seed: int) -> list[list[int]]:
    """Random numbers per row, (blocks, count).

    Draw i is below blocks - count + i + 1.
    """
    row, draw = np.arange(blocks, dtype=np.uint64)[:, None], np.arange(count, dtype=np.uint64)
    random = splitmix64(splitmix64(splitmix64(np.full((1, 1), seed, dtype=np.uint64)) ^ row) ^ draw)
    draws: list[list[int]] = (random % (draw + np.uint64(blocks - count + 1))).tolist()
    return draws


def _sample(draws: list[int], blocks: int) -> set[int]:
    """Distinct numbers below `blocks`, one per draw.

    R. Floyd's sampling, Communications of the ACM 30(9), 1987.
    """
    sample: set[int] = set()
    for last, number in zip(range(blocks - len(draws), blocks), draws, strict=True):
        # `last` is larger than all earlier draws, so it cannot be in the sample.
        if number in sample:
            number = last
        sample.add(number)
    return sample


def splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Next number of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014)."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ z >> np.uint64(31), dtype=np.uint64)
