"""All ranks in one process: steps run on copies of their messages.

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
from .schedules import Schedule
from .steps import Step
from .workers import Backward, Forward, KeysAndValues


def shard_of(x: Tensor, runs: Sequence[range]) -> Tensor:
    """A copy of a rank's rows of x (B, H, N, ...)."""
    if runs:
        return torch.cat([x[:, :, run.start : run.stop : run.step] for run in runs], dim=2)
    return x[:, :, :0]


def write_shard(x: Tensor, runs: Sequence[range], shard: Tensor) -> None:
    """Write a rank's shard back into x."""
    start = 0
    for run in runs:
        x[:, :, run.start : run.stop : run.step] = shard[:, :, start : start + len(run)]
        start += len(run)


class Simulated:
    """The transport: global tensors (B, H, N, D) in, global tensors out."""

    sharded = False

    def __init__(self) -> None:
        self.ledger = Ledger()

    def tokens(self, q: Tensor, k: Tensor, v: Tensor, about: Mapping[str, str]) -> int:
        """Length of the sequence; the tensors are complete."""
        return q.shape[2]

    def refuse(self, error: Exception) -> None:
        """Nothing to report: no other process waits."""

    @property
    def group_name(self) -> str | None:
        """No process group."""
        return None

    def __repr__(self) -> str:
        return "simulated"

    def forward(
        self, schedule: Schedule, call: Call, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute out (B, Hq, N, Dv) and lse (B, Hq, N)."""
        layout, self.ledger = schedule.layout, Ledger()
        q, k, v = (layout.order.permute(x, 2) for x in (q, k, v))
        out = empty_out(q, v, is_by_token(q))
        lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
        for rank in range(layout.ranks):
            shards = (shard_of(x, layout.runs(rank)) for x in (q, k, v))
            worker = Forward(schedule, rank, call, *shards)
            for step in schedule.steps(rank):
                received = _received(step, k, v)
                self.ledger.note(received, (worker.q, worker.k, worker.v, worker.out, worker.lse))
                worker.compute(step, received)
            write_shard(out, worker.runs, worker.out)
            write_shard(lse, worker.runs, worker.lse)
        return layout.order.invert(out, 2), layout.order.invert(lse, 2)

    def backward(
        self, schedule: Schedule, call: Call, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        All ranks advance together, since gradients of a rank's keys come from other ranks.
        """
        layout, order, self.ledger = schedule.layout, schedule.layout.order, Ledger()
        saved = saved.map(lambda x: order.permute(x, 2))
        # One worker per rank, with copies of its shards.
        workers = []
        for rank in range(layout.ranks):
            shards = saved.map(partial(shard_of, runs=layout.runs(rank)))
            workers.append(Backward(schedule, rank, call, shards))
        # By distance, as gradients arrive in other transports.
        steps: list[tuple[Backward, Step]] = []
        for worker in workers:
            steps += [(worker, step) for step in schedule.steps(worker.rank)]
        steps.sort(key=lambda pair: schedule.distance(pair[0].rank, pair[1].source))
        for worker, step in steps:
            received = _received(step, saved.k, saved.v)
            self.ledger.note(received, worker.shards)
            for message, grads in zip(step.messages, worker.compute(step, received), strict=True):
                workers[step.source].add(message, grads)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (saved.q, saved.k, saved.v))
        for worker in workers:
            for x, shard in zip((grad_q, grad_k, grad_v), worker.results, strict=True):
                write_shard(x, worker.runs, shard)
        return order.invert(grad_q, 2), order.invert(grad_k, 2), order.invert(grad_v, 2)


def _received(step: Step, k: Tensor, v: Tensor) -> list[KeysAndValues]:
    """Messages of a step, copied from the rows of its source."""
    out = []
    for message in step.messages:
        rows = slice(message.rows.start, message.rows.stop, message.rows.step)
        part_k, part_v = (message.kv_heads.of(x)[:, :, rows].contiguous() for x in (k, v))
        out.append((part_k, part_v))
    return out
