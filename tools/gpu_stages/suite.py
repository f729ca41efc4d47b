"""Stage suite: tests/test_gpu.py in processes, each outcome recorded as it comes.

Also a plugin of pytest (`-p gpu_stages.suite`), which records outcomes and stops a test that takes
longer than a minute.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from .records import Records
from .stage import Stage, check

ROOT = Path(__file__).resolve().parents[2]
NAME = "suite"
_FILE, _TINY = "GPU_CHECK_FILE", "GPU_CHECK_TINY"
_SECONDS = 60
_MOST_PROCESSES = 14
# What the emulation runs of it, in minutes.
_TINY_TESTS = "(causal-lanes and bfloat16) or nothing or narrow"


def run(stage: Stage) -> None:
    """Run pytest over the tests that need a GPU.

    Its own exit code is a case too.
    """
    stage.case("pytest", lambda: _pytest(stage))


def _pytest(stage: Stage) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    # The plugins, that of the emulation first: it pretends the GPU before torch looks for one.
    if stage.tiny:
        command += ["-p", "emulation.project"]
    command += ["-p", "gpu_stages.suite", "tests/test_gpu.py"]
    processes = min(_MOST_PROCESSES, max(1, (os.cpu_count() or 1) - 2))
    if importlib.util.find_spec("xdist") and not stage.tiny:
        command += ["-n", str(processes), "--dist", "worksteal"]
    if stage.tiny:
        command += ["-k", _TINY_TESTS]
    settings = os.environ | {_FILE: str(stage.records.path), _TINY: "1" if stage.tiny else ""}
    exit_code = subprocess.run(command, cwd=ROOT, env=settings).returncode
    check(exit_code == 0, f"pytest ended with {exit_code}; its failures are cases of their own")
    return {}


# The plugin -------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that an earlier run has finished.

    Tests of bfloat16 come first: float32 compiles longer.
    """
    done = Records(Path(os.environ[_FILE])).outcomes(NAME)
    left = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = sorted(left, key=lambda item: "float32" in item.nodeid)
    if os.environ[_TINY]:
        # The emulation's tensors are on the CPU.
        for module in {item.getparent(pytest.Module) for item in items}:
            module.obj.DEVICE = "cpu"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Stop a test after a minute, as far as Python can."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid} took longer than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(0 if os.environ[_TINY] else _SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a test's outcome.

    A skipped test has failed, since there is a GPU.
    """
    # Processes of xdist send their reports to the first one, which alone writes.
    if "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    result: dict[str, Any] = {"ok": report.passed, "seconds": round(report.duration, 2)}
    if not report.passed:
        lines = str(report.longrepr).strip().splitlines() or [report.outcome]
        result |= {"error": lines[-1][:300], "traceback": "\n".join(lines[-30:])}
    records = Records(Path(os.environ[_FILE]))
    records.append("outcome", stage=NAME, case=report.nodeid, **result)
