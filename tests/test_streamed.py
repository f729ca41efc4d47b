"""Streamed runs: the reference's numbers, and the memory of a rank."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.heads import HeadRange
from compiled_dilated.masks import Mask
from compiled_dilated.ring import pipeline
from compiled_dilated.ring.sources import GeneratedSource, SampleSink
from compiled_dilated.ring.streamed import Progress
from tests.support.streams import LONGNET, inputs_of, output_of, stream, write_files

PROGRAMS: dict[str, Program | Mask] = {
    "longnet": LONGNET,
    "window or sinks": masks.causal() & (masks.window(50) | masks.sinks(3)),
    "global tokens": masks.window(9) | masks.global_tokens(4),
    "documents": masks.documents(lengths=(100, 3, 500, 200)) & masks.causal(),
    "causal": masks.causal(),
}


@pytest.mark.parametrize("tokens", [1, 331, 1000])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_gives_the_reference(tmp_path: Path, name: str, tokens: int) -> None:
    paths = write_files(tmp_path, tokens)
    report = stream(paths, PROGRAMS[name])
    assert (report.complete, report.tokens) == (True, tokens)
    expected = cd.reference(PROGRAMS[name], *inputs_of(paths))
    torch.testing.assert_close(output_of(paths), expected, rtol=1e-10, atol=1e-10)


def test_float16_and_scale(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 300, np.float16)
    stream(paths, scale=0.5)
    inputs = inputs_of(paths)
    exact = cd.reference(LONGNET, *inputs, scale=0.5)
    assert isinstance(exact, Tensor)
    one_device = cd.compile(LONGNET)(*inputs, scale=0.5).double()
    assert output_of(paths).dtype == torch.float16
    # Ranks merge more often than one device: twice its error, and one rounding.
    allowed = 2 * (one_device - exact).abs().max() + torch.finfo(torch.float16).eps
    assert (output_of(paths).double() - exact).abs().max() <= allowed


def test_a_run_with_a_function_that_captures_a_tensor(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 100)
    reach = torch.tensor(7)
    program = masks.from_mod(lambda b, h, i, j: (i - j).abs() < reach, within=masks.window(9))
    stream(paths, program)
    expected = cd.reference(program, *inputs_of(paths))
    torch.testing.assert_close(output_of(paths), expected, rtol=1e-10, atol=1e-10)


# Progress and memory


class InstantWriter(ThreadPoolExecutor):
    """An executor whose tasks are done before `submit` returns."""

    def submit(self, *arguments: Any, **options: Any) -> Future[Any]:
        future = super().submit(*arguments, **options)
        wait([future])
        return future


@pytest.mark.parametrize("executor", [ThreadPoolExecutor, InstantWriter])
def test_progress_counts_ranks_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: type[ThreadPoolExecutor]
) -> None:
    """However soon the rows of a rank are written."""
    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", executor)
    progress: list[Progress] = []
    stream(write_files(tmp_path, 500), on_progress=progress.append)
    assert [(step.ranks, step.resumed_ranks) for step in progress] == [(n, 0) for n in range(1, 9)]
    assert progress[-1].tokens == 500


def test_memory_of_a_rank_does_not_grow_with_the_sequence(tmp_path: Path) -> None:
    reports = []
    program = cd.longnet((256, 1024), (1, 2))
    for ranks in (8, 64):
        shape = (1, 1, 512 * ranks, 8)
        q, k, v = (GeneratedSource(shape, 0, stream) for stream in range(3))
        sink = SampleSink(tmp_path / f"{ranks}.npy", shape, [0], torch.float32)
        run = cd.compile(program, ranks=ranks, transport="streamed")
        reports.append(run(q, k, v, sink))
    short, long = reports
    assert short.ledger.most_held_bytes == long.ledger.most_held_bytes
    assert long.ledger.steps == 8 * short.ledger.steps


@pytest.mark.parametrize("slow_reads", [False, True])
def test_buffers_are_reused(tmp_path: Path, slow_reads: bool) -> None:
    """Ranks in reading, computation and writing have three sets of buffers.

    They share no memory, and need no more.
    """
    shape = (1, 2, 256 * 16, 8)
    inputs = [torch.randn(shape) for _ in range(3)]
    buffers: dict[int, Tensor] = {}  # references, so that the allocator reuses no address
    reads: list[range] = []

    class Source:
        dtype = torch.float32

        def __init__(self, x: Tensor) -> None:
            self.x, self.shape = x, shape

        def read_into(self, out: Tensor, heads: HeadRange, rows: range) -> None:
            if slow_reads and len(reads) % 7 == 0:
                time.sleep(0.02)
            reads.append(rows)
            buffers[out.data_ptr()] = out
            out.copy_(heads.of(self.x)[:, :, rows.start : rows.stop : rows.step])

    out = tmp_path / "out.npy"
    q, k, v = map(Source, inputs)
    cd.compile(LONGNET, ranks=16, transport="streamed")(q, k, v, out)
    assert len(reads) == 48
    assert len(buffers) <= 12  # q, k, v and out, three times
    expected = cd.compile(LONGNET)(*inputs)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected, rtol=1e-5, atol=1e-5)


# Settings of compile


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "ranks must be at least 1"),
        ({"ranks": 4, "layout": "zigzag"}, "a streamed ring is contiguous"),
        ({"ranks": 4, "lowering": "dense"}, "a streamed ring .* lowers each block as it is best"),
        ({}, "transport='streamed' needs ranks"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cd.compile(LONGNET, transport="streamed", **settings)


def test_a_device_is_for_streams_only() -> None:
    with pytest.raises(ValueError, match=r"device='cpu' is for transport='streamed'"):
        cd.compile(LONGNET, device="cpu")  # type: ignore[call-overload]
    run = cd.compile(masks.causal(), ranks=2, transport="streamed", device="meta")
    assert repr(run).endswith("device='meta')")


def test_data_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes no data tensors; this one reads \['ids'\]"):
        cd.compile(masks.documents(ids="ids"), ranks=2, transport="streamed")
