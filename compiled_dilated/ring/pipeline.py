"""The pipeline of a streamed run: read ahead, compute, write behind.

read ahead            rank 2: its rows and its messages
compute               rank 1
write behind          rank 0: its rows, then (once they are on disk) a line of the journal
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from ..calls import Call
from ..heads import HeadRange
from . import files
from .journals import Journal, checksum
from .ledgers import Ledger
from .schedules import Schedule
from .sources import Sink, Source
from .steps import Message, Step
from .workers import Forward, KeysAndValues

# Interval of fsync. After a crash, ranks finished since the last one are computed again.
_SYNC_SECONDS = 2.0


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    ranks, tokens: computed, including those of earlier runs.
    resumed_ranks: finished by earlier runs.
    seconds: since the run began.
    """

    ranks: int
    tokens: int
    resumed_ranks: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """Result of a run.

    tokens, finished: finished tokens and ranks.
    ranks: of the layout.
    resumed_tokens, resumed_ranks: finished by earlier runs.
    torn: ranks of earlier runs whose output was damaged, computed again.
    complete: whether all ranks are finished; False if the time limit was reached before.
    ledger: counts of the ranks that this run computed.
    """

    tokens: int
    ranks: int
    finished: frozenset[int] = field(repr=False)
    resumed_tokens: int
    resumed_ranks: int
    torn: tuple[int, ...]
    seconds: float
    complete: bool
    ledger: Ledger


@dataclass
class _Inputs:
    """Rows and messages of a rank, in memory."""

    rank: int
    shards: tuple[Tensor, Tensor, Tensor]
    steps: list[tuple[Step, list[KeysAndValues]]]

    @property
    def received(self) -> list[Tensor]:
        """All tensors of the messages."""
        tensors: list[Tensor] = []
        for _, pairs in self.steps:
            for pair in pairs:
                tensors += pair
        return tensors


class _Buffers:
    """Buffers of finished ranks, for reuse: fresh pages are slow."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._lock = dtype, Lock()
        # The reader may be one rank late, so that the buffers of two calls of `release` are kept.
        self._free = deque[list[Tensor]](maxlen=2)

    def acquire(self, *shape: int) -> Tensor:
        """An unused buffer of any contents."""
        with self._lock:
            for tensors in self._free:
                for number, tensor in enumerate(tensors):
                    if tensor.shape == shape:
                        return tensors.pop(number)
        return torch.empty(shape, dtype=self.dtype)

    def release(self, tensors: Sequence[Tensor]) -> None:
        """Return buffers to the pool.

        Frees those not reused since the call before the last.
        """
        with self._lock:
            self._free.append(list(tensors))


class Pipeline:
    """One run over all ranks that the journal does not name.

    sources: q, k and v.
    limit_seconds: stop after the rank that is computed at that time; None for no limit.
    on_progress: called after every rank; None for no calls.
    """

    def __init__(
        self,
        schedule: Schedule,
        call: Call,
        sources: Sequence[Source],
        sink: Sink,
        device: torch.device,
        journal: Journal,
        limit_seconds: float | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.schedule, self.layout, self.call = schedule, schedule.layout, call
        self.q, self.k, self.v = sources
        self.sink, self.device, self.journal = sink, device, journal
        self.limit_seconds, self.on_progress = limit_seconds, on_progress
        self.ledger, self.buffers = Ledger(), _Buffers(self.q.dtype)
        self.ranks = self.resumed_ranks = self.tokens = 0
        self.began = self.synced = time.monotonic()

    def run(self) -> Report:
        """Compute all missing ranks, until the time limit."""
        self.journal.begin()
        torn = self.journal.drop_torn(self._is_intact)
        self.ranks = self.resumed_ranks = len(self.journal.done)
        self.tokens = resumed_tokens = sum(self.layout.count(rank) for rank in self.journal.done)
        complete = self._compute_missing()
        return Report(
            tokens=self.tokens,
            ranks=self.layout.ranks,
            finished=frozenset(self.journal.done),
            resumed_tokens=resumed_tokens,
            resumed_ranks=self.resumed_ranks,
            torn=tuple(torn),
            seconds=self._seconds,
            complete=complete,
            ledger=self.ledger,
        )

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _is_intact(self, rank: int, digest: str) -> bool:
        """Whether the stored rows of a rank have this checksum."""
        return checksum(self.sink.held(self._rows(rank))) == digest

    def _missing(self) -> Iterator[int]:
        """Ranks with tokens that no run has finished."""
        for rank in range(self.layout.ranks):
            if rank not in self.journal.done and self.layout.count(rank):
                yield rank

    def _compute_missing(self) -> bool:
        """Compute the missing ranks; False if the time limit stops it."""
        with (
            ThreadPoolExecutor(1, "read ahead") as reader,
            ThreadPoolExecutor(1, "write behind") as writer,
        ):
            writing: Future[Tensor] | None = None
            try:
                for inputs in _ahead(reader, self._read, self._missing()):
                    if self.limit_seconds is not None and self._seconds > self.limit_seconds:
                        return False
                    out = self._compute(inputs)
                    # The output of the rank before must be written before its buffer is reused.
                    unused: list[Tensor] = []
                    if writing is not None:
                        unused.append(writing.result())
                    if self._is_on_cpu:
                        unused += [*inputs.shards, *inputs.received]
                    self.buffers.release(unused)
                    writing = writer.submit(self._write, inputs.rank, out)
                    self._count(inputs.rank)
                return True
            finally:
                # After errors and Ctrl-C too: finished ranks are kept.
                try:
                    if writing is not None:
                        writing.result()
                finally:
                    with self._write_errors("the end of the output"):
                        self._sync()

    def _count(self, rank: int) -> None:
        """Count a rank, and report the progress."""
        self.ranks += 1
        self.tokens += self.layout.count(rank)
        if self.on_progress is not None:
            self.on_progress(Progress(self.ranks, self.tokens, self.resumed_ranks, self._seconds))

    @property
    def _is_on_cpu(self) -> bool:
        """Whether blocks are computed on the CPU, from the buffers themselves."""
        return self.device.type == "cpu"

    def _rows(self, rank: int) -> range:
        """The rows of a rank; layouts of streamed runs are contiguous."""
        return self.layout.runs(rank)[0]

    # Read ahead

    def _read(self, rank: int) -> _Inputs:
        """Read the rows and messages of a rank."""
        rows = self._rows(rank)
        q, k, v = (
            self._read_rows(source, HeadRange(0, 1, source.shape[1]), rows)
            for source in (self.q, self.k, self.v)
        )
        steps = []
        for step in self.schedule.steps(rank):
            steps.append((step, [self._read_message(message) for message in step.messages]))
        return _Inputs(rank, (q, k, v), steps)

    def _read_message(self, message: Message) -> KeysAndValues:
        """Read K and V rows of a message."""
        k, v = (self._read_rows(x, message.kv_heads, message.rows) for x in (self.k, self.v))
        return k, v

    def _read_rows(self, source: Source, heads: HeadRange, rows: range) -> Tensor:
        """Read rows into a buffer, and copy them to the device."""
        buffer = self.buffers.acquire(source.shape[0], heads.count, len(rows), source.shape[3])
        source.read_into(buffer, heads, rows)
        if self._is_on_cpu:
            return buffer
        on_device = buffer.to(self.device)
        self.buffers.release([buffer])
        return on_device

    # Compute

    def _compute(self, inputs: _Inputs) -> Tensor:
        """The output of a rank, on the CPU."""
        q, _, v = inputs.shards
        buffer = self.buffers.acquire(*q.shape[:3], v.shape[3])
        worker_out = buffer if self._is_on_cpu else None
        worker = Forward(self.schedule, inputs.rank, self.call, *inputs.shards, out=worker_out)
        shards = (*inputs.shards, worker.out, worker.lse)
        for step, received in inputs.steps:
            self.ledger.note(received, shards)
            worker.compute(step, received)
        # All messages of a rank are in memory at once.
        held_bytes = sum(x.nbytes for x in (*shards, *inputs.received))
        self.ledger.most_held_bytes = max(self.ledger.most_held_bytes, held_bytes)
        if self._is_on_cpu:
            return buffer
        return buffer.copy_(worker.out)

    # Write behind

    def _write(self, rank: int, out: Tensor) -> Tensor:
        """Store the output of a rank, and return its buffer."""
        with self._write_errors(f"the output of rank {rank}"):
            self.journal.add(rank, checksum(self.sink.write(self._rows(rank), out)))
            if time.monotonic() - self.synced > _SYNC_SECONDS:
                self._sync()
        return out

    def _sync(self) -> None:
        # In this order: the journal names only ranks whose output is on disk.
        self.sink.sync()
        self.journal.sync()
        self.synced = time.monotonic()

    @contextlib.contextmanager
    def _write_errors(self, part: str) -> Iterator[None]:
        """Add the part of the output, and the remedy, to write errors."""
        try:
            yield
        except OSError as error:
            remedy = "make room" if error.errno in files.NO_ROOM else "mend that"
            finished = f"{len(self.journal.done)} of {self.layout.ranks} ranks are finished"
            raise OSError(
                error.errno,
                f"cannot write {part}: {error.strerror}. "
                f"{finished} and kept: {remedy}, and call again with the same journal",
            ) from error


def _ahead(
    reader: ThreadPoolExecutor, read: Callable[[int], _Inputs], ranks: Iterator[int]
) -> Iterator[_Inputs]:
    """Read every rank while the one before it is computed."""
    pending: Future[_Inputs] | None = None
    for rank in ranks:
        following = reader.submit(read, rank)
        if pending is not None:
            yield pending.result()
        pending = following
    if pending is not None:
        yield pending.result()
