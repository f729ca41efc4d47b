"""Ranks as processes of torch.distributed: gloo (CPU) or NCCL (GPU).

A call takes and returns shards. At distance d a rank receives from the rank d before it and sends
to the rank d after it, as the schedule requires. Messages of the next step travel while this one is
computed. In a backward the gradients of received keys return on the reverse path. They are added in
the order of distance, as the simulated transport adds them, so that both give the same bits.

    distance 1      rank 0 -> rank 1 -> rank 2 -> rank 3 -> rank 0
    distance 2      rank 0 -> rank 2 -> rank 0,   rank 1 -> rank 3 -> rank 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from ..calls import Call
from ..partials import Saved
from .exchanges import Exchange, buffer, packed, transport_errors, unpacked
from .ledgers import Ledger
from .schedules import Schedule
from .steps import Message, Step
from .workers import Backward, Forward, KeysAndValues, Worker

# Errors that ranks report to each other, by name.
_ERROR_TYPES: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


@dataclass(frozen=True)
class _Round:
    """A rank's step at one distance, and the messages that it sends.

    step: None if the rank receives nothing at this distance.
    source, target: the ranks that many places before and after this one.
    """

    distance: int
    step: Step | None
    source: int
    target: int
    outgoing: tuple[Message, ...]

    @property
    def incoming(self) -> tuple[Message, ...]:
        """The messages of the step."""
        if self.step is None:
            return ()
        return self.step.messages


class Distributed:
    """The transport of processes: calls take and return shards.

    Shards are (B, H, rows, D). Rows are in the order of the layout's runs.
    """

    sharded = True

    def __init__(self, group: dist.ProcessGroup | str | None = None) -> None:
        """Create the transport; processes are first needed by a call.

        group: a process group or its name; None or "" for the default one.
        """
        if isinstance(group, dist.ProcessGroup):
            group = group.group_name
        self.group_name = group or ""
        self._rows: list[int] = []  # per rank, from the last exchange
        self.ledger = Ledger()

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group, or the default one."""
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "a distributed ring needs torch.distributed: "
                "call torch.distributed.init_process_group() first, "
                "in processes started by torchrun"
            )
        if self.group_name:
            return _resolve_process_group(self.group_name)  # type: ignore[arg-type]
        world = dist.group.WORLD
        assert world is not None
        return world

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.group)

    def tokens(self, q: Tensor, k: Tensor, v: Tensor, about: Mapping[str, str]) -> int:
        """Total number of tokens of all shards.

        All ranks compare their calls before any data moves.

        about: properties that must be equal, by name: the rule, the data, captured tensors.
        """
        own = {
            "dtype": str(q.dtype),
            "batch": q.shape[0],
            "query heads": q.shape[1],
            "key heads": k.shape[1],
            "head_dim": q.shape[3],
            "value_dim": v.shape[3],
            **about,
        }
        table = self._exchanged({"about": own, "rows": q.shape[2]})
        # Every rank compares with itself, so that all raise, and none waits for another.
        for name, value in own.items():
            values = [entry["about"].get(name) for entry in table]
            odd = [rank for rank, rank_value in enumerate(values) if rank_value != value]
            if odd:
                raise ValueError(
                    "the ranks of a ring must compute the same; "
                    f"ranks {odd} differ from rank {self.rank} in {name}: "
                    f"{_short(value)} here, {_short(values[odd[0]])} there. "
                    "Pass the same on every rank"
                )
        self._rows = [entry["rows"] for entry in table]
        return sum(self._rows)

    def refuse(self, error: Exception) -> None:
        """Report an invalid call of this rank to all waiting ranks."""
        if not dist.is_available() or not dist.is_initialized():
            return
        message = str(error)
        if not isinstance(error, TypeError | ValueError):
            message = f"{type(error).__name__}: {error}"
        kind = "TypeError" if isinstance(error, TypeError) else "ValueError"
        self._exchanged({"error": message, "kind": kind})

    def _exchanged(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Entries of all ranks.

        Every rank raises if the call of any rank is invalid.
        """
        table: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(self.group))]
        with transport_errors("could not compare its call with those of the other ranks"):
            dist.all_gather_object(table, entry, group=self.group)
        wrong = [rank for rank, answer in enumerate(table) if "error" in answer]
        # A rank whose own call is invalid raises its own error, in the caller of `refuse`.
        if wrong and self.rank not in wrong:
            answer = table[wrong[0]]
            error_type = _ERROR_TYPES[answer["kind"]]
            raise error_type(f"rank {wrong[0]} of the ring cannot compute: {answer['error']}")
        return table

    def _check(self, schedule: Schedule) -> None:
        """Check the row counts of all ranks.

        Every rank refuses a wrong shard of any rank, so that none waits.
        """
        layout = schedule.layout
        if layout.ranks != len(self._rows):
            raise ValueError(
                f"the ring has {layout.ranks} ranks, the process group {len(self._rows)}; "
                "make them the same"
            )
        for rank, rows in enumerate(self._rows):
            if rows != layout.count(rank):
                raise ValueError(
                    f"rank {rank} of {layout.ranks} must hold {layout.count(rank)} "
                    f"of the {layout.tokens} tokens under the layout {layout.name}; got {rows}. "
                    f"Take the rows that plan(...).positions({rank}) names"
                )

    def _rounds(self, schedule: Schedule) -> list[_Round]:
        """The rounds in which this rank receives or sends, by distance.

        Distance 0, its own keys, comes first.
        """
        rank, size = self.rank, schedule.layout.ranks
        steps = {schedule.distance(rank, step.source): step for step in schedule.steps(rank)}
        # What this rank sends: the messages that steps of other ranks receive from it.
        outgoing: dict[int, tuple[Message, ...]] = {}
        for target in schedule.targets(rank):
            step = schedule.step(target, rank)
            if step is not None:
                outgoing[schedule.distance(target, rank)] = step.messages
        rounds = []
        for distance in sorted({0, *steps, *outgoing}):
            source, target = (rank - distance) % size, (rank + distance) % size
            step, messages = steps.get(distance), outgoing.get(distance, ())
            rounds.append(_Round(distance, step, source, target, messages))
        return rounds

    def _start(self, current: _Round, worker: Worker) -> Exchange:
        """Start sending and receiving the keys and values of a round.

        K and V of one message travel as one tensor.
        """
        outgoing = [packed(*worker.outgoing(message)) for message in current.outgoing]
        incoming = [buffer(message, worker) for message in current.incoming]
        return Exchange(self.group, outgoing, current.target, incoming, current.source)

    def _return(
        self, current: _Round, worker: Backward, grads: Sequence[KeysAndValues]
    ) -> Exchange:
        """Start returning the gradients of a round's messages to their senders."""
        outgoing = [packed(*pair) for pair in grads]
        dtype = worker.grad_k.dtype
        incoming = [buffer(message, worker, dtype) for message in current.outgoing]
        return Exchange(self.group, outgoing, current.source, incoming, current.target)

    def forward(
        self, schedule: Schedule, call: Call, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute out (B, Hq, rows, Dv) and lse (B, Hq, rows)."""
        self._check(schedule)
        self.ledger = Ledger()
        worker = Forward(schedule, self.rank, call, q, k, v)
        rounds = self._rounds(schedule)
        in_flight = self._start(rounds[0], worker)
        for current, following in zip(rounds, [*rounds[1:], None], strict=True):
            received = in_flight.wait()
            # The next messages travel while this step is computed.
            if following is not None:
                in_flight = self._start(following, worker)
            if current.step is not None:
                pairs = [unpacked(x, k.shape[3]) for x in received]
                self.ledger.note(pairs, (q, k, v, worker.out, worker.lse))
                worker.compute(current.step, pairs)
        return worker.out, worker.lse

    def backward(
        self, schedule: Schedule, call: Call, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        self._check(schedule)
        self.ledger = Ledger()
        worker = Backward(schedule, self.rank, call, saved)
        rounds, size, head_dim = self._rounds(schedule), schedule.layout.ranks, saved.k.shape[3]
        in_flight = self._start(rounds[0], worker)
        for current, following in zip(rounds, [*rounds[1:], None], strict=True):
            received = in_flight.wait()
            # If this distance and the next add up to the number of ranks, the next keys and these
            # gradients travel between the same two ranks in the same direction. Both ends then
            # send gradients first, so that messages match.
            crossing = following is not None and current.distance + following.distance == size
            if following is not None and not crossing:
                in_flight = self._start(following, worker)
            grads: list[KeysAndValues] = []
            if current.step is not None:
                pairs = [unpacked(x, head_dim) for x in received]
                self.ledger.note(pairs, worker.shards)
                grads = worker.compute(current.step, pairs)
            # Gradients of received keys go back; those of sent keys come in.
            returning = self._return(current, worker, grads)
            if following is not None and crossing:
                in_flight = self._start(following, worker)
            for message, x in zip(current.outgoing, returning.wait(), strict=True):
                worker.add(message, unpacked(x, head_dim))
        return worker.results

    def __repr__(self) -> str:
        return "distributed"


def _short(value: object) -> str:
    """A value as text, of at most 200 characters and an ellipsis."""
    shown = str(value)
    if len(shown) <= 200:
        return shown
    return f"{shown[:200]}..."
