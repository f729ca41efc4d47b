"""mask_mods of orders, and slices of the parts of block masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compiled_dilated import orders
from compiled_dilated.block_masks import BlockMaskPart
from compiled_dilated.masks import Mask
from compiled_dilated.orders import Order

IDENTITY = orders.identity()


def in_order(
    mask: Mask, order: Order, n: int, q_offset: int, data: Any = None, device: str = "cpu"
) -> Callable[..., Tensor]:
    """The mask_mod by the order's permutation, independent of the library's."""
    permutation = order.permutation(n)
    if permutation is None:
        table = torch.arange(max(n, 2**12), device=device)
    else:
        table = torch.from_numpy(permutation).to(device)
    return lambda b, h, q, kv: mask.allows(b, h, table[q] + q_offset, table[kv], data)


def slices_of(part: BlockMaskPart) -> tuple[slice, slice]:
    """The part's queries and keys as slices."""
    return slice(part.queries.start, part.queries.stop), slice(part.keys.start, part.keys.stop)
