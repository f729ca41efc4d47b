"""Streamed attention: rank after rank, from files to a file, resumable.

A rank's rows are written once and never changed, so that a run that was stopped gives the same bits
when it continues, with an equal number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import arguments, call_checks, checks, text
from ..calls import Call
from ..masks.contents import digest, slot_name
from ..plans import Problem, problem_of
from ..programs import PerLength, Program
from . import files, inputs, plans
from .journals import Journal
from .pipeline import Pipeline, Progress, Report
from .schedules import Schedule
from .sources import Sink, Source, sizes

__all__ = ["Progress", "Report", "Streamed"]

PathLike = str | os.PathLike[str]


class Streamed:
    """Attention over sequences larger than memory.

    Created by `compile(program, ranks=..., transport="streamed")`.

    ranks: number of contiguous parts of the sequence. At most one part, its messages and the next
        part are in memory; `plan(program, q_shape, ..., ranks=..., layout="contiguous")` prints how
        much.
    device: where blocks are computed.
    """

    def __init__(
        self, program: Program | PerLength, ranks: int, device: str | torch.device = "cpu"
    ) -> None:
        self.program = program
        self.ranks = arguments.integer("ranks", ranks, 1)
        self.device = inputs.device(device)
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
        """Compute attention of q, k and v into out.

        q, k, v: .npy files or sources; (B, Hq, N, D), (B, Hkv, N, D) and (B, Hkv, N, Dv).
        out: a .npy file or a sink, (B, Hq, N, Dv).
        journal: a file of finished ranks: the same call continues a stopped run, with equal bits.
        limit_seconds: stop after the rank that is computed at that time.
        on_progress: called after every rank.

        Raises TypeError, ValueError or OSError for bad arguments, before any file is written, and
        OSError if the disk is full; finished ranks are kept.
        """
        # 1. Check all arguments, without writing a file.
        call_checks.no_options_of_sdpa(options)
        sources = (inputs.source("q", q), inputs.source("k", k), inputs.source("v", v))
        journal_path = _journal_path(sources, out, journal)
        inputs.check_callback(on_progress)
        limit = None if limit_seconds is None else inputs.seconds("limit_seconds", limit_seconds)
        if scale is not None:
            checks.number("scale", scale)
        # 2. The problem, with the functions of the program as graphs: a changed function changes
        # the text, whatever its name.
        operands: list[Tensor] = []
        rule, problem = self._problem(operands, *sources)
        schedule = self._schedule(problem)
        call = _call(problem, scale, operands)
        inputs.check_usable(self.device)
        # 3. The journal, then the output: the last of the arguments, since this creates the file.
        about = self._about([rule, *map(digest, operands)], problem, call, sources)
        record = Journal(journal_path, about, range(min(self.ranks, problem.q_len)))
        sink = inputs.sink(out, _shape_of_out(problem), sources[0].dtype)
        pipeline = Pipeline(schedule, call, sources, sink, self.device, record, limit, on_progress)
        return pipeline.run()

    def _about(
        self, program: list[str], problem: Problem, call: Call, sources: Sequence[Source]
    ) -> dict[str, Any]:
        """Properties that define a run, for its journal.

        program: the program as text, then digests of its captured tensors.
        """
        return {
            "program": program,
            "ranks": self.ranks,
            "shape": list(_shape_of_out(problem)),
            "scale": call.scale,
            "dtype": problem.dtype,
            "device": problem.device,
            "sources": [repr(source) for source in sources],
        }

    def schedule(self, q: Source, k: Source, v: Source) -> tuple[Schedule, Problem]:
        """Schedule and problem for sources of these shapes."""
        _, problem = self._problem([], q, k, v)
        return self._schedule(problem), problem

    def _schedule(self, problem: Problem) -> Schedule:
        """The schedule over contiguous ranks."""
        layout = plans.layouts_of(problem.program, problem.kv_len, self.ranks, "contiguous")[0]
        return Schedule(problem.program, layout, problem.heads, problem.kv_heads)

    def _problem(
        self, operands: list[Tensor], q: Source, k: Source, v: Source
    ) -> tuple[str, Problem]:
        """The program as text, and the problem.

        operands: a list, to which the captured tensors are appended.
        """
        _, _, tokens, head_dim = q.shape
        checks.dtypes(q.dtype, k.dtype, v.dtype)
        checks.shapes(q.shape, k.shape, v.shape)
        if tokens != k.shape[2]:
            raise ValueError(
                f"a streamed run is over one sequence; got {tokens} queries and {k.shape[2]} keys"
            )
        if not min(head_dim, v.shape[3]):
            raise ValueError(
                "q, k and v must have a head_dim of at least 1; "
                f"got {q.shape}, {k.shape} and {v.shape}"
            )
        program = self.program
        if isinstance(program, PerLength):
            program = program.at(tokens)
        program.check(tokens, tokens)
        rule, program = text.traced(program, operands)
        shapes = q.shape, k.shape, v.shape
        return rule, problem_of(program, *shapes, q.dtype, self.device.type, 0, training=False)

    def __repr__(self) -> str:
        device = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        return f"compile({self.program!r}, ranks={self.ranks}, transport='streamed'{device})"


def _journal_path(
    sources: Sequence[Source], out: PathLike | Sink, journal: PathLike | None
) -> Path | None:
    """The journal's path, after checks that no written file is another argument."""
    if isinstance(out, (str, os.PathLike)):
        output_path: Path | None = files.output_file("out", out)
    else:
        output_path = inputs.sink_path(out)
    path = None
    if journal is not None:
        path = files.output_file("journal", journal)
    inputs.check_distinct(sources, output_path, path)
    return path


def _call(problem: Problem, scale: float | None, operands: Sequence[Tensor]) -> Call:
    """The call of a run; captured tensors are its data."""
    data = {slot_name(slot): operand for slot, operand in enumerate(operands)}
    if scale is None:
        scale = problem.head_dim**-0.5
    return Call(float(scale), data=data)


def _shape_of_out(problem: Problem) -> tuple[int, int, int, int]:
    """(B, Hq, N, Dv)."""
    shape = (problem.batch, problem.heads, problem.q_len, problem.value_dim)
    return sizes("out.shape", shape)
