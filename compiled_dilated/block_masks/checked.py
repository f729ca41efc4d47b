"""BlockMasks of a mask, after checks of the arguments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .. import arguments, checks
from ..masks import Mask
from ..masks.functions import functions_of
from ..orders import Order, identity
from .parts import BlockMaskPart, batch_size, build


def block_masks(
    mask: Mask,
    q_len: int,
    kv_len: int,
    device: torch.device | str = "cpu",
    heads: int | None = None,
    tile: int = 128,
    order: Order = identity(),
    q_offset: int = 0,
    data: Mapping[str, Tensor] | None = None,
) -> tuple[BlockMaskPart, ...]:
    """The mask as disjoint BlockMasks.

    They are built without q_len x kv_len pairs or tiles. Most masks give one part; several if a few
    rows (global tokens) or columns (sinks) are far heavier than the others. Rows in no part see
    nothing. Lists are (B, 1, ...), B the batch size of the data (1 without data), or
    (B, heads, ...) if `heads` is passed and heads see different pairs.

    tile: queries and keys per block.
    order: q, k and v must be permuted by it first.
    q_offset: position of the first query.
    data: the data tensors that the mask reads, captured by its mask_mod.

    Raises ValueError for a length of 0, positions for which the mask is undefined, or data that is
    missing or not read.

    >>> from compiled_dilated import masks
    >>> parts = block_masks(masks.window(256) | masks.sinks(4), 2**20, 2**20)
    >>> [part.keys for part in parts]
    [range(0, 128), range(128, 1048576)]
    """
    arguments.integer("q_len", q_len, 1)
    arguments.integer("kv_len", kv_len, 1)
    arguments.integer("tile", tile, 1)
    if heads is not None:
        arguments.integer("heads", heads, 1)
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a mask; got {arguments.kind_and_text(mask)}. "
            "Use one of compiled_dilated.masks"
        )
    query_tokens = q_len + arguments.integer("q_offset", q_offset, 0)
    all_heads = mask if heads is None else mask.for_heads(heads)
    _check_data(all_heads, query_tokens, kv_len, data, device)
    return build(mask, q_len, kv_len, device, heads, tile, order, q_offset, data)


def block_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    device: torch.device | str = "cpu",
    heads: int | None = None,
    tile: int = 128,
    order: Order = identity(),
    q_offset: int = 0,
    data: Mapping[str, Tensor] | None = None,
) -> BlockMask:
    """The mask as one BlockMask; arguments as in `block_masks`.

    Raises ValueError if the mask needs several parts.
    """
    parts = block_masks(mask, q_len, kv_len, device, heads, tile, order, q_offset, data)
    if len(parts) > 1:
        raise ValueError(
            f"{mask} at {q_len} x {kv_len} tokens takes {len(parts)} block masks: a few of its "
            "rows or columns of tiles are far heavier than the others and would widen every list. "
            "Call block_masks(...) and merge the parts by their lse"
        )
    return parts[0].block_mask


def _check_data(
    mask: Mask,
    query_tokens: int,
    key_tokens: int,
    data: Mapping[str, Tensor] | None,
    device: torch.device | str,
) -> None:
    """Raise for unfit data, and for masks that cannot be evaluated."""
    index_device = torch.empty(0, device=device).device  # with the index of the device
    shape = checks.Shape(batch_size(mask, data), query_tokens, key_tokens, index_device)
    checks.data(mask.names, mask.query_names, data, shape)
    # Evaluate one pair: a mask that cannot be evaluated (a rule over an unknown number of heads)
    # raises here.
    if not functions_of(mask):
        first = torch.zeros((), dtype=torch.int64, device=device)
        mask.allows(first, first, first, first, data)
