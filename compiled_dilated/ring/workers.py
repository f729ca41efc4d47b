"""The computation of one rank: its shards, blocks and outgoing messages.

Shards are (B, H, rows, ...) tensors, rows in the order of the layout's runs. Sending and receiving
is the transport's part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import Call
from ..heads import HeadRange
from ..partials import Saved, empty_out, is_by_token, lse_dtype
from . import blocks
from .blocks import Keys, Queries
from .schedules import Schedule
from .steps import Message, Step

KeysAndValues = tuple[Tensor, Tensor]


class Worker:
    """Common state of a rank's forward and backward.

    q, k, v: the rank's shards.
    """

    def __init__(
        self, schedule: Schedule, rank: int, call: Call, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        self.schedule, self.rank, self.call, self.q, self.k, self.v = schedule, rank, call, q, k, v
        self.runs = schedule.layout.runs(rank)

    def outgoing(self, message: Message) -> KeysAndValues:
        """K and V rows of a message to another rank: contiguous copies."""
        k, v = self._rows_of(message, self.k), self._rows_of(message, self.v)
        return k.contiguous(), v.contiguous()

    def _rows_of(self, message: Message, x: Tensor) -> Tensor:
        """View of a message's rows and heads in a shard."""
        return blocks.view(x, message.kv_heads, blocks.rows(self.runs, message.rows))

    def _keys(self, step: Step, received: Sequence[KeysAndValues]) -> dict[Message | None, Keys]:
        """Keys of a step by message; None for the rank's own."""
        keys: dict[Message | None, Keys] = {}
        if step.source == self.rank:
            keys[None] = Keys(self.runs, HeadRange(0, 1, self.schedule.kv_heads), self.k, self.v)
        for message, (k, v) in zip(step.messages, received, strict=True):
            keys[message] = Keys((message.rows,), message.kv_heads, k, v)
        return keys


class Forward(Worker):
    """Partial results (out, lse) of a rank, complete after its steps."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None = None,
    ) -> None:
        """Start from an empty result.

        out: buffer for the result, overwritten.
        """
        super().__init__(schedule, rank, call, q, k, v)
        if out is None:
            out = empty_out(q, v, is_by_token(q))
        self.out = out.zero_()
        self.lse = q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
        self.queries = Queries(self.runs, q, self.out, self.lse)

    def compute(self, step: Step, received: Sequence[KeysAndValues] = ()) -> None:
        """Compute one step from its messages."""
        keys = self._keys(step, received)
        layout = self.schedule.layout
        for block in step.blocks:
            blocks.forward(block, layout, self.call, self.queries, keys[block.message])


class Backward(Worker):
    """Sums of gradients of a rank's shards, in float32 for low precision.

    Complete once all other ranks have returned theirs.
    """

    def __init__(self, schedule: Schedule, rank: int, call: Call, saved: Saved) -> None:
        q, k, v = saved.q, saved.k, saved.v
        super().__init__(schedule, rank, call, q, k, v)
        self.grad_q, self.grad_k, self.grad_v = (
            torch.zeros_like(x, dtype=lse_dtype(x.dtype)) for x in (q, k, v)
        )
        self.queries = Queries(
            self.runs, q, saved.out, saved.lse, saved.grad_out, saved.grad_lse, self.grad_q
        )

    def compute(self, step: Step, received: Sequence[KeysAndValues] = ()) -> list[KeysAndValues]:
        """Compute one step; returns the gradients of its messages, for their sender."""
        keys = self._keys(step, received)
        # Gradients of own keys go to the rank's sums, those of a message to sums that are returned.
        sums: dict[Message | None, KeysAndValues] = {None: (self.grad_k, self.grad_v)}
        for message in step.messages:
            k, v = keys[message].k, keys[message].v
            dtype = self.grad_k.dtype
            sums[message] = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        layout = self.schedule.layout
        for block in step.blocks:
            grad_k, grad_v = sums[block.message]
            block_keys = keys[block.message]
            blocks.backward(block, layout, self.call, self.queries, block_keys, grad_k, grad_v)
        return [sums[message] for message in step.messages]

    def add(self, message: Message, grads: KeysAndValues) -> None:
        """Add gradients that another rank returned for rows of this rank."""
        for total, part in zip((self.grad_k, self.grad_v), grads, strict=True):
            self._rows_of(message, total).add_(part)

    @property
    def shards(self) -> tuple[Tensor | None, ...]:
        """Tensors that stay in memory during the complete run."""
        queries = self.queries
        return (
            self.q,
            self.k,
            self.v,
            queries.out,
            queries.lse,
            queries.grad_out,
            queries.grad_lse,
            self.grad_q,
            self.grad_k,
            self.grad_v,
        )

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the shards, in their dtype."""
        return (
            self.grad_q.to(self.q.dtype),
            self.grad_k.to(self.k.dtype),
            self.grad_v.to(self.v.dtype),
        )
