"""Streamed attention: ranks run one after the other, from files to a file, resumable.

    read ahead            rank 2: its rows and its messages
    compute               rank 1
    write behind          rank 0: its rows, then (once they are on disk) a line of the journal

A rank's rows are written once and never changed, so that a run that was stopped gives the same bits
when it continues, with an equal number of threads.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .. import arguments, checks, text
from ..calls import Call
from ..heads import HeadRange
from ..masks.functions import digest, slot_name
from ..plans import Problem
from ..programs import PerLength, Program
from . import files, inputs, plans
from .journals import Journal, checksum
from .ledgers import Ledger
from .schedules import Message, Schedule, Step
from .sources import Sink, Source, sizes
from .workers import Forward, KeysAndValues

PathLike = str | os.PathLike[str]
# Interval of fsync. After a crash, ranks finished since the last one are computed again.
_SYNC_SECONDS = 2.0


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    ranks, tokens: finished, including those of earlier runs.
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

    tokens, finished: finished tokens and ranks; resumed_tokens, resumed_ranks: by earlier runs.
    torn: ranks of earlier runs whose output was damaged, computed again.
    complete: whether all ranks are finished, or the time limit was reached.
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


class Streamed:
    """Attention over sequences larger than memory.

    Created by `compile(program, ranks=..., transport="streamed")`.

    ranks: number of contiguous parts of the sequence. Memory holds at most one part, its messages, and
        the next part; `plan(program, q_shape, ..., ranks=..., layout="contiguous")` prints how much.
    device: where blocks are computed.
    """

    def __init__(
        self,
        program: Program | PerLength,
        ranks: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.program, self.ranks, self.device = (
            program,
            arguments.integer("ranks", ranks, 1),
            inputs.device(device),
        )
        if program.names:
            raise ValueError(
                f"a streamed program takes no data tensors; this one reads {list(program.names)}. "
                "Write them into the structure, as documents(lengths=...)"
            )

    def __call__(
        self,
        q: PathLike | Source,
        k: PathLike | Source,
        v: PathLike | Source,
        out: PathLike | Sink,
        *,
        scale: float | None = None,
        journal: PathLike | None = None,
        limit_seconds: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Report:
        """Compute attention of q, k and v into out (B, Hq, N, Dv).

        q, k, v: .npy files or sources; (B, Hq, N, D), (B, Hkv, N, D) and (B, Hkv, N, Dv). out: a
        .npy file or a sink. journal: a file of finished ranks: the same call continues an
        interrupted run, with the same bits. limit_seconds: stop after the rank that is being
        computed at that time. on_progress: called after every rank.

        Raises TypeError, ValueError or OSError with the name of the argument before any file is
        written; also if out or journal is the same file as another argument. Raises OSError if the
        disk is full; finished ranks are kept.
        """
        checks.no_options_of_sdpa(options)
        sources = (inputs.source("q", q), inputs.source("k", k), inputs.source("v", v))
        sink_path = (
            files.output_file("out", out)
            if isinstance(out, (str, os.PathLike))
            else inputs.sink_path(out)
        )
        journal_path = None if journal is None else files.output_file("journal", journal)
        inputs.check_distinct(sources, sink_path, journal_path)
        inputs.check_callback(on_progress)
        limit = None if limit_seconds is None else inputs.seconds("limit_seconds", limit_seconds)
        if scale is not None:
            checks.number("scale", scale)
        # The functions of the program as graphs: another rule is another text, whatever its
        # functions are called.
        operands: list[Tensor] = []
        rule, problem = self._problem(operands, *sources)
        schedule = self._schedule(problem)
        data = {slot_name(slot): operand for slot, operand in enumerate(operands)}
        call = Call(problem.head_dim**-0.5 if scale is None else float(scale), data=data)
        inputs.check_usable(self.device)
        shape = sizes("out.shape", (*sources[0].shape[:3], sources[2].shape[3]))
        about = {"program": [rule, *map(digest, operands)], "ranks": self.ranks, "shape": list(shape), "scale": call.scale,
                 "dtype": problem.dtype, "device": problem.device, "sources": [repr(source) for source in sources]}  # fmt: skip
        record = Journal(journal_path, about, range(min(self.ranks, problem.q_len)))
        # The last of the arguments: it creates the file.
        sink = inputs.sink(out, shape, sources[0].dtype)
        return _Run(schedule, call, sources, sink, self.device, record, limit, on_progress).go()

    def schedule(self, q: Source, k: Source, v: Source) -> tuple[Schedule, Problem]:
        """Schedule and problem for sources of these shapes."""
        _, problem = self._problem([], q, k, v)
        return self._schedule(problem), problem

    def _schedule(self, problem: Problem) -> Schedule:
        layout = plans.layouts_of(problem.program, problem.kv_len, self.ranks, "contiguous")[0]
        return Schedule(problem.program, layout, problem.heads, problem.kv_heads)

    def _problem(
        self,
        operands: list[Tensor],
        q: Source,
        k: Source,
        v: Source,
    ) -> tuple[str, Problem]:
        """The program as text, and the problem; captured tensors are appended to `operands`."""
        batch, heads, tokens, head_dim = q.shape
        checks.dtypes(q.dtype, k.dtype, v.dtype)
        checks.shapes(q.shape, k.shape, v.shape)
        if tokens != k.shape[2]:
            raise ValueError(
                f"a streamed run is over one sequence; got {tokens} queries and {k.shape[2]} keys",
            )
        if not min(head_dim, v.shape[3]):
            raise ValueError(
                f"q, k and v must have a head_dim of at least 1; got {q.shape}, {k.shape} and {v.shape}",
            )
        program = self.program.at(tokens) if isinstance(self.program, PerLength) else self.program
        program.check(tokens, tokens)
        rule, program = text.traced(program, operands)
        dtype = str(q.dtype).removeprefix("torch.")
        problem = Problem(
            program,
            batch,
            heads,
            k.shape[1],
            tokens,
            tokens,
            head_dim,
            v.shape[3],
            dtype,
            self.device.type,
        )
        return rule, problem

    def __repr__(self) -> str:
        device = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        return f"compile({self.program!r}, ranks={self.ranks}, transport='streamed'{device})"


@dataclass
class _Read:
    """Rows and messages of a rank, in memory."""

    rank: int
    shards: tuple[Tensor, Tensor, Tensor]
    steps: list[tuple[Step, list[KeysAndValues]]]

    @property
    def received(self) -> list[Tensor]:
        """All tensors of the messages."""
        return [x for _, pairs in self.steps for pair in pairs for x in pair]


class _Memory:
    """Buffers of finished ranks for the next ones: fresh pages are slow."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._lock = dtype, Lock()
        # The reader may be one rank late, so that two calls of `give` are kept.
        self._free = deque[list[Tensor]](maxlen=2)

    def take(self, *shape: int) -> Tensor:
        """An unused buffer of any contents."""
        with self._lock:
            for tensors in self._free:
                for number, tensor in enumerate(tensors):
                    if tensor.shape == shape:
                        return tensors.pop(number)
        return torch.empty(shape, dtype=self.dtype)

    def give(self, tensors: Sequence[Tensor]) -> None:
        """Return buffers to the pool; frees those not reused since the call before the last."""
        with self._lock:
            self._free.append(list(tensors))


class _Run:
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
        self.schedule, self.layout, self.call, self.sink, self.journal = (
            schedule,
            schedule.layout,
            call,
            sink,
            journal,
        )
        self.q, self.k, self.v = sources
        self.device = device
        self.limit, self.tell = limit_seconds, on_progress
        self.ledger, self.tokens, self.memory = Ledger(), 0, _Memory(self.q.dtype)
        self.began = self.synced = time.monotonic()

    def go(self) -> Report:
        self.journal.begin()
        torn = self.journal.keep(
            lambda rank, digest: checksum(self.sink.held(self._rows(rank))) == digest,
        )
        resumed = len(self.journal.done)
        self.tokens = resumed_tokens = sum(self.layout.count(rank) for rank in self.journal.done)
        todo = (
            rank
            for rank in range(self.layout.ranks)
            if rank not in self.journal.done and self.layout.count(rank)
        )
        complete = True
        with (
            ThreadPoolExecutor(1, "read ahead") as reader,
            ThreadPoolExecutor(1, "write behind") as writer,
        ):
            writing: Future[Tensor] | None = None
            try:
                for read in _ahead(reader, self._read, todo):
                    if self.limit is not None and time.monotonic() - self.began > self.limit:
                        complete = False
                        break
                    out = self._compute(read)
                    done = [] if writing is None else [writing.result()]
                    self.memory.give(
                        done if self._elsewhere else [*done, *read.shards, *read.received],
                    )
                    writing = writer.submit(self._write, read.rank, out)
                    self.tokens += self.layout.count(read.rank)
                    if self.tell is not None:
                        self.tell(
                            Progress(
                                len(self.journal.done) + 1,
                                self.tokens,
                                resumed,
                                time.monotonic() - self.began,
                            ),
                        )
            finally:
                # After Ctrl-C and errors too: what is finished is kept.
                try:
                    if writing is not None:
                        writing.result()
                finally:
                    with self._named_if_it_fails("the end of the output"):
                        self._sync()
        finished, seconds = frozenset(self.journal.done), time.monotonic() - self.began
        return Report(
            self.tokens,
            self.layout.ranks,
            finished,
            resumed_tokens,
            resumed,
            tuple(torn),
            seconds,
            complete,
            self.ledger,
        )

    @property
    def _elsewhere(self) -> bool:
        """Whether blocks are computed on a device other than the CPU."""
        return self.device.type != "cpu"

    def _rows(self, rank: int) -> range:
        return self.layout.runs(rank)[0]

    def _read(self, rank: int) -> _Read:
        rows = self._rows(rank)
        shards = tuple(
            self._rows_of(source, HeadRange(0, 1, source.shape[1]), rows)
            for source in (self.q, self.k, self.v)
        )
        steps = [
            (step, [self._message(message) for message in step.messages])
            for step in self.schedule.steps(rank)
        ]
        return _Read(rank, (shards[0], shards[1], shards[2]), steps)

    def _message(self, message: Message) -> KeysAndValues:
        return self._rows_of(
            self.k,
            message.kv_heads,
            message.rows,
        ), self._rows_of(self.v, message.kv_heads, message.rows)

    def _rows_of(self, source: Source, heads: HeadRange, rows: range) -> Tensor:
        memory = self.memory.take(source.shape[0], heads.count, len(rows), source.shape[3])
        source.read_into(memory, heads, rows)
        if not self._elsewhere:
            return memory
        on_device = memory.to(self.device)
        self.memory.give([memory])
        return on_device

    def _compute(self, read: _Read) -> Tensor:
        q, _, v = read.shards
        memory = self.memory.take(*q.shape[:3], v.shape[3])
        worker = Forward(
            self.schedule,
            read.rank,
            self.call,
            *read.shards,
            out=None if self._elsewhere else memory,
        )
        held = (*read.shards, worker.out, worker.lse)
        for step, received in read.steps:
            self.ledger.note(received, held)
            worker.compute(step, received)
        whole = sum(x.nbytes for x in (*held, *read.received))
        self.ledger.most_held_bytes = max(self.ledger.most_held_bytes, whole)
        if self._elsewhere:
            return memory.copy_(worker.out)
        return memory

    def _write(self, rank: int, out: Tensor) -> Tensor:
        with self._named_if_it_fails(f"the output of rank {rank}"):
            self.journal.add(rank, checksum(self.sink.write(self._rows(rank), out)))
            if time.monotonic() - self.synced > _SYNC_SECONDS:
                self._sync()
        return out

    @contextlib.contextmanager
    def _named_if_it_fails(self, part: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = (
                "make room, and call again"
                if error.errno in files.NO_ROOM
                else "mend that, and call again"
            )
            raise OSError(
                error.errno,
                f"cannot write {part}: {error.strerror}. {len(self.journal.done)} of {self.layout.ranks} ranks are finished "
                f"and kept: {remedy} with the same journal",
            ) from error

    def _sync(self) -> None:
        self.sink.sync()
        self.journal.sync()
        self.synced = time.monotonic()


def _ahead(
    reader: ThreadPoolExecutor,
    read: Callable[[int], _Read],
    ranks: Iterator[int],
) -> Iterator[_Read]:
    """Read every rank while the one before it is computed."""
    coming: Future[_Read] | None = None
    for rank in ranks:
        following = reader.submit(read, rank)
        if coming is not None:
            yield coming.result()
        coming = following
    if coming is not None:
        yield coming.result()
