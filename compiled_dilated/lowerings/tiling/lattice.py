"""Tokens of tiles: strided views, or tables of small tiles.

Lattice(start=3, count=2, stride=8, size=4, step=1)
tile 0: 3 4 5 6    tile 1: 11 12 13 14

Table of small tiles [[0, 2], [1, 2]], 2 tokens wide
tile 0: 0 1 4 5    tile 1: 2 3 4 5

A tensor x (B, H, N, ...) is read as (B * tiles, H, rows, ...); `shift` is the position of its first
token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...partials import merge_
from ...regions import IntArray


@dataclass(frozen=True)
class Lattice:
    """Tiles at equal distances, of tokens at equal distances.

    `count` tiles, `stride` apart, of `size` tokens, `step` apart. No token is in two tiles.
    """

    start: int
    count: int
    stride: int
    size: int
    step: int

    def positions(self) -> IntArray:
        """Positions of the tokens, (tiles, rows)."""
        starts = self.start + np.arange(self.count)[:, None] * self.stride
        return starts + np.arange(self.size) * self.step

    def select(self, start: int, stop: int) -> Lattice:
        """Tiles [start, stop)."""
        first, count = self.start + start * self.stride, min(stop, self.count) - start
        return replace(self, start=first, count=count)

    def _view(self, x: Tensor, shift: int) -> Tensor:
        """The tiles of x as a view (B, tiles, H, rows, ...)."""
        batch, heads, token, *inner = x.stride()
        shape = (x.shape[0], self.count, x.shape[1], self.size, *x.shape[3:])
        strides = (batch, self.stride * token, heads, self.step * token, *inner)
        return x.as_strided(shape, strides, x.storage_offset() + (self.start - shift) * token)

    def read(self, x: Tensor, shift: int = 0) -> Tensor:
        """Tiles of x (B, H, N, ...).

        A view for one batch entry or one tile, else a copy.
        """
        return self._view(x, shift).flatten(0, 1)

    def merge(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, shift: int = 0
    ) -> None:
        """Merge a part in the layout of `read` into out and lse.

        out: (B, H, N, Dv). lse: (B, H, N).
        """
        tiles = (out.shape[0], self.count)
        merge_(
            self._view(out, shift),
            self._view(lse, shift),
            part_out.unflatten(0, tiles),
            part_lse.unflatten(0, tiles),
        )

    def add(self, total: Tensor, part: Tensor, shift: int = 0) -> None:
        """Add a part to total (B, H, N, ...)."""
        self._view(total, shift).add_(part.unflatten(0, (total.shape[0], self.count)))


@dataclass(frozen=True, eq=False)
class Table:
    """Tiles made of small tiles of `width` places of an order.

    small: numbers of the small tiles, (tiles, small tiles per tile).
    width: places of a small tile.
    size: tokens per tile; fewer than its places if the last small tile is short.
    permutation: position at each place; None for the identity.
    offset: added to positions.
    """

    small: npt.NDArray[np.int32]
    width: int
    size: int
    permutation: IntArray | None = None
    offset: int = 0

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.small)

    def positions(self) -> IntArray:
        """Positions of the tokens, (tiles, rows)."""
        places = self.small[:, :, None].astype(np.int64) * self.width + np.arange(self.width)
        places = places.reshape(self.count, -1)[:, : self.size]
        if self.permutation is None:
            return places + self.offset
        positions: IntArray = self.permutation[places] + self.offset
        return positions

    def select(self, start: int, stop: int) -> Table:
        """Tiles [start, stop)."""
        return replace(self, small=self.small[start:stop])

    def _index(self, x: Tensor, shift: int) -> Tensor:
        """Indices of all tokens into x, (tiles * rows,)."""
        return torch.from_numpy(self.positions().reshape(-1) - shift).to(x.device)

    def _flat(self, part: Tensor, batch: int) -> Tensor:
        """A part as (B, H, tiles * rows, ...)."""
        flat: Tensor = part.unflatten(0, (batch, self.count)).transpose(1, 2).flatten(2, 3)
        return flat

    def read(self, x: Tensor, shift: int = 0) -> Tensor:
        """Tiles of x (B, H, N, ...), as a copy."""
        tokens = x.index_select(2, self._index(x, shift))
        tiles: Tensor = tokens.unflatten(2, (self.count, self.size))
        return tiles.transpose(1, 2).flatten(0, 1)

    def merge(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, shift: int = 0
    ) -> None:
        """Merge a part in the layout of `read` into out and lse.

        No position may be in two tiles. out: (B, H, N, Dv). lse: (B, H, N).
        """
        index, batch = self._index(out, shift), out.shape[0]
        joint_out, joint_lse = out.index_select(2, index), lse.index_select(2, index)
        merge_(joint_out, joint_lse, self._flat(part_out, batch), self._flat(part_lse, batch))
        out.index_copy_(2, index, joint_out)
        lse.index_copy_(2, index, joint_lse)

    def add(self, total: Tensor, part: Tensor, shift: int = 0) -> None:
        """Add a part to total (B, H, N, ...).

        Positions may be in several tiles.
        """
        flat = self._flat(part, total.shape[0]).to(total.dtype)
        total.index_add_(2, self._index(total, shift), flat)


Rows = Lattice | Table
