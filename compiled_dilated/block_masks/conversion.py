"""BlockMasks with wide lists, and tile maps of BlockMasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..orders import identity
from ..tiles import Flags, TileLists, TileMap


def widen(block_mask: BlockMask) -> BlockMask:
    """The BlockMask with lists of full width, for the CPU kernel.

    Lists are views of the narrow ones: a row's view continues into the next rows, and entries past
    a row's count are never read.
    """
    rows, columns = (
        -(-length // size)
        for length, size in zip(block_mask.seq_lengths, block_mask.BLOCK_SIZE, strict=True)
    )
    return BlockMask(
        seq_lengths=block_mask.seq_lengths,
        kv_num_blocks=block_mask.kv_num_blocks,
        kv_indices=_widened(block_mask.kv_indices, columns),
        full_kv_num_blocks=block_mask.full_kv_num_blocks,
        full_kv_indices=_widened(block_mask.full_kv_indices, columns),
        q_num_blocks=block_mask.q_num_blocks,
        q_indices=_widened(block_mask.q_indices, rows),
        full_q_num_blocks=block_mask.full_q_num_blocks,
        full_q_indices=_widened(block_mask.full_q_indices, rows),
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=block_mask.mask_mod,
    )


def _widened(indices: Tensor | None, width: int) -> Any:
    """Indices as a view with rows of at least `width` entries."""
    if indices is None or indices.shape[-1] >= width:
        return indices
    # The last row's view needs `width` entries after its own.
    flat = torch.cat([indices.reshape(-1), indices.new_zeros(width)])
    return flat.as_strided((*indices.shape[:-1], width), indices.contiguous().stride())


def tile_map(block_mask: BlockMask, batch: int = 0, head: int = 0) -> TileMap:
    """The tiles of a BlockMask for one batch entry and head."""
    entries = block_mask.kv_num_blocks.shape
    if not (0 <= batch < entries[0] and 0 <= head < entries[1]):
        raise ValueError(
            f"batch entry {batch} and head {head} are not in a block mask of {entries[0]} batch "
            f"entries and {entries[1]} heads"
        )
    (q_len, kv_len), (q_tile, kv_tile) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    rows, columns = -(-q_len // q_tile), -(-kv_len // kv_tile)
    partial = block_mask.kv_num_blocks, block_mask.kv_indices
    full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    tiles: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Flags]] = []
    for is_full, (num, index) in ((False, partial), (True, full)):
        if num is None or index is None:
            continue
        counts, table = num[batch, head].cpu().numpy(), index[batch, head].cpu().numpy()
        # Entries past a row's count are padding.
        listed = np.arange(table.shape[-1]) < counts[:, None]
        row = np.repeat(np.arange(rows, dtype=np.int32), counts)
        tiles.append((row, table[listed], np.full(len(row), is_full)))
    lists = TileLists.of(rows, columns, *map(np.concatenate, zip(*tiles, strict=True)))
    return TileMap(
        **vars(lists),
        q_len=q_len,
        kv_len=kv_len,
        q_tile=q_tile,
        kv_tile=kv_tile,
        order=identity(),
        q_offset=0,
    )
