"""Ranks as processes of torch.distributed: gloo on a CPU, NCCL on a GPU.

A call takes and returns shards. At distance d a rank receives from the rank d before it and sends
to the rank d after it, as the schedule requires. Messages of the next step travel while this one is
computed. In a backward the gradients of received keys return the same way. They are added in the
order of distance, as the simulated transport adds them, so that both give the same bits.

    distance 1      rank 0 -> rank 1 -> rank 2 -> rank 3 -> rank 0
    distance 2      rank 0 -> rank 2 -> rank 0,   rank 1 -> rank 3 -> rank 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the default group of the moment of import as their default argument. torch.compile imports it; after
# init_process_group() it would keep that group's threads past destroy_process_group(), and they abort a process that exits.
import torch.distributed.nn.functional
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from ..calls import Call
from ..partials import Saved
from .ledgers import Ledger
from .schedules import Message, Schedule, Step
from .workers import Backward, Forward, KeysAndValues, Worker


@dataclass(frozen=True)
class _Round:
    """The step that a rank computes at one distance, and the messages that it sends."""

    distance: int
    step: Step | None
    target: int
    outgoing: tuple[Message, ...]


class _Exchange:
    """Messages in flight in both directions; `wait` returns the received ones."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        out: Sequence[Tensor],
        target: int,
        into: Sequence[Tensor],
        source: int,
    ) -> None:
        self.into, self._sent = list(into), list(out)  # sent buffers must live until they arrive
        self._peers = (source, target)
        sends = [dist.P2POp(dist.isend, x, group=group, group_peer=target) for x in out]
        receives = [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in into]
        with _transport_errors(f"could not reach rank {source} or rank {target}"):
            self._works = dist.batch_isend_irecv(sends + receives) if sends or receives else []

    def wait(self) -> list[Tensor]:
        with _transport_errors(
            f"waited in vain for rank {self._peers[0]}, or for rank {self._peers[1]} to receive"
        ):
            for work in self._works:
                work.wait()
        self._sent = []
        return self.into


class _transport_errors:
    """Context that turns failures of the transport into one clear error."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise RuntimeError(
                f"the ring broke: this rank {self.what} ({str(error).splitlines()[0]}). "
                "A rank has died or stands still; start all ranks again (torchrun --max-restarts does), or set a longer timeout"
            ) from error


class Distributed:
    """The transport: every rank passes and receives its own shards (B, H, rows, D).

    Rows are in the order of the layout's runs.
    """

    sharded = True

    def __init__(self, group: dist.ProcessGroup | str | None = None) -> None:
        """group: a process group or its name; None or "" for the default one."""
        self.group_name = group.group_name if isinstance(group, dist.ProcessGroup) else group or ""
        self._rows: list[int] = []  # per rank, from the last exchange
        self.ledger = Ledger()

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group, or the default one."""
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "a distributed ring needs torch.distributed: call torch.distributed.init_process_group() first, "
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

        about: properties that must agree, by name: the rule, the data, captured tensors.
        """
        own = {"dtype": str(q.dtype), "batch": q.shape[0], "query heads": q.shape[1], "key heads": k.shape[1],
               "head_dim": q.shape[3], "value_dim": v.shape[3], **about}  # fmt: skip
        table = self._exchanged({"about": own, "rows": q.shape[2]})
        for name, value in own.items():
            odd = [rank for rank, entry in enumerate(table) if entry["about"].get(name) != value]
            if odd:
                other = table[odd[0]]["about"].get(name)
                raise ValueError(
                    f"the ranks of a ring must compute the same; ranks {odd} differ from rank {self.rank} in {name}: "
                    f"{_short(value)} here, {_short(other)} there. Pass the same on every rank"
                )
        self._rows = [entry["rows"] for entry in table]
        return sum(self._rows)

    def refuse(self, error: Exception) -> None:
        """Report an invalid call of this rank to the ranks that wait for it."""
        if not dist.is_available() or not dist.is_initialized():
            return
        message = str(error)
        if not isinstance(error, TypeError | ValueError):
            message = f"{type(error).__name__}: {error}"
        kind = "TypeError" if isinstance(error, TypeError) else "ValueError"
        self._exchanged({"error": message, "kind": kind})

    def _exchanged(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Entries of all ranks; every rank raises if one rank's call is invalid."""
        table: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(self.group))]
        with _transport_errors("could not greet the others"):
            dist.all_gather_object(table, entry, group=self.group)
        wrong = {rank: entry_of for rank, entry_of in enumerate(table) if "error" in entry_of}
        if self.rank in wrong:
            return table  # it raises its own error
        if wrong:
            rank, entry_of = next(iter(wrong.items()))
            kind = TypeError if entry_of["kind"] == "TypeError" else ValueError
            raise kind(f"rank {rank} of the ring cannot compute: {entry_of['error']}")
        return table

    def _check(self, schedule: Schedule) -> None:
        """Check the row counts of all ranks, so that all refuse a wrong shard and none waits."""
        layout = schedule.layout
        if layout.ranks != len(self._rows):
            raise ValueError(
                f"the ring has {layout.ranks} ranks, the process group {len(self._rows)}; make them the same",
            )
        for rank, rows in enumerate(self._rows):
            if rows != layout.count(rank):
                raise ValueError(
                    f"rank {rank} of {layout.ranks} must hold {layout.count(rank)} of the {layout.tokens} tokens under the "
                    f"layout {layout.name}; got {rows}. Take the rows that plan(...).positions({rank}) names"
                )

    def _rounds(self, schedule: Schedule) -> list[_Round]:
        """All distances at which this rank receives or sends; distance 0, its own keys, first."""
        rank, size = self.rank, schedule.layout.ranks
        steps = {schedule.distance(rank, step.source): step for step in schedule.steps(rank)}
        outgoing: dict[int, tuple[Message, ...]] = {}
        for target in schedule.targets(rank):
            step = schedule.step(target, rank)
            if step is not None:
                outgoing[schedule.distance(target, rank)] = step.messages
        return [
            _Round(
                distance, steps.get(distance), (rank + distance) % size, outgoing.get(distance, ())
            )
            for distance in sorted({0, *steps, *outgoing})
        ]

    def _start(self, one: _Round, worker: Worker) -> _Exchange:
        """Start sending and receiving the keys and values of a round.

        K and V of one message travel as one tensor.
        """
        out = [_packed(*worker.outgoing(message)) for message in one.outgoing]
        messages = () if one.step is None else one.step.messages
        into = [_room(message, worker) for message in messages]
        source = (self.rank - one.distance) % dist.get_world_size(self.group)
        return _Exchange(self.group, out, one.target, into, source)

    def forward(
        self,
        schedule: Schedule,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, rows, Dv) and lse (B, Hq, rows) of this rank's queries."""
        self._check(schedule)
        self.ledger = Ledger()
        worker = Forward(schedule, self.rank, call, q, k, v)
        rounds = self._rounds(schedule)
        in_flight = self._start(rounds[0], worker)
        for i, one in enumerate(rounds):
            received = in_flight.wait()
            if i + 1 < len(rounds):
                in_flight = self._start(rounds[i + 1], worker)
            if one.step is not None:
                pairs = [_unpacked(x, k.shape[3]) for x in received]
                self.ledger.note(pairs, (q, k, v, worker.out, worker.lse))
                worker.compute(one.step, pairs)
        return worker.out, worker.lse

    def backward(
        self,
        schedule: Schedule,
        call: Call,
        saved: Saved,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v."""
        self._check(schedule)
        self.ledger = Ledger()
        worker = Backward(schedule, self.rank, call, saved)
        rounds, size, head_dim = self._rounds(schedule), schedule.layout.ranks, saved.k.shape[3]
        in_flight = self._start(rounds[0], worker)
        for i, one in enumerate(rounds):
            received = in_flight.wait()
            following = rounds[i + 1] if i + 1 < len(rounds) else None
            # If this distance and the next add up to the number of ranks, the next keys and these
            # gradients travel between the same two ranks in the same direction. Both ends then
            # send gradients first, so that messages match.
            crossing = following is not None and one.distance + following.distance == size
            if following is not None and not crossing:
                in_flight = self._start(following, worker)
            grads: list[KeysAndValues] = []
            if one.step is not None:
                pairs = [_unpacked(x, head_dim) for x in received]
                self.ledger.note(pairs, worker.shards)
                grads = worker.compute(one.step, pairs)
            back = [_room(message, worker, worker.grad_k.dtype) for message in one.outgoing]
            source = (self.rank - one.distance) % size
            returning = _Exchange(
                self.group,
                [_packed(*pair) for pair in grads],
                source,
                back,
                one.target,
            )
            if following is not None and crossing:
                in_flight = self._start(following, worker)
            for message, x in zip(one.outgoing, returning.wait(), strict=True):
                worker.add(message, _unpacked(x, head_dim))
        return worker.results

    def __repr__(self) -> str:
        return "distributed"


def _short(value: object) -> str:
    shown = str(value)
    if len(shown) <= 200:
        return shown
    return f"{shown[:200]}..."


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values concatenated into one message."""
    return torch.cat([k, v], dim=3)


def _unpacked(x: Tensor, head_dim: int) -> KeysAndValues:
    return x[..., :head_dim], x[..., head_dim:]


def _room(message: Message, worker: Worker, dtype: torch.dtype | None = None) -> Tensor:
    """Buffer for an incoming message."""
    shape = (
        worker.k.shape[0],
        message.kv_heads.count,
        len(message.rows),
        worker.k.shape[3] + worker.v.shape[3],
    )
    return worker.k.new_empty(shape, dtype=dtype)
