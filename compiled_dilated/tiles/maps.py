"""The tile map of a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .. import arguments
from ..masks import Mask
from ..orders import Identity, Order, identity
from ..regions import Regions
from .lists import TileLists
from .refinement import covering


@dataclass(frozen=True, eq=False, repr=False)
class TileMap(TileLists):
    """The visible tiles of a mask, q_tile queries by kv_tile keys.

    The last tile of a side may be short. Queries are places [q_start, q_start + q_len) of the
    order, at positions q_offset + place (identity). Keys are places [kv_start, kv_start + kv_len).
    Tiles that are not listed have no allowed pair; FULL tiles have only allowed pairs.
    """

    q_len: int
    kv_len: int
    q_tile: int
    kv_tile: int
    order: Order
    q_offset: int
    q_start: int = 0
    kv_start: int = 0

    @property
    def queries(self) -> range:
        """Places of the map's queries."""
        return range(self.q_start, self.q_start + self.q_len)

    @property
    def keys(self) -> range:
        """Places of the map's keys."""
        return range(self.kv_start, self.kv_start + self.kv_len)

    @staticmethod
    def build(
        mask: Mask,
        q_len: int,
        kv_len: int,
        *,
        q_tile: int = 128,
        kv_tile: int = 128,
        order: Order = identity(),
        q_offset: int = 0,
    ) -> TileMap:
        """The tiles of a mask.

        q_len, kv_len: in tokens.
        q_tile, kv_tile: tokens per tile.
        order: permutes queries and keys; other than the identity it requires q_len == kv_len and
            q_offset 0.
        q_offset: position of the first query; negative for queries before key 0.
        """
        _check(mask, q_len, kv_len, q_tile, kv_tile, order, q_offset)
        rows, columns = -(-q_len // q_tile), -(-kv_len // kv_tile)

        def regions_of(side: int) -> tuple[Regions, Regions]:
            """Positions of super tiles of side x side tiles."""
            q, kv = _regions(order, q_len, q_tile * side), _regions(order, kv_len, kv_tile * side)
            return replace(q, base=q.base + q_offset), kv

        lists = covering(mask, rows, columns, regions_of)
        return TileMap(
            **vars(lists),
            q_len=q_len,
            kv_len=kv_len,
            q_tile=q_tile,
            kv_tile=kv_tile,
            order=order,
            q_offset=q_offset,
        )

    def transpose(self) -> TileLists:
        """Query tiles per key tile."""
        return TileLists.of(self.columns, self.rows, self.indices, self.row_of, self.full)

    def restrict(self, queries: range, keys: range) -> TileMap:
        """The map of consecutive query tiles and consecutive key tiles.

        queries, keys: numbers of the tiles in this map.
        """
        first, last = self.offsets[queries.start], self.offsets[queries.stop]
        indices, full = self.indices[first:last], self.full[first:last]
        inside = (indices >= keys.start) & (indices < keys.stop)
        # Offsets count the entries before each row that are inside.
        row_starts = self.offsets[queries.start : queries.stop + 1] - first
        offsets = np.concatenate([[0], np.cumsum(inside)])[row_starts]
        q_start, kv_start = queries.start * self.q_tile, keys.start * self.kv_tile
        return TileMap(
            offsets=offsets,
            indices=indices[inside] - np.int32(keys.start),
            full=full[inside],
            columns=len(keys),
            q_len=max(0, min(queries.stop * self.q_tile, self.q_len) - q_start),
            kv_len=max(0, min(keys.stop * self.kv_tile, self.kv_len) - kv_start),
            q_tile=self.q_tile,
            kv_tile=self.kv_tile,
            order=self.order,
            q_offset=self.q_offset,
            q_start=self.q_start + q_start,
            kv_start=self.kv_start + kv_start,
        )

    def coarsen(self, factor: int | tuple[int, int]) -> TileMap:
        """The map with tiles `factor` times as large.

        A coarse tile is FULL if all tiles within it are FULL.

        factor: one number, or (queries, keys).
        """
        if isinstance(factor, int):
            factor = factor, factor
        q_factor, kv_factor = factor
        rows, columns = -(-self.rows // q_factor), -(-self.columns // kv_factor)
        # The number of the coarse tile of each listed tile.
        keys = self.row_of.astype(np.int64) // q_factor * columns + self.indices // kv_factor
        coarse, group = np.unique(keys, return_inverse=True)
        full = np.bincount(group, weights=self.full, minlength=len(coarse))
        row, column = coarse // max(columns, 1), coarse % max(columns, 1)
        # A coarse tile is FULL if all of its tiles are; at the border it has fewer.
        height = np.minimum(q_factor, self.rows - row * q_factor)
        width = np.minimum(kv_factor, self.columns - column * kv_factor)
        lists = TileLists.of(rows, columns, row, column, full == height * width)
        q_tile, kv_tile = self.q_tile * q_factor, self.kv_tile * kv_factor
        return replace(self, **vars(lists), q_tile=q_tile, kv_tile=kv_tile)

    def __repr__(self) -> str:
        return (
            f"TileMap({self.rows} x {self.columns} tiles of {self.q_tile} x {self.kv_tile}, "
            f"{len(self.indices):,} seen, {int(self.full.sum()):,} full, "
            f"queries {self.queries}, keys {self.keys}, {self.order!r})"
        )


def _regions(order: Order, n: int, tile: int) -> Regions:
    """Positions of each tile of n places."""
    starts = np.arange(0, n, tile)
    return order.regions(starts, np.minimum(starts + tile, n), n)


def _check(
    mask: Mask, q_len: int, kv_len: int, q_tile: int, kv_tile: int, order: Order, q_offset: int
) -> None:
    """Raise unless the arguments of a map fit together."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a mask; got {arguments.kind_and_text(mask)}. "
            "Use one of compiled_dilated.masks"
        )
    if not isinstance(order, Order):
        raise TypeError(
            f"order must be an order; got {arguments.kind_and_text(order)}. "
            "Use one of compiled_dilated.orders"
        )
    # Lengths may be 0, tiles may not.
    for name, length in (("q_len", q_len), ("kv_len", kv_len)):
        arguments.integer(name, length, 0)
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        arguments.integer(name, tile, 1)
    arguments.integer("q_offset", q_offset)
    if not isinstance(order, Identity):
        if q_len != kv_len or q_offset:
            raise ValueError(
                f"{order!r} permutes queries and keys alike, so it needs q_len == kv_len and "
                f"q_offset 0; got q_len {q_len}, kv_len {kv_len}, q_offset {q_offset}. "
                "Use orders.identity()"
            )
        order.check(q_len)
    mask.check(range(q_offset, q_offset + q_len), kv_len)
