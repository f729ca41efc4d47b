"""Scenarios of real ranks: one dies, stalls or loses its network.

All other ranks get one error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.ring.workers import Forward
from tests.support.rank_inputs import inputs

# Timeout of a group whose rank stalls; and the time, on a busy machine, to any other error.
TIMEOUT_S = 4.0
PROMPT_S = 30.0


def at_remote_steps(group: dist.ProcessGroup, action: Callable[[], object], after: int = 0) -> None:
    """Let the last rank act before each step with another rank's keys.

    after: number of such steps before the first action.
    """
    if group.rank() != group.size() - 1:
        return
    compute, remote_steps = Forward.compute, 0

    def acting(self: Forward, step: Any, *received: Any) -> None:
        nonlocal remote_steps
        if step.source != self.rank:
            remote_steps += 1
            if remote_steps > after:
                action()
        compute(self, step, *received)

    Forward.compute = acting  # type: ignore[assignment, method-assign]


def doomed(group: dist.ProcessGroup, action: Callable[[], object]) -> None:
    """The last rank acts after its own keys.

    All ranks that still run soon get one clear error.
    """
    at_remote_steps(group, action)
    dist.barrier()
    impatient = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    attend = cd.compile(masks.full(), mesh=impatient, layout="contiguous")
    shards = [x.tensor_split(group.size(), dim=2)[group.rank()] for x in inputs(20 * group.size())]

    def calls() -> None:
        # A rank that has sent its keys may be missed only by the next call.
        for _ in range(3):
            attend(*shards)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^the ring broke: .*; start all ranks again") as raised:
        calls()
    elapsed = time.monotonic() - start
    assert "\n" not in str(raised.value)
    assert elapsed < PROMPT_S
    print(f"broke after {elapsed:.1f} s", flush=True)
    os._exit(0)  # a stalled peer would keep the group from closing


def killed(group: dist.ProcessGroup) -> None:
    """The last rank is killed."""
    doomed(group, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stalled(group: dist.ProcessGroup) -> None:
    """The last rank sleeps."""
    doomed(group, lambda: time.sleep(600))


def unplugged(group: dist.ProcessGroup) -> None:
    """The network of the last rank goes down.

    No socket fails, so all ranks wait for the timeout.
    """
    command = ["ip", "link", "set", "dev", os.environ["GLOO_SOCKET_IFNAME"], "down"]
    doomed(group, lambda: subprocess.run(command, check=True))
