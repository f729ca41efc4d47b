"""`compiled-dilated ring`: what it prints, what it refuses, its exit codes."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import compiled_dilated as cd
from compiled_dilated.cli import app
from compiled_dilated.commands.ring import processes
from compiled_dilated.ring.sources import SampleSink

LONGNET = "longnet((64, 128), (1, 2), causal=True)"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ring", *map(str, arguments)])


def printed_json(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.stdout))


def unwrapped(text: str) -> str:
    """A message on one line, without its frame."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("command", ["plan", "simulate", "stream", "launch", "billion"])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"ring {command} [OPTIONS]" in result.stdout


def test_plan() -> None:
    result = run("plan", LONGNET, "--shape", "1,4,4096,32", "--ranks", 8)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["program", "problem", "chosen", "ranks"]
    record = printed_json(run("plan", LONGNET, "--shape", "1,4,4096,32", "--ranks", 8, "--json"))
    chosen = [row["layout"] for row in record["layouts"] if row["chosen"]]
    assert chosen == [record["layout"]]
    assert {"contiguous", "striped", "residue 2"} < {row["layout"] for row in record["layouts"]}
    # 512 tokens a rank are four segments of 128: nothing has to be received.
    contiguous = next(row for row in record["layouts"] if row["layout"] == "contiguous")
    assert (contiguous["received_mib_max"], contiguous["steps_max"]) == (0, 1)


def test_simulate() -> None:
    command = ("simulate", "causal() & window(100)", "--shape", "1,2,1000,16", "--ranks", 4)
    result = run(*command, "--layout", "contiguous", "--json")
    assert result.exit_code == 0
    record = printed_json(result)
    assert (record["steps"], record["messages"]) == (7, 3)
    assert record["received_bytes"] == 3 * 100 * 2 * 2 * 16 * 4
    assert record["ok"]
    text = run(*command)
    assert "7 steps executed (a plain ring takes 16)" in text.stdout
    assert "the same as one device" in text.stdout


def test_stream(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.npy" for name in ("q", "k", "v", "out")]
    for path in paths[:3]:
        np.save(path, random.standard_normal((1, 2, 700, 8)))
    stopped = run("stream", LONGNET, *paths, "--ranks", 6, "--limit-seconds", 0, "--json")
    assert stopped.exit_code == 1
    assert not printed_json(stopped)["complete"]
    result = run("stream", LONGNET, *paths, "--ranks", 6)
    assert result.exit_code == 0
    assert "700 tokens" in result.stdout
    q, k, v = (torch.from_numpy(np.load(path)) for path in paths[:3])
    expected = cd.reference(cd.longnet((64, 128), (1, 2), causal=True), q, k, v)
    assert isinstance(expected, torch.Tensor)
    np.testing.assert_allclose(np.load(paths[3]), expected.numpy(), rtol=1e-10, atol=1e-10)


def test_stream_refuses_the_journal_of_another_run(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.npy" for name in ("q", "k", "v", "out")]
    for path in paths[:3]:
        np.save(path, np.zeros((1, 2, 64, 8)))
    assert run("stream", "causal()", *paths, "--ranks", 6).exit_code == 0
    result = run("stream", "causal()", *paths, "--ranks", 5)
    assert result.exit_code == 2
    error = unwrapped(result.stderr)
    assert "is of another run: ranks is 6 there and 5 here. Name another --journal" in error
    assert "out.npy.journal to start again" in error


def test_stream_refuses_an_output_that_is_an_input(tmp_path: Path) -> None:
    path = tmp_path / "q.npy"
    np.save(path, np.zeros((1, 2, 16, 4)))
    before = path.read_bytes()
    result = run("stream", "causal()", path, path, path, path)
    assert result.exit_code == 2
    message = "are one file, which the run would overwrite. Pass another path as out"
    assert message in unwrapped(result.stderr)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["q.npy"]


def test_stream_refuses_bad_input_as_bad_usage(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.npy" for name in ("q", "k", "v", "out")]
    for path, dtype in zip(paths, ("f8", "f4", "f8"), strict=False):
        np.save(path, np.zeros((1, 2, 16, 4), dtype))
    result = run("stream", "causal()", *paths)
    assert result.exit_code == 2
    assert "q, k and v must have one dtype" in unwrapped(result.stderr)
    paths[0].write_bytes(b"")
    result = run("stream", "causal()", *paths)
    assert result.exit_code == 2
    assert "is no .npy file: it is empty" in unwrapped(result.stderr)
    assert not paths[3].exists()


def test_billion_names_its_directory_where_another_run_left_files(tmp_path: Path) -> None:
    settings = ("billion", "--tokens", 5_000, "--directory", tmp_path)
    assert run(*settings, "--ranks", 3, "--rows", 20).exit_code == 0
    result = run(*settings, "--ranks", 4, "--rows", 20)
    assert result.exit_code == 2
    error = unwrapped(result.stderr)
    assert "is of another run: ranks is 3 there and 4 here. Name another --directory" in error
    assert "journal to start again" in error
    result = run(*settings, "--ranks", 3, "--rows", 21)
    assert result.exit_code == 2
    message = "Choose another file, or remove this one; or name another --directory"
    assert message in unwrapped(result.stderr)


def test_billion_computes_what_it_counts(tmp_path: Path) -> None:
    sizes = ("--tokens", 20_000, "--ranks", 10, "--dim", 8, "--rows", 50)
    settings = (*sizes, "--directory", tmp_path / "billion")
    result = run("billion", *settings, "--json")
    assert result.exit_code == 0
    record = printed_json(result)
    assert record["tokens_done"] == record["tokens_computed_now"] == 20_000
    assert record["rows_checked"] == 50
    assert record["steps"] > 10
    assert record["most_error"] < 1e-6
    # The same command continues: all is done.
    again = run("billion", *settings)
    assert again.exit_code == 0
    text = "20,000 of 20,000 tokens done, 0 of them now: 0 steps of 10 ranks executed"
    assert text in again.stdout
    assert "50 random rows differ from float64 by" in again.stdout


def test_billion_stops_in_time(tmp_path: Path) -> None:
    result = run(
        "billion", "--tokens", 50_000, "--ranks", 50, "--directory", tmp_path, "--limit-seconds", 0
    )
    assert result.exit_code == 1
    assert "the time was up; the same command goes on" in result.stdout


def test_billion_computes_a_changed_row_again(tmp_path: Path) -> None:
    settings = ("--tokens", 5_000, "--ranks", 3, "--rows", 20, "--directory", tmp_path)
    assert run("billion", *settings).exit_code == 0
    rows = np.load(tmp_path / "rows.npy")
    rows[0, 0, 3] += 1
    np.save(tmp_path / "rows.npy", rows)
    result = run("billion", *settings, "--json")
    # The row's digest differs from the journal's: its rank is computed again.
    assert result.exit_code == 0
    assert printed_json(result)["tokens_computed_now"] > 0


def test_billion_finds_a_wrong_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is computed wrong, whose digest is right."""
    settings = ("--tokens", 5_000, "--ranks", 3, "--rows", 20, "--directory", tmp_path)
    write = SampleSink.write

    def write_wrong(sink: SampleSink, rows: range, part: Tensor) -> bytes | memoryview:
        row = int(sink.samples[7])
        if row in rows:
            part[0, 0, rows.index(row), 3] += 1e-4
        return write(sink, rows, part)

    monkeypatch.setattr(SampleSink, "write", write_wrong)
    result = run("billion", *settings, "--json")
    assert result.exit_code == 1
    record = printed_json(result)
    assert (record["complete"], record["rows_checked"], record["ok"]) == (True, 20, False)
    assert record["most_error"] == pytest.approx(1e-4, rel=0.05)
    text = run("billion", *settings)
    assert text.exit_code == 1
    assert "20 random rows differ from float64 by 1.0e-04 at most" in text.stdout


@pytest.mark.parametrize("wrong", [math.nan, math.inf], ids=["nan", "inf"])
def test_billion_finds_a_row_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    settings = ("--tokens", 5_000, "--ranks", 3, "--rows", 20, "--directory", tmp_path)
    read = SampleSink.read

    def read_wrong(sink: SampleSink) -> Tensor:
        rows = read(sink).clone()
        # Neither the first row nor the last.
        rows[0, 0, 7, 3] = wrong
        return rows

    monkeypatch.setattr(SampleSink, "read", read_wrong)
    result = run("billion", *settings, "--json")
    assert result.exit_code == 1
    record = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (record["complete"], record["rows_checked"], record["ok"]) == (True, 20, False)
    assert record["most_error"] is None
    text = run("billion", *settings)
    assert text.exit_code == 1
    assert "20 random rows differ from float64 by NaN or infinity" in text.stdout


def test_simulate_prints_a_nan_as_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * math.nan

    monkeypatch.setattr(cd.Attend, "__call__", lambda attend, *inputs: nan_of(*inputs))
    command = ("simulate", "causal()", "--shape", "1,2,100,16", "--ranks", 2)
    result = run(*command, "--json")
    assert result.exit_code == 1
    record = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (record["most_difference"], record["ok"]) == (None, False)
    assert "one device: they differ by NaN or infinity" in run(*command).stdout


@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_a_limit_of_time_is_a_number(tmp_path: Path, seconds: str) -> None:
    paths = [tmp_path / f"{name}.npy" for name in ("q", "k", "v", "out")]
    for path in paths[:3]:
        np.save(path, np.zeros((1, 2, 16, 4)))
    assert run("stream", "causal()", *paths, "--limit-seconds", seconds).exit_code == 2
    settings = ("--tokens", 5_000, "--directory", tmp_path / "billion")
    assert run("billion", *settings, "--limit-seconds", seconds).exit_code == 2


def test_launch(capfd: pytest.CaptureFixture[str]) -> None:
    """The processes write to this one's stdout."""
    command = ("launch", LONGNET, "--shape", "1,4,301,16", "--kv-heads", 2, "--ranks", 2)
    assert run(*command, "--json").exit_code == 0
    record = json.loads(capfd.readouterr().out)
    assert record["ok"]
    assert [row["rank"] for row in record["ranks"]] == [0, 1]
    assert sum(row["tokens"] for row in record["ranks"]) == 301
    assert all(row["same_bits"] for row in record["ranks"])


def test_ctrl_c_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, wait, ends = str(tmp_path / "pipe"), subprocess.Popen.wait, dict[int, int]()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    # The grandchild is in a session of its own, as torchrun's ranks are.
    script = (
        "import os, signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}')\n"
        "child.wait()\n"
    )

    def interrupted(process: Any, timeout: float | None = None) -> int:
        """Ctrl-C once the grandchild runs; a signal would reach this run of pytest as a whole."""
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        assert is_ready(reader)
        for pid in map(int, os.read(reader, 99).split()):
            ends[pid] = os.pidfd_open(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.run([sys.executable, "-c", script, pipe], os.environ)
    parent, child = ends
    assert not psutil.pid_exists(parent)
    # It dies at once, but perhaps after `run` has returned.
    assert is_ready(ends[child])
    for descriptor in (reader, *ends.values()):
        os.close(descriptor)


def is_ready(descriptor: int) -> bool:
    """Wait for data of a pipe, or for the end of a process; False after 30 seconds."""
    ready, _, _ = select.select([descriptor], [], [], 30)
    return bool(ready)


def test_an_interrupted_launch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "run", interrupted)
    result = run("launch", LONGNET, "--shape", "1,4,301,16")
    assert result.exit_code == 130
    assert result.stderr.endswith("stopped\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "longnet(", "--ranks", 2), "was never closed"),
        (("plan", "causal()", "--layout", "residue"), "layout 'residue' needs a dilated program"),
        (("plan", "causal()", "--dtype", "int8"), "'int8' is not one of 'float32'"),
        (("simulate", "causal()", "--layout", "round"), "layout must be one of 'auto'"),
        (("simulate", "causal()", "--shape", "1,2,3"), "q_shape must be (batch, heads, tokens"),
        (("launch", "causal()", "--shape", "1,3,64,8", "--kv-heads", 2), "of the 2 key heads"),
        (("launch", "causal()", "--dtype", "half"), "'half' is not one of 'float32'"),
        (("billion", "--program", "documents(ids='x')"), "takes no data tensors"),
        (("plan", "causal()", "--ranks", 0), "Invalid value for '--ranks'"),
    ],
)
def test_bad_usage(arguments: tuple[object, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
