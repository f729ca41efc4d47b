"""A rank at work: its shards, the blocks of its steps, and what it hands to others. How messages travel is a transport's matter.

Shards are (B, H, rows, ...) tensors of the rows that the layout gives the rank, in the order of its runs.
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
from .schedules import Message, Schedule, Step

KeysAndValues = tuple[Tensor, Tensor]


class Worker:
    """What forward and backward have in common."""

    def __init__(self, schedule: Schedule, rank: int, call: Call, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.schedule, self.rank, self.call, self.q, self.k, self.v = schedule, rank, call, q, k, v
        self.runs = schedule.layout.runs(rank)

    def outgoing(self, message: Message) -> KeysAndValues:
        """What another rank is sent: contiguous copies of K's and V's rows."""
        return self._rows_of(message, self.k).contiguous(), self._rows_of(message, self.v).contiguous()

    def _rows_of(self, message: Message, x: Tensor) -> Tensor:
        return blocks.held(x, message.kv_heads, blocks.rows(self.runs, message.rows))

    def _keys(self, step: Step, received: Sequence[KeysAndValues]) -> dict[Message | None, Keys]:
        there: dict[Message | None, Keys] = {}
        if step.source == self.rank:
            there[None] = Keys(self.runs, HeadRange(0, 1, self.schedule.kv_heads), self.k, self.v)
        for message, (k, v) in zip(step.messages, received, strict=True):
            there[message] = Keys((message.rows,), message.kv_heads, k, v)
        return there


class Forward(Worker):
    """Partial results (out, lse) of a rank's queries, complete after its last step."""

    def __init__(
        self, schedule: Schedule, rank: int, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> None:
        """out: memory for it, its contents lost."""
        super().__init__(schedule, rank, call, q, k, v)
        self.out = (empty_out(q, v, is_by_token(q)) if out is None else out).zero_()
        self.lse = q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
        self.queries = Queries(self.runs, q, self.out, self.lse)

    def compute(self, step: Step, received: Sequence[KeysAndValues] = ()) -> None:
        """One step, given its messages."""
        keys = self._keys(step, received)
        for block in step.blocks:
            blocks.forward(block, self.schedule.layout, self.call, self.queries, keys[block.message])


class Backward(Worker):
    """Sums of gradients of a rank's shards, in float32 for low precision; complete once all others have sent theirs."""

    def __init__(self, schedule: Schedule, rank: int, call: Call, saved: Saved) -> None:
        q, k, v = saved.q, saved.k, saved.v
        super().__init__(schedule, rank, call, q, k, v)
        self.grad_q, self.grad_k, self.grad_v = (torch.zeros_like(x, dtype=lse_dtype(x.dtype)) for x in (q, k, v))
        self.queries = Queries(self.runs, q, saved.out, saved.lse, saved.grad_out, saved.grad_lse, self.grad_q)

    def compute(self, step: Step, received: Sequence[KeysAndValues] = ()) -> list[KeysAndValues]:
        """One step; returns the gradients of its messages, for their sender."""
        keys = self._keys(step, received)
        sums = {
            message: tuple(torch.zeros_like(x, dtype=self.grad_k.dtype) for x in (there.k, there.v))
            if message is not None
            else (self.grad_k, self.grad_v)
            for message, there in keys.items()
        }
        for block in step.blocks:
            there, (grad_k, grad_v) = keys[block.message], sums[block.message]
            layout = self.schedule.layout
            blocks.backward(block, layout, self.call, self.queries, there, grad_k, grad_v)
        return [(sums[message][0], sums[message][1]) for message in step.messages]

    def add(self, message: Message, grads: KeysAndValues) -> None:
        """Gradients of rows of this rank, from the rank that they were sent to."""
        for total, part in zip((self.grad_k, self.grad_v), grads, strict=True):
            self._rows_of(message, total).add_(part)

    @property
    def shards(self) -> tuple[Tensor | None, ...]:
        """What the rank holds all the time."""
        mine = self.queries
        return (self.q, self.k, self.v, mine.out, mine.lse, mine.grad_out, mine.grad_lse, self.grad_q, self.grad_k, self.grad_v)

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the shards, in their dtype."""
        return self.grad_q.to(self.q.dtype), self.grad_k.to(self.k.dtype), self.grad_v.to(self.v.dtype)
