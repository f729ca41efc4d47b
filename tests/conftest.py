"""What every test file shares: two threads, repeatable numbers, GPU tests only where there is a GPU, fresh interpreters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when torch's compiler is first used: the few kernels of a test compile faster here than in a pool that has to start.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# pytest puts tests/ on sys.path. tests/passes/ must have no __init__.py, or it would be imported as the package passes.

# The same examples in every run, so that a red test is red for everybody; `--hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("search", deadline=None, derandomize=False, max_examples=2000)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A background job of a shell ignores Ctrl-C, and the processes that tests interrupt would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, 2 // processes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False")
                )


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random inputs whichever tests run before."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fresh_python("-c", code)` or `fresh_python("file.py", ...)` runs in a new interpreter that can import the project.

    Keyword arguments are environment variables. Returns what came of it: `.stdout`, `.stderr`, `.returncode`.
    """

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Dynamo without graphs of earlier tests; to exceed its limit of graphs is an error.

    Beyond the limit Dynamo would silently run eagerly.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The native functions of tapes over tensors (tests/support/tape.py), compiled once."""
    from tests.support.tape import build_driver

    return build_driver(tmp_path_factory.mktemp("tape"))
