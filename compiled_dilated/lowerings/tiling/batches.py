"""Batches: dense problems of one shape, computed by one kernel call.

     keys              queries.tile(i) sees keys.tile(i), except pairs that `masks` hide;
. . # # # . . . .      a call computes as many tiles as fit the budget, for all heads
. . . . # # # . .      of the batch; its result is merged into the program's (out, lse).
. . . . . . # # #

The dense, strided and tiled lowerings create them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...calls import Call
from ...heads import HeadRange
from ...masks import Mask
from ...masks.differences import pairs_up_to
from ...partials import Saved, lse_dtype
from . import kernels
from .lattice import Rows


@dataclass(frozen=True, eq=False)
class Batch:
    """`queries.count` tiles of `queries.size` x `keys.size` positions, for heads with equal masks.

    masks: a pair counts once per mask that allows it; () if every pair counts once.
    causal: row t sees columns 0 .. t.
    unmasked_columns: number of leading columns for which masks are not evaluated: every row sees
        them.
    """

    heads: HeadRange
    kv_heads: HeadRange
    queries: Rows
    keys: Rows
    masks: tuple[Mask, ...] = ()
    causal: bool = False
    unmasked_columns: int = 0

    @property
    def pairs(self) -> int:
        """Pairs that the kernel computes, for all heads; a causal tile's triangle."""
        rows, columns = self.queries.size, self.keys.size
        per_tile = rows * columns
        if self.causal:
            per_tile = pairs_up_to(0, range(rows), range(columns))
        return self.queries.count * per_tile * self.heads.count

    @property
    def evaluated_pairs(self) -> int:
        """Pairs for which masks are evaluated, in all tiles."""
        if not self.masks:
            return 0
        return self.queries.count * self.queries.size * (self.keys.size - self.unmasked_columns)

    def by_kv_head(self) -> Iterator[Batch]:
        """The same work, one key head at a time."""
        shared = self.heads.count // self.kv_heads.count
        for i, kv_head in enumerate(self.kv_heads.indices()):
            start = self.heads.start + i * shared * self.heads.step
            yield replace(
                self,
                heads=HeadRange(start, self.heads.step, shared),
                kv_heads=HeadRange(kv_head, 1, 1),
            )

    def split(self, most: int) -> Iterator[Batch]:
        """The same work as batches of at most `most` tiles each."""
        for start in range(0, self.queries.count, most):
            stop = start + most
            yield replace(
                self, queries=self.queries.select(start, stop), keys=self.keys.select(start, stop)
            )


def _tiles(
    batch: Batch, call: Call, entries: range, device: torch.device, dtype: torch.dtype
) -> kernels.Tiles:
    """Kernel inputs beside q, k and v, for some batch entries."""
    tiles = kernels.Tiles(call.scale, causal=batch.causal)
    if not batch.masks and call.score_mod is None:
        return tiles
    # Indices of the tiles, (B * tiles, 1, rows or 1, columns or 1). In 64 bits: a function may
    # multiply positions.
    b = torch.tensor(entries, device=device).repeat_interleave(batch.queries.count)
    b = b[:, None, None, None]
    q = torch.from_numpy(batch.queries.positions()).to(device).repeat(len(entries), 1)
    kv = torch.from_numpy(batch.keys.positions()).to(device).repeat(len(entries), 1)
    q, kv = q[:, None, :, None], kv[:, None, None, :]
    if batch.masks:
        tiles = replace(tiles, bias=_bias(batch, call, b, q, kv, dtype))
    if call.score_mod is not None:
        heads = torch.tensor(batch.heads.indices(), device=device)[None, :, None, None]
        tiles = replace(tiles, score_mod=call.score_mod.on(b, heads, q, kv))
    return tiles


def _bias(batch: Batch, call: Call, b: Tensor, q: Tensor, kv: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive bias of the tiles, (B * tiles, 1, rows, columns).

    -inf for a hidden pair, else the log of its multiplicity.
    """
    # All heads of a batch have equal masks: evaluate them for the first.
    head = torch.tensor(batch.heads.start, device=q.device)[None, None, None, None]
    kv = kv[..., batch.unmasked_columns :]
    allowed = [mask.allows(b, head, q, kv, call.data) for mask in batch.masks]
    shape = (len(q), 1, q.shape[2], kv.shape[3])
    if len(allowed) == 1:
        bias = torch.zeros(shape, dtype=dtype, device=q.device).masked_fill_(~allowed[0], -math.inf)
    else:
        # log c does not survive bfloat16; the kernels compute as precisely as their bias.
        exact = lse_dtype(dtype)
        bias = torch.stack([pairs.expand(shape) for pairs in allowed]).sum(dim=0, dtype=exact).log()
    if batch.unmasked_columns:
        return torch.nn.functional.pad(bias, (batch.unmasked_columns, 0))
    return bias


def forward(
    batch: Batch,
    call: Call,
    entries: range,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge some batch entries into out and lse.

    out: (B, Hq, N, Dv). lse: (B, Hq, N).
    """
    chosen, shift = slice(entries.start, entries.stop), call.q_offset
    q, out, lse = (batch.heads.of(x[chosen]) for x in (q, out, lse))
    k, v = (batch.kv_heads.of(x[chosen]) for x in (k, v))
    part_out, part_lse = kernels.attention(
        batch.queries.read(q, shift),
        batch.keys.read(k),
        batch.keys.read(v),
        _tiles(batch, call, entries, q.device, q.dtype),
    )
    batch.queries.merge(out, lse, part_out, part_lse, shift)


@dataclass(frozen=True)
class Sums:
    """Gradient sums of q, k and v, in float32 for low precision."""

    q: Tensor
    k: Tensor
    v: Tensor


def backward(batch: Batch, call: Call, entries: range, saved: Saved, sums: Sums) -> None:
    """Add gradients of some batch entries, from merged out and lse.

    lse is +inf in rows that see nothing.
    """
    chosen, shift = slice(entries.start, entries.stop), call.q_offset
    dtype = kernels.backward_dtype(saved.q)

    def of_queries(x: Tensor) -> Tensor:
        return batch.queries.read(batch.heads.of(x[chosen]), shift)

    def of_keys(x: Tensor) -> Tensor:
        return batch.keys.read(batch.kv_heads.of(x[chosen])).to(dtype)

    # 1. The tiles' gradients, in the dtype of the kernel.
    grad_lse = saved.grad_lse
    if grad_lse is not None:
        grad_lse = of_queries(grad_lse)
    grad_q, grad_k, grad_v = kernels.attention_backward(
        of_queries(saved.grad_out).to(dtype),
        grad_lse,
        of_queries(saved.q).to(dtype),
        of_keys(saved.k),
        of_keys(saved.v),
        of_queries(saved.out).to(dtype),
        of_queries(saved.lse),
        _tiles(batch, call, entries, saved.q.device, dtype),
    )
    # 2. Added to the sums: a key may be in several tiles and batches.
    batch.queries.add(batch.heads.of(sums.q[chosen]), grad_q, shift)
    batch.keys.add(batch.kv_heads.of(sums.k[chosen]), grad_k)
    batch.keys.add(batch.kv_heads.of(sums.v[chosen]), grad_v)
