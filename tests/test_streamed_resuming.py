"""Streamed runs that stop and continue with the same bits.

A limit, a signal or a full disk stops them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.ring.sources import FileSink
from compiled_dilated.ring.streamed import Progress
from tests.conftest import ROOT
from tests.support.streams import LONGNET, inputs_of, output_of, stream, write_files


def test_a_second_call_computes_nothing(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 500)
    stream(paths)
    before = paths["out"].read_bytes()
    report = stream(paths)
    assert (report.complete, report.resumed_ranks, report.ledger.steps) == (True, 8, 0)
    assert paths["out"].read_bytes() == before


def test_a_run_stops_at_its_limit_and_continues(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 500)
    progress: list[Progress] = []
    first = stream(paths, limit_seconds=0.0, on_progress=progress.append)
    assert not first.complete
    assert [step.ranks for step in progress] == list(range(1, len(first.finished) + 1))
    second = stream(paths)
    assert second.complete
    assert second.resumed_ranks == len(first.finished)
    torch.testing.assert_close(output_of(paths), cd.reference(LONGNET, *inputs_of(paths)))


KILLED = """
import sys
from pathlib import Path
import torch
import compiled_dilated as cd
from compiled_dilated.ring import pipeline
pipeline._SYNC_SECONDS = 0.0
home = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))  # kernels cut their sums by the number of threads
run = cd.compile(cd.longnet((64, 128, 256), (1, 2, 4), causal=True), ranks=40, transport="streamed")
run(*(home / f"{name}.npy" for name in ("q", "k", "v", "out")), journal=home / "journal",
    on_progress=lambda progress: print(progress.ranks, flush=True))
"""


@pytest.mark.parametrize(
    "stop", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_killed_anywhere_continues_with_the_same_bits(
    tmp_path: Path, stop: signal.Signals
) -> None:
    paths = write_files(tmp_path, 2000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(torch.get_num_threads())]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 11:
            pass
        process.send_signal(stop)
        process.communicate(timeout=60)
    assert process.returncode != 0
    report = stream(paths, ranks=40)
    assert report.complete
    assert 5 <= report.resumed_ranks < 40
    assert report.torn == ()
    # The bits of an uninterrupted run.
    resumed = output_of(paths)
    for name in ("out", "journal"):
        paths[name].unlink()
    stream(paths, ranks=40)
    assert torch.equal(output_of(paths), resumed)


# Damaged journals and outputs


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_journal_counts_up_to_its_last_intact_line(tmp_path: Path, cut: int) -> None:
    paths = write_files(tmp_path, 500)
    stream(paths)
    before = paths["out"].read_bytes()
    paths["journal"].write_bytes(paths["journal"].read_bytes()[:-cut])
    report = stream(paths)
    assert report.complete
    assert report.resumed_ranks in (6, 7)
    assert paths["out"].read_bytes() == before
    assert stream(paths).ledger.steps == 0


def test_a_damaged_output_is_computed_again(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 500)
    stream(paths)
    before = paths["out"].read_bytes()
    with paths["out"].open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\0" * 50)
    report = stream(paths)
    assert (report.torn, report.resumed_ranks) == ((7,), 7)
    assert paths["out"].read_bytes() == before


# Full disks

FULL = """
import resource, signal, sys
from pathlib import Path
import compiled_dilated as cd
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
home, size = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
run = cd.compile(cd.masks.window(9), ranks=4, transport="streamed")
run(*(home / f"{name}.npy" for name in ("q", "k", "v", "out")), journal=home / "journal")
"""


def test_a_full_disk_is_an_error_before_anything_is_computed(
    tmp_path: Path, fresh_python: Any
) -> None:
    paths = write_files(tmp_path, 2000)
    run = fresh_python("-c", FULL, str(tmp_path), "10000")
    assert run.returncode == 1
    assert f"no room for {paths['out']}, 0.00 GiB: File too large. Make room" in run.stderr
    assert not paths["out"].exists()


def test_a_disk_that_fills_up_keeps_the_finished_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_files(tmp_path, 500)
    write, written = FileSink.write, list[range]()

    def write_three(self: FileSink, rows: range, part: Tensor) -> memoryview:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(rows)
        return write(self, rows, part)

    message = r"cannot write the output of rank 3: No space left.* 3 of 8 ranks are finished"
    with monkeypatch.context() as patch:
        patch.setattr(FileSink, "write", write_three)
        with pytest.raises(OSError, match=message):
            stream(paths)
    report = stream(paths)
    assert (report.complete, report.resumed_ranks) == (True, 3)


# Journals of other runs


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 500)
    stream(paths)
    ranks = r"is of another run: ranks is 8 there and 4 here\. Name another journal, or remove"
    with pytest.raises(ValueError, match=ranks):
        stream(paths, ranks=4)
    np.save(paths["q"], np.load(paths["q"]) + 1)
    with pytest.raises(ValueError, match="is of another run: sources is"):
        stream(paths)


@pytest.mark.parametrize("changed", ["function", "number", "tensor"])
def test_a_journal_of_another_function_of_the_same_name_is_refused(
    tmp_path: Path, changed: str
) -> None:
    paths = write_files(tmp_path, 100)
    reach, table = 5, torch.ones(100, dtype=torch.bool)

    def program() -> masks.Mask:
        if changed == "function" and reach != 5:
            return masks.from_mod(lambda b, h, i, j: (j - i).abs() <= 5, within=masks.window(9))
        return masks.from_mod(
            lambda b, h, i, j: ((i - j).abs() < reach) & table[j], within=masks.window(9)
        )

    stream(paths, program())
    again = stream(paths, program())
    assert again.resumed_ranks == again.ranks
    if changed == "tensor":
        table[50] = False
    else:
        reach = 4
    with pytest.raises(ValueError, match="is of another run: program is"):
        stream(paths, program())


def test_a_journal_describes_its_run(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 100)
    stream(paths)
    header, *lines = [json.loads(line) for line in paths["journal"].read_text().splitlines()]
    assert header["ranks"] == 8
    assert header["program"] == [repr(LONGNET)]
    assert header["shape"] == [2, 4, 100, 6]
    for name, source in zip("qkv", header["sources"], strict=True):
        assert str(paths[name]) in source
    # Each rank with the checksum of its rows in the output.
    plan, out = cd.plan(LONGNET, (2, 4, 100, 8), ranks=8, layout="contiguous"), output_of(paths)
    checksums = {
        rank: f"{zlib.crc32(out[:, :, plan.positions(rank)].numpy().tobytes()):08x}"
        for rank in range(8)
    }
    assert {line["rank"]: line["checksum"] for line in lines} == checksums
    assert len(lines) == 8
