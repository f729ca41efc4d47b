"""Which tokens the tiles of a batch hold: a lattice, read and written through views, or a table of positions.

start 3, tiles ((2, 8),), rows ((4, 1),)            start 0, tiles ((2, 2), (2, 2)) of a grid of 4 columns, rows ((2, 4), (2, 1))
tile 0: 3 4 5 6    tile 1: 11 12 13 14              tile 0: 0 1 4 5    tile 1: 2 3 6 7 ...
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..regions import IntArray
from .workspace import Copy, fresh

Axes = tuple[tuple[int, int], ...]  # (count, stride) in tokens, slowest first


@dataclass(frozen=True)
class Lattice:
    """Tiles of equal shape at regular places: position = start + sum of tile index * stride + sum of row index * stride."""

    start: int
    tiles: Axes
    rows: Axes

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(count for count, _ in self.tiles)

    @property
    def size(self) -> int:
        """Tokens per tile."""
        return math.prod(count for count, _ in self.rows)

    @property
    def last(self) -> int:
        """The greatest position."""
        return self.start + sum((count - 1) * stride for count, stride in self.tiles + self.rows)

    @property
    def copies(self) -> bool:
        """Whether a kernel needs the tiles copied: their rows, or their tiles, are not one stride apart."""
        return _stride_of(self.rows) is None or _stride_of(self.tiles) is None

    @property
    def strips(self) -> bool:
        """Whether tiles that are copied can share the copy along their first axis."""
        return len(self.tiles) == len(self.rows) and self.tiles[0][1] % self.rows[0][1] == 0

    @property
    def repeats(self) -> tuple[int, ...]:
        """Per tile axis: tiles this many apart share no token (1: no two tiles do), so that they can be added to in place."""
        return tuple(min(count, self._overlap(axis)) for axis, (count, _) in enumerate(self.tiles))

    def _overlap(self, axis: int) -> int:
        stride = self.tiles[axis][1]
        if self.tiles[axis][0] == 1:
            return 1
        # Rows along the axis that this tile axis moves on: the widest row axis that the tile stride is made of.
        reach = max(((count - 1) * step + 1 for count, step in self.rows if stride % step == 0 and stride >= step), default=1)
        widest = max((count * step for count, step in self.rows if stride % step == 0 and stride >= step), default=1)
        return -(-widest // stride) if reach > stride else 1

    def positions(self) -> IntArray:
        """(tiles, rows) positions."""
        out = np.array([self.start], dtype=np.int64)
        for count, stride in self.tiles + self.rows:
            out = (out[:, None] + np.arange(count) * stride).reshape(-1)
        return out.reshape(self.count, self.size)

    def view(self, x: Tensor, shift: int = 0) -> Tensor:
        """x (B, H, N, ...) as (B, *tiles, H, *rows, ...): a view. `shift` tokens stand before the first of x."""
        batch, heads, tokens = x.stride()[:3]
        tiles, rows = [count for count, _ in self.tiles], [count for count, _ in self.rows]
        shape = [x.shape[0], *tiles, x.shape[1], *rows, *x.shape[3:]]
        steps = [batch, *(stride * tokens for _, stride in self.tiles), heads, *(stride * tokens for _, stride in self.rows)]
        return x.as_strided(shape, [*steps, *x.stride()[3:]], x.storage_offset() + (self.start - shift) * tokens)

    def shaped(self, part: Tensor, heads: int) -> Tensor:
        """A kernel's part, as `read` lays it out, in the shape of `view`."""
        tiles, rows = [count for count, _ in self.tiles], [count for count, _ in self.rows]
        return part.reshape([-1, *tiles, heads, *rows, *part.shape[3:]])

    def read(self, x: Tensor, shift: int = 0, copy: Copy = fresh, converts: bool = False) -> Tensor:
        """x (B, H, N, ...) as the kernel's (B * tiles, H, rows, ...).

        A view where `copies` is False and B or the tiles are 1, unless the copy `converts` to another dtype.
        """
        view, shape = self.view(x, shift), (x.shape[0] * self.count, x.shape[1], self.size, *x.shape[3:])
        if self.copies or converts or (x.shape[0] > 1 and self.count > 1):
            view = copy(view)
        return view.reshape(shape)

    def read_strips(self, x: Tensor, shift: int = 0, copy: Copy = fresh) -> Tensor:
        """x (1, H, N, D) as the kernel's (tiles along the first axis, other tiles * H, rows, D).

        Tiles that follow each other along the first axis share most of their rows: they are copied once, as one strip, and the
        tiles are views of it.

            rows of a grid    strip 0   strip 1         tile 0 of a strip is its rows 0 .. 3, tile 1 its rows 2 .. 5
              0 1 2 3 4 5     0 1 2 3   2 3 4 5
        """
        (count, stride), (size, step) = self.tiles[0], self.rows[0]
        long = (count - 1) * (stride // step) + size
        view = replace(self, tiles=self.tiles[1:], rows=((long, step), *self.rows[1:])).view(x, shift)
        strips = copy(view)
        inner, width = self.size // size, x.shape[3]
        shape = (count, strips.numel() // (long * inner * width), self.size, width)
        strides = (stride // step * inner * width, long * inner * width, width, 1)
        return strips.as_strided(shape, strides, strips.storage_offset())

    def add(self, total: Tensor, part: Tensor, shift: int = 0) -> None:
        """Add a kernel's part to total (B, H, N, D), tiles that overlap one after the other."""
        part = self.shaped(part, total.shape[1])
        view = self.view(total, shift)
        for phase in np.ndindex(*self.repeats):
            index = (slice(None), *(slice(at, None, step) for at, step in zip(phase, self.repeats, strict=True)))
            view[index].add_(part[index])

    def select(self, axis: int, start: int, stop: int) -> Lattice:
        """Tiles [start, stop) along one tile axis."""
        _, stride = self.tiles[axis]
        tiles = (*self.tiles[:axis], (stop - start, stride), *self.tiles[axis + 1 :])
        return replace(self, start=self.start + start * stride, tiles=tiles)


def _stride_of(axes: Axes) -> int | None:
    """The one stride that walks all axes, slowest first, without a jump; None where there is none."""
    moving = [(count, stride) for count, stride in axes if count > 1]
    for (_, outer), (count, inner) in itertools.pairwise(moving):
        if outer != count * inner:
            return None
    return moving[-1][1] if moving else 1


@dataclass(frozen=True, eq=False)
class Table:
    """Tiles of equal size at any places: each is made of small tiles of `width` places of an order, their numbers in `small`.

    small: (tiles, small tiles per tile). size: tokens per tile; below small tiles * width where the last is the order's short
    last. permutation: the position at each place, None for places = positions; `offset` is added to positions.
    """

    small: npt.NDArray[np.int32]
    width: int
    size: int
    permutation: IntArray | None = None
    offset: int = 0

    @property
    def count(self) -> int:
        return len(self.small)

    @property
    def start(self) -> int:
        return int(self.positions().min())

    @property
    def last(self) -> int:
        return int(self.positions().max())

    @property
    def copies(self) -> bool:
        return True

    def positions(self) -> IntArray:
        """(tiles, rows) positions."""
        places = (self.small[:, :, None].astype(np.int64) * self.width + np.arange(self.width)).reshape(self.count, -1)[
            :, : self.size
        ]
        return (places if self.permutation is None else self.permutation[places]) + self.offset

    def _index(self, x: Tensor, shift: int) -> Tensor:
        return torch.from_numpy(self.positions().reshape(-1) - shift).to(x.device, torch.int64)

    def read(self, x: Tensor, shift: int = 0, copy: Copy | None = None, converts: bool = False) -> Tensor:
        """x (1, H, N, ...) as the kernel's (tiles, H, rows, ...); gathered, and copied once more where that `converts`."""
        rows = x[0].index_select(1, self._index(x, shift))
        rows = copy(rows) if copy is not None and converts else rows
        return rows.view(x.shape[1], self.count, self.size, *x.shape[3:]).transpose(0, 1)

    def write(self, x: Tensor, part: Tensor, shift: int = 0) -> None:
        """Put a kernel's part back into x (1, H, N, ...); no position may appear twice."""
        x[0].index_copy_(1, self._index(x, shift), part.transpose(0, 1).flatten(1, 2))

    def add(self, total: Tensor, part: Tensor, shift: int = 0) -> None:
        """Add a kernel's part to total (1, H, N, ...)."""
        total[0].index_add_(1, self._index(total, shift), part.transpose(0, 1).flatten(1, 2).to(total.dtype))

    def select(self, axis: int, start: int, stop: int) -> Table:
        assert axis == 0
        return replace(self, small=self.small[start:stop])


Rows = Lattice | Table


def pieces(axes: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Cut a block of tile counts into boxes of at most `most` tiles (at least one), slowest axis first, in order."""
    if not axes:
        yield ()
        return
    inner = math.prod(axes[1:])
    if inner <= most:
        step = max(1, most // max(inner, 1))
        for start in range(0, axes[0], step):
            yield ((start, min(start + step, axes[0])), *((0, count) for count in axes[1:]))
        return
    for start in range(axes[0]):
        for rest in pieces(axes[1:], most):
            yield ((start, start + 1), *rest)
