"""One BlockMask for each rectangle of tiles, built without pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..masks import Mask
from ..orders import Order
from ..regions import IntArray
from ..tiles import Flags, TileLists, TileMap, split


@dataclass(frozen=True, eq=False)
class BlockMaskPart:
    """A BlockMask of the slices q[:, :, queries] and k[:, :, keys].

    Slices are in the order's order; parts are merged by their lse.
    """

    block_mask: BlockMask
    queries: range
    keys: range


def build(
    mask: Mask,
    q_len: int,
    kv_len: int,
    device: torch.device | str,
    heads: int | None,
    tile: int,
    order: Order,
    q_offset: int,
    data: Mapping[str, Tensor] | None,
) -> tuple[BlockMaskPart, ...]:
    """The parts, for checked arguments; data may contain operands of traced functions."""
    # 1. One map of tiles for each different mask of a head.
    per_head = [mask]
    if heads is not None:
        per_head = [mask.at_head(head, heads) for head in range(heads)]
    maps: dict[Mask, TileMap] = {}
    for head_mask in dict.fromkeys(per_head):
        maps[head_mask] = TileMap.build(
            head_mask, q_len, kv_len, q_tile=tile, kv_tile=tile, order=order, q_offset=q_offset
        )
    # 2. Lists without a head dimension if all heads are equal.
    if len(maps) == 1:
        mask, per_head = per_head[0], per_head[:1]
    elif heads is not None:
        mask = mask.for_heads(heads)
    # 3. Rectangles that suit the union of the maps, so that all heads have the same parts.
    position = _positions(order, q_len, device)
    mask = mask.on(device)
    head_maps = [maps[head_mask] for head_mask in per_head]
    parts = split(_union(list(maps.values())))
    return tuple(_part(mask, head_maps, part, position, device, data) for part in parts)


def batch_size(mask: Mask, data: Mapping[str, Tensor] | None) -> int:
    """Batch size of the data; 1 without data."""
    batch = 1
    for name, x in (data or {}).items():
        if name in mask.names and isinstance(x, Tensor) and x.dim() == 2:
            batch = max(batch, x.shape[0])
    return batch


def _positions(order: Order, n: int, device: torch.device | str) -> Tensor | None:
    """Position of each place, int32 (n,); None for the identity."""
    permutation = order.permutation(n)
    if permutation is None:
        return None
    return torch.from_numpy(permutation.astype(np.int32)).to(device)


def _union(maps: list[TileMap]) -> TileMap:
    """Tiles that any of the maps lists."""
    if len(maps) == 1:
        return maps[0]
    first = maps[0]
    # Tiles as numbers, row by row.
    numbers = []
    for tile_map in maps:
        row = tile_map.row_of.astype(np.int64)
        numbers.append(row * tile_map.columns + tile_map.indices)
    keys = np.unique(np.concatenate(numbers))
    row, column = keys // first.columns, keys % first.columns
    full = np.zeros(len(keys), dtype=np.bool_)
    lists = TileLists.of(first.rows, first.columns, row, column, full)
    return replace(first, **vars(lists))


def _part(
    mask: Mask,
    maps: list[TileMap],
    part: TileMap,
    position: Tensor | None,
    device: torch.device | str,
    data: Mapping[str, Tensor] | None,
) -> BlockMaskPart:
    """One rectangle of each head's map as a BlockMask."""
    # The part's tiles in the map of each head.
    row, column = part.q_start // part.q_tile, part.kv_start // part.kv_tile
    rows, columns = range(row, row + part.rows), range(column, column + part.columns)
    heads = [_cautious(tile_map.restrict(rows, columns)) for tile_map in maps]
    # Lists of tiles by rows, and by columns for the backward.
    batch = batch_size(mask, data)
    kv_num, kv, full_kv_num, full_kv = _rectangular(heads, batch, device)
    transposed = [lists.transpose() for lists in heads]
    q_num, q, full_q_num, full_q = _rectangular(transposed, batch, device)
    block_mask = BlockMask(
        seq_lengths=(part.q_len, part.kv_len),
        kv_num_blocks=kv_num,
        kv_indices=kv,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv,
        q_num_blocks=q_num,
        q_indices=q,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q,
        BLOCK_SIZE=(part.q_tile, part.kv_tile),
        mask_mod=_MaskMod(mask, part.q_offset + part.q_start, part.kv_start, position, data),
    )
    return BlockMaskPart(block_mask, part.queries, part.keys)


def _cautious(tile_map: TileMap) -> TileMap:
    """The map with short tiles PARTIAL.

    Kernels compute complete tiles and skip mask_mod in FULL ones; torch marks them PARTIAL too.
    """
    in_short_row = tile_map.row_of == tile_map.q_len // tile_map.q_tile
    in_short_column = tile_map.indices == tile_map.kv_len // tile_map.kv_tile
    return replace(tile_map, full=tile_map.full & ~(in_short_row | in_short_column))


def _rectangular(
    heads: Sequence[TileLists], batch: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and indices of partial and of full tiles, int32.

    (B, H, rows) and (B, H, rows, width). Equal for all batch entries: data decides within tiles,
    and kernels need the batch dimension. One width for both kinds, since torch's decoding kernel
    reads both lists by the strides of the first.
    """
    counts_of_heads = []
    for lists in heads:
        counts_of_heads.append([_row_counts(lists, kind) for kind in (~lists.full, lists.full)])
    counts = np.stack(counts_of_heads)  # (heads, kinds, rows)
    width = max(1, int(counts.max()))
    out: list[Tensor] = []
    for number in (0, 1):
        indices = np.zeros((1, len(heads), heads[0].rows, width), dtype=np.int32)
        for head, lists in enumerate(heads):
            # Number 0 are the partial tiles, number 1 the full ones.
            kind = lists.full if number else ~lists.full
            count = counts[head, number]
            # The place of each entry within its row.
            place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            indices[0, head, lists.row_of[kind], place] = lists.indices[kind]
        for table in (counts[None, :, number].astype(np.int32), indices):
            out.append(torch.from_numpy(np.repeat(table, batch, axis=0)).to(device))
    return out[0], out[1], out[2], out[3]


def _row_counts(lists: TileLists, kind: Flags) -> IntArray:
    """Listed tiles of a kind per row, (rows,)."""
    return np.bincount(lists.row_of[kind], minlength=lists.rows).astype(np.int64)


class _MaskMod(torch.nn.Module):
    """A mask_mod over a slice that starts at places q_first and kv_first.

    position: position of each place; None for the identity. A module, since torch.compile treats
    its numbers as constants; with dynamic=True it would make other numbers symbolic, with which
    FlexAttention's CPU template does not compile.
    """

    def __init__(
        self,
        mask: Mask,
        q_first: int,
        kv_first: int,
        position: Tensor | None,
        data: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__()
        self.mask, self.q_first, self.kv_first, self.position = mask, q_first, kv_first, position
        self.data = None if data is None else dict(data)

    def forward(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """FlexAttention's mask_mod."""
        q, kv = q + self.q_first, kv + self.kv_first
        if self.position is not None:
            q, kv = self.position[q], self.position[kv]
        allowed: Tensor = self.mask.allows(b, h, q, kv, self.data)
        return allowed
