"""What attention is measured against: torch's own dense SDPA, and its FlexAttention as its manual has it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..orders import Order, identity
from ..programs import Program

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(causal: bool) -> Attention:
    """Every query sees every key, or every earlier one."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)


def flex(program: Program, tokens: int, heads: int, device: str, order: Order = identity(), tile: int = 128) -> Attention:
    """Compiled FlexAttention over the union of the program's branches, its block mask by `create_block_mask`, compiled too.

    FlexAttention knows no multiplicities, so that a pair in two branches counts once: less work than the program asks for.
    order: tokens are permuted by it before and back after, as the program's own order does.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks = [branch.mask.for_heads(heads).on(device) for branch in program.branches]
    permutation = order.permutation(tokens)
    table = None if permutation is None else torch.from_numpy(permutation.astype(np.int32)).to(device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if table is not None:
            q, kv = table[q], table[kv]
        seen: Tensor = reduce(operator.or_, (mask.allows(b, h, q, kv) for mask in masks))
        return seen

    per_head = any(
        branch.mask_at(head, heads) != branch.mask_at(0, heads) for branch in program.branches for head in range(heads)
    )
    block_mask = torch.compile(create_block_mask, dynamic=False)(
        mask_mod, None, heads if per_head else None, tokens, tokens, device=device, BLOCK_SIZE=tile
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (order.permute(x) for x in (q, k, v))
        out = compiled(q, k, v, block_mask=block_mask)
        assert isinstance(out, Tensor)
        restored: Tensor = order.invert(out)
        return restored

    return attention
