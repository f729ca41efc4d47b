"""Settings and fixtures of all tests: threads, seeds, GPUs, fresh interpreters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when torch's compiler is first used. The few kernels of a test compile faster in this process
# than in a pool, which takes seconds to start.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# pytest puts tests/ on sys.path: with an __init__.py, tests/passes/ would be imported as `passes`.

# The same examples in every run, so that a failure is the same for everybody. New examples:
# `--hypothesis-profile=search`.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("search", deadline=None, derandomize=False, max_examples=2000)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C; the processes that tests interrupt inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, 2 // processes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch: the same random inputs whichever tests run before."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a new interpreter that can import the project.

    fresh_python("-c", code, NAME="value")    keyword arguments are environment variables
    fresh_python("file.py", "argument")
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
    """A function that sets torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Dynamo without earlier tests' graphs; an error at its graph limit.

    Beyond the limit Dynamo would run eagerly without a word.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The driver of native functions (tests/support/tape.py), compiled once a run."""
    from tests.support.tape import build_driver

    return build_driver(_shared_folder(tmp_path_factory, "native"))


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A package with prefill and decoding (tests/packaged.py), exported once a run."""
    from tests.packaged import export_window

    return export_window(_shared_folder(tmp_path_factory, "window"))


def _shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all worker processes of a run share."""
    base = tmp_path_factory.getbasetemp()
    # The folders of the worker processes are in one of the run.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    return folder
