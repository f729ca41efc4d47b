"""Rings of real processes over gloo: the bits of the simulated ring, training, and what happens when a rank is wrong or gone.

What the processes do stands in tests/distributed_worker.py.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from tests.conftest import ROOT

LONGEST_S = 300.0

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(size, *scenarios)` starts the ranks; whatever is left of them at the end of the test is killed."""
    running: list[subprocess.Popen[str]] = []

    def begin(size: int, *scenarios: str) -> list[subprocess.Popen[str]]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        for rank in range(size):
            command = [sys.executable, "-m", "tests.distributed_worker", str(rank), str(size), str(tmp_path / "meet"), *scenarios]
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        return running

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What the ranks print; all must end well, together in `LONGEST_S`."""
    end = time.monotonic() + LONGEST_S
    told = [process.communicate(timeout=max(0.1, end - time.monotonic()))[0] for process in processes]
    for rank, (process, text) in enumerate(zip(processes, told, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{text[-3000:]}"
    return told


# One start for several scenarios: importing torch takes longer than any of them.
@pytest.mark.parametrize(
    ("size", "scenarios"),
    [
        (2, ("same_bits", "variant", "compiled", "training", "fully_sharded")),
        (4, ("same_bits", "two_rings", "training")),
        (3, ("refusals",)),
    ],
    ids=str,
)
def test_real_processes(start: Start, size: int, scenarios: tuple[str, ...]) -> None:
    finish(start(size, *scenarios))


def test_survivors_of_a_killed_rank_get_one_error(start: Start) -> None:
    *survivors, victim = start(3, "killed")
    assert all("broke after" in told for told in finish(survivors))
    assert victim.wait(LONGEST_S) == -signal.SIGKILL


def test_a_rank_that_stands_still_is_noticed_at_the_timeout(start: Start) -> None:
    *others, still = start(3, "stalled")
    assert all("broke after" in told for told in finish(others))
    assert still.poll() is None


# In this process alone


def test_a_ring_without_a_process_group_says_so() -> None:
    module = cd.variant("DistributedRingAttention", segment_lengths=(8,), dilation_rates=(1,), ring_size=2)
    x = torch.randn(1, 8, 2, 4)
    with pytest.raises(
        RuntimeError, match=r"call torch.distributed.init_process_group\(\) first, in processes started by torchrun"
    ):
        module(x, x, x)
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)


def test_a_mesh_must_be_one() -> None:
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh of one dimension or a process group; got int"):
        cd.compile(masks.causal(), mesh=4)  # type: ignore[call-overload]
