"""Streamed attention: ranks run one after the other, from files to a file, resumable.

A rank's rows are written once and never changed, so that a run that was stopped gives the same bits
when it continues, with an equal number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import arguments, call_checks, checks, text
from ..calls import Call
from ..masks.functions import digest, slot_name
from ..plans import Problem
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

    ranks: number of contiguous parts of the sequence. Memory holds at most one part, its messages,
        and the next part; `plan(program, q_shape, ..., ranks=..., layout="contiguous")` prints how
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
        """Compute attention of q, k and v into out (B, Hq, N, Dv).

        q, k, v: .npy files or sources; (B, Hq, N, D), (B, Hkv, N, D) and (B, Hkv, N, Dv).
        out: a .npy file or a sink.
        journal: a file of finished ranks: the same call continues an interrupted run, with the same
            bits.
        limit_seconds: stop after the rank that is computed at that time.
        on_progress: called after every rank.

        Raises TypeError, ValueError or OSError with the name of the argument before any file is
        written; also if out or journal is the same file as another argument. Raises OSError if the
        disk is full; finished ranks are kept.
        """
        # 1. Check all arguments, without writing a file.
        call_checks.no_options_of_sdpa(options)
        sources = (inputs.source("q", q), inputs.source("k", k), inputs.source("v", v))
        output_path = _path_of(out)
        journal_path = None if journal is None else files.output_file("journal", journal)
        inputs.check_distinct(sources, output_path, journal_path)
        inputs.check_callback(on_progress)
        limit = None if limit_seconds is None else inputs.seconds("limit_seconds", limit_seconds)
        if scale is not None:
            checks.number("scale", scale)
        # 2. The problem, with the functions of the program as graphs: a changed function changes
        # the text, whatever its name.
        operands: list[Tensor] = []
        rule, problem = self._problem(operands, *sources)
        schedule = self._schedule(problem)
        data = {slot_name(slot): operand for slot, operand in enumerate(operands)}
        call = Call(problem.head_dim**-0.5 if scale is None else float(scale), data=data)
        inputs.check_usable(self.device)
        # 3. The journal, then the output: the last of the arguments, since this creates the file.
        shape = sizes("out.shape", (*sources[0].shape[:3], sources[2].shape[3]))
        about = {
            "program": [rule, *map(digest, operands)],
            "ranks": self.ranks,
            "shape": list(shape),
            "scale": call.scale,
            "dtype": problem.dtype,
            "device": problem.device,
            "sources": [repr(source) for source in sources],
        }
        record = Journal(journal_path, about, range(min(self.ranks, problem.q_len)))
        sink = inputs.sink(out, shape, sources[0].dtype)
        return Pipeline(
            schedule, call, sources, sink, self.device, record, limit, on_progress
        ).run()

    def schedule(self, q: Source, k: Source, v: Source) -> tuple[Schedule, Problem]:
        """Schedule and problem for sources of these shapes."""
        _, problem = self._problem([], q, k, v)
        return self._schedule(problem), problem

    def _schedule(self, problem: Problem) -> Schedule:
        layout = plans.layouts_of(problem.program, problem.kv_len, self.ranks, "contiguous")[0]
        return Schedule(problem.program, layout, problem.heads, problem.kv_heads)

    def _problem(
        self, operands: list[Tensor], q: Source, k: Source, v: Source
    ) -> tuple[str, Problem]:
        """The program as text, and the problem; captured tensors are appended to `operands`."""
        batch, heads, tokens, head_dim = q.shape
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
        program = self.program.at(tokens) if isinstance(self.program, PerLength) else self.program
        program.check(tokens, tokens)
        rule, program = text.traced(program, operands)
        problem = Problem(
            program, batch, heads, k.shape[1], tokens, tokens, head_dim, v.shape[3],
            str(q.dtype).removeprefix("torch."), self.device.type,
        )  # fmt: skip
        return rule, problem

    def __repr__(self) -> str:
        device = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        return f"compile({self.program!r}, ranks={self.ranks}, transport='streamed'{device})"


def _path_of(out: Any) -> Path | None:
    """The path of the output's file; None if only the sink knows it."""
    if isinstance(out, (str, os.PathLike)):
        return files.output_file("out", out)
    return inputs.sink_path(out)
