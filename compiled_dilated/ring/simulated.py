"""All ranks in one process: every step of every rank runs on copies of its messages.

A rank reads only its own shards and its messages. Gradients of received keys return to their owner
in the order in which they would arrive, so that other transports give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..calls import Call
from ..partials import Saved, empty_out, is_by_token, lse_dtype
from .ledgers import Ledger
from .schedules import Schedule, Step
from .workers import Backward, Forward, KeysAndValues


def taken(x: Tensor, runs: Sequence[range]) -> Tensor:
    """A rank's shard of x (B, H, N, ...), in the order of the layout: a copy."""
    if runs:
        return torch.cat([x[:, :, run.start : run.stop : run.step] for run in runs], dim=2)
    return x[:, :, :0]


def put(x: Tensor, runs: Sequence[range], shard: Tensor) -> None:
    """Write a rank's shard back into x."""
    at = 0
    for run in runs:
        x[:, :, run.start : run.stop : run.step] = shard[:, :, at : at + len(run)]
        at += len(run)


class Simulated:
    """The transport: global tensors (B, H, N, D) in, global tensors out."""

    sharded = False

    def __init__(self) -> None:
        self.ledger = Ledger()

    def tokens(self, q: Tensor, k: Tensor, v: Tensor, about: Mapping[str, str]) -> int:
        """Length of the sequence; the tensors are complete."""
        return q.shape[2]

    def refuse(self, error: Exception) -> None:
        """No other process waits."""

    @property
    def group_name(self) -> str | None:
        """No process group."""
        return None

    def __repr__(self) -> str:
        return "simulated"

    def forward(
        self,
        schedule: Schedule,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, N, Dv) and lse (B, Hq, N), rank after rank."""
        layout, self.ledger = schedule.layout, Ledger()
        q, k, v = (layout.order.permute(x, 2) for x in (q, k, v))
        out, lse = (
            empty_out(q, v, is_by_token(q)),
            q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype)),
        )
        for rank in range(layout.ranks):
            worker = Forward(
                schedule,
                rank,
                call,
                *(taken(x, layout.runs(rank)) for x in (q, k, v)),
            )
            for step in schedule.steps(rank):
                received = _received(step, k, v)
                self.ledger.note(received, (worker.q, worker.k, worker.v, worker.out, worker.lse))
                worker.compute(step, received)
            put(out, worker.runs, worker.out)
            put(lse, worker.runs, worker.lse)
        return layout.order.invert(out, 2), layout.order.invert(lse, 2)

    def backward(
        self,
        schedule: Schedule,
        call: Call,
        saved: Saved,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        All ranks advance together, since gradients of a rank's keys come from other ranks.
        """
        layout, order, self.ledger = schedule.layout, schedule.layout.order, Ledger()
        saved = saved.map(lambda x: order.permute(x, 2))
        workers = []
        for rank in range(layout.ranks):
            shards = saved.map(partial(taken, runs=layout.runs(rank)))
            workers.append(Backward(schedule, rank, call, shards))
        steps = [(worker, step) for worker in workers for step in schedule.steps(worker.rank)]
        for worker, step in sorted(
            steps,
            key=lambda item: schedule.distance(item[0].rank, item[1].source),
        ):
            received = _received(step, saved.k, saved.v)
            self.ledger.note(received, worker.shards)
            for message, grads in zip(step.messages, worker.compute(step, received), strict=True):
                workers[step.source].add(message, grads)
        results = [torch.empty_like(x) for x in (saved.q, saved.k, saved.v)]
        for worker in workers:
            for x, shard in zip(results, worker.results, strict=True):
                put(x, worker.runs, shard)
        return order.invert(results[0], 2), order.invert(results[1], 2), order.invert(results[2], 2)


def _received(step: Step, k: Tensor, v: Tensor) -> list[KeysAndValues]:
    """Messages of a step, copied from the rows of its source."""
    out = []
    for message in step.messages:
        rows = slice(message.rows.start, message.rows.stop, message.rows.step)
        out.append(
            (
                message.kv_heads.of(k)[:, :, rows].contiguous(),
                message.kv_heads.of(v)[:, :, rows].contiguous(),
            ),
        )
    return out
