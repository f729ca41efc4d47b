"""Rings of real processes over gloo: the bits of the simulated ring, training, and what happens when a rank is wrong or gone.

What the processes do stands in tests/distributed_worker.py.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

    def begin(
        size: int, *scenarios: str, hosts: Hosts | None = None
    ) -> list[subprocess.Popen[str]]:
        where = f"file://{tmp_path / 'meet'}" if hosts is None else hosts.where
        for rank in range(size):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(size)}
            command = [sys.executable, "-m", "tests.distributed_worker", where, *scenarios]
            if hosts is not None:
                command, environment = (
                    hosts.on(rank, command),
                    {**environment, "GLOO_SOCKET_IFNAME": hosts.interface(rank)},
                )
            running.append(popen(command, **environment))
        return running

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def popen(command: list[str], **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@dataclass(frozen=True)
class Hosts:
    """Two hosts of one rank each, joined by a cable: network namespaces and a pair of virtual interfaces."""

    name: str
    port: int

    def on(self, rank: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", f"{self.name}-{rank}", *command]

    def interface(self, rank: int) -> str:
        return f"{self.name}e{rank}"

    @property
    def where(self) -> str:
        return f"tcp://10.77.0.1:{self.port}"

    def up(self) -> None:
        _ip(
            "link",
            "add",
            "name",
            self.interface(0),
            "type",
            "veth",
            "peer",
            "name",
            self.interface(1),
        )
        for rank in range(2):
            space, interface = f"{self.name}-{rank}", self.interface(rank)
            _ip("netns", "add", space)
            _ip("link", "set", "dev", interface, "netns", space)
            _ip("-n", space, "address", "add", f"10.77.0.{rank + 1}/24", "dev", interface)
            _ip("-n", space, "link", "set", "dev", interface, "up")
            _ip("-n", space, "link", "set", "dev", "lo", "up")

    def down(self) -> None:
        # The interfaces go with their namespaces, or were never moved there.
        for command in (
            ("link", "delete", self.interface(0)),
            *(("netns", "delete", f"{self.name}-{rank}") for rank in range(2)),
        ):
            subprocess.run(["ip", *command], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts(f"cd{os.getpid()}", 29411)
    try:
        made.up()
    except (OSError, subprocess.CalledProcessError) as refused:
        made.down()
        pytest.skip(
            f"this machine makes no network namespaces: {getattr(refused, 'stderr', None) or refused}"
        )
    yield made
    made.down()


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What the ranks print; all must end well, together in `LONGEST_S`."""
    end = time.monotonic() + LONGEST_S
    told = [
        process.communicate(timeout=max(0.1, end - time.monotonic()))[0] for process in processes
    ]
    for rank, (process, text) in enumerate(zip(processes, told, strict=True)):
        assert process.returncode == 0, (
            f"rank {rank} ended with {process.returncode}:\n{text[-3000:]}"
        )
    return told


# One start for several scenarios: importing torch takes longer than any of them.
@pytest.mark.parametrize(
    ("size", "scenarios"),
    [
        (
            2,
            (
                "same_bits",
                "variant",
                "compiled",
                "training",
                "fully_sharded",
                "learned_operands",
                "mistakes",
            ),
        ),
        (4, ("same_bits", "two_rings", "training")),
        (3, ("refusals", "learned_operands", "mistakes")),
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


@pytest.mark.parametrize("scenario", ["same_bits", "unplugged"])
def test_two_hosts(start: Start, hosts: Hosts, scenario: str) -> None:
    """Over a network of their own, and when its cable is pulled: then both ranks say so at the timeout."""
    told = finish(start(2, scenario, hosts=hosts))
    assert scenario == "same_bits" or all("broke after" in each for each in told)


def test_torchrun_starts_a_killed_rank_again(tmp_path: Path) -> None:
    """The training ends with the losses of one process, though a rank was killed in the middle of it."""
    torchrun = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 --monitor-interval 0.2"
    command = [
        sys.executable,
        "-m",
        *torchrun.split(),
        "-m",
        "tests.distributed_worker",
        "env://",
        "restarted",
    ]
    # Else the restarted ranks may read where the dead ones were: https://github.com/pytorch/pytorch/issues/135712
    (told,) = finish(
        [
            popen(
                command,
                CHECKPOINT=str(tmp_path / "checkpoint"),
                TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            )
        ]
    )
    assert told.count("goes on after 25 steps") == 2


# In this process alone


def test_a_ring_without_a_process_group_says_so() -> None:
    module = cd.variant(
        "DistributedRingAttention", segment_lengths=(8,), dilation_rates=(1,), ring_size=2
    )
    x = torch.randn(1, 8, 2, 4)
    with pytest.raises(
        RuntimeError,
        match=r"call torch.distributed.init_process_group\(\) first, in processes started by torchrun",
    ):
        module(x, x, x)
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)


def test_a_mesh_must_be_one() -> None:
    with pytest.raises(
        TypeError, match="mesh must be a DeviceMesh of one dimension or a process group; got int"
    ):
        cd.compile(masks.causal(), mesh=4)  # type: ignore[call-overload]


def test_no_thread_outlives_its_group(
    fresh_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    code = f"""
        import os
        import torch.distributed as dist
        import compiled_dilated
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        import torch._dynamo
        dist.destroy_process_group()
        print(*sorted(open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")))
    """
    done = fresh_python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout
    assert "gloo" not in done.stdout
