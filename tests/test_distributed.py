"""Rings of real processes over gloo.

Their results have the bits of the simulated ring; they train, and ranks fail.

The processes run the scenarios of tests/distributed_worker.py.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.forked import Forked

LONGEST_S = 300.0

Start = Callable[..., list[Forked]]

# Arguments: where the ranks meet, and scenarios.
RANK = """
import runpy
runpy.run_module("tests.distributed_worker", run_name="__main__")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ranks by `start(size, *scenarios)`.

    They are killed at the end of the test.
    """
    running: list[Forked] = []

    def begin(size: int, *scenarios: str, hosts: Hosts | None = None) -> list[Forked]:
        url = f"file://{tmp_path / 'store'}" if hosts is None else hosts.url
        for rank in range(size):
            code, variables = RANK, {"RANK": str(rank), "WORLD_SIZE": str(size)}
            if hosts is not None:
                code = hosts.entered(rank) + RANK
                variables["GLOO_SOCKET_IFNAME"] = hosts.interface(rank)
            running.append(Forked(code, url, *scenarios, environment=variables))
        return running

    yield begin
    for process in running:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Hosts:
    """Two hosts of one rank each.

    They are network namespaces, joined by a pair of virtual interfaces.
    """

    name: str
    port: int

    def entered(self, rank: int) -> str:
        """Code that moves its process to a host."""
        opened = f"os.open('/run/netns/{self.name}-{rank}', os.O_RDONLY)"
        return f"import ctypes, os\nassert ctypes.CDLL(None).setns({opened}, 0) == 0\n"

    def interface(self, rank: int) -> str:
        return f"{self.name}e{rank}"

    @property
    def url(self) -> str:
        return f"tcp://10.77.0.1:{self.port}"

    def up(self) -> None:
        _ip(f"link add name {self.interface(0)} type veth peer name {self.interface(1)}")
        for rank in range(2):
            space, interface = f"{self.name}-{rank}", self.interface(rank)
            _ip(f"netns add {space}")
            _ip(f"link set dev {interface} netns {space}")
            _ip(f"-n {space} address add 10.77.0.{rank + 1}/24 dev {interface}")
            _ip(f"-n {space} link set dev {interface} up")
            _ip(f"-n {space} link set dev lo up")

    def down(self) -> None:
        """Delete all that `up` created, also after a part of it failed."""
        # Interfaces are deleted with their namespaces, or were never moved there.
        _ip(f"link delete {self.interface(0)}", check=False)
        for rank in range(2):
            _ip(f"netns delete {self.name}-{rank}", check=False)


def _ip(command: str, check: bool = True) -> None:
    subprocess.run(["ip", *command.split()], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    pair = Hosts(f"cd{os.getpid()}", 29411)
    try:
        pair.up()
    except FileNotFoundError:
        pytest.skip("this machine has no ip command")
    except (OSError, subprocess.CalledProcessError) as error:
        pair.down()
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"this machine makes no network namespaces: {reason}")
    yield pair
    pair.down()


def finish(processes: list[Forked]) -> list[str]:
    """The outputs of the ranks.

    All must exit with 0, together within `LONGEST_S`.
    """
    end = time.monotonic() + LONGEST_S
    outputs = []
    for rank, process in enumerate(processes):
        output, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
        code = process.returncode
        assert code == 0, f"rank {rank} ended with {code}:\n{output[-3000:]}\n{errors[-3000:]}"
        outputs.append(output)
    return outputs


# Several scenarios per start: a group of ranks takes longer to start than most of them.
TRAINING = ("training", "fully_sharded", "learned_operands")


@pytest.mark.parametrize(
    ("size", "scenarios"),
    [
        (2, ("same_bits", "variant", "compiled", *TRAINING)),
        (3, ("same_bits", "refusals", "mistakes")),
        pytest.param(4, ("two_rings",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_real_processes(start: Start, size: int, scenarios: tuple[str, ...]) -> None:
    finish(start(size, *scenarios))


def test_survivors_of_a_killed_rank_get_one_error(start: Start) -> None:
    *survivors, victim = start(3, "killed")
    assert all("broke after" in output for output in finish(survivors))
    assert victim.wait(LONGEST_S) == -signal.SIGKILL


def test_a_stalled_rank_is_an_error_at_the_timeout(start: Start) -> None:
    *running, stalled = start(3, "stalled")
    assert all("broke after" in output for output in finish(running))
    assert stalled.poll() is None


def test_two_hosts_give_the_same_bits(start: Start, hosts: Hosts) -> None:
    finish(start(2, "same_bits", hosts=hosts))


def test_two_hosts_without_a_connection_raise_at_the_timeout(start: Start, hosts: Hosts) -> None:
    outputs = finish(start(2, "unplugged", hosts=hosts))
    assert all("broke after" in output for output in outputs)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(
    fresh_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The training ends with the losses of one process."""
    options = "--standalone --nproc-per-node 2 --max-restarts 1 --monitor-interval 0.2"
    torchrun = ["torch.distributed.run", *options.split()]
    worker = ["tests.distributed_worker", "env://", "restarted"]
    variables = {
        "CHECKPOINT": str(tmp_path / "checkpoint"),
        # Without it new ranks may look for the dead ones (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    run = fresh_python("-m", *torchrun, "-m", *worker, **variables)
    assert run.returncode == 0, run.stderr
    assert (run.stdout + run.stderr).count("goes on after 25 steps") == 2


# In this process


def test_a_ring_without_a_process_group_is_refused() -> None:
    module = cd.variant(
        "DistributedRingAttention", segment_lengths=(8,), dilation_rates=(1,), ring_size=2
    )
    x = torch.randn(1, 8, 2, 4)
    message = r"call torch.distributed.init_process_group\(\) first, in processes started by"
    with pytest.raises(RuntimeError, match=message):
        module(x, x, x)
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)


def test_other_objects_than_meshes_are_refused() -> None:
    message = "mesh must be a DeviceMesh of one dimension or a process group; got int"
    with pytest.raises(TypeError, match=message):
        cd.compile(masks.causal(), mesh=4)  # type: ignore[call-overload]


def test_no_thread_outlives_its_group(
    fresh_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    code = f"""
        from pathlib import Path
        import torch.distributed as dist
        import compiled_dilated
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        import torch._dynamo
        dist.destroy_process_group()
        for task in Path("/proc/self/task").iterdir():
            print((task / "comm").read_text().strip())
    """
    run = fresh_python("-c", textwrap.dedent(code))
    assert run.returncode == 0, run.stderr
    assert "python" in run.stdout
    assert "gloo" not in run.stdout
