"""Python code in new processes, forked from one that has imported torch and this library.

To import torch takes a new interpreter two to four seconds of a processor, longer than most code.
What must see no module imported, or needs a variable that a library reads while it is loaded, is
run by conftest.py's `fresh_python` instead.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "compiled_dilated"])


class Forked:
    """A running process of some code, with methods of subprocess.Popen.

    code: executed as a script.
    arguments: sys.argv[1:] of the code.
    folder: the process's working directory.
    environment: variables that are added to this process's own.
    """

    def __init__(
        self,
        code: str,
        *arguments: str,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._files = tempfile.TemporaryDirectory()
        variables = {**os.environ, **(environment or {})}
        task = (code, arguments, folder, variables, self._path("out"), self._path("err"))
        self._process = _CONTEXT.Process(target=_execute, args=task)
        self._process.start()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Output and errors of the ended process; TimeoutExpired while it runs."""
        self.wait(timeout)
        with open(self._path("out")) as out, open(self._path("err")) as err:
            return out.read(), err.read()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("forked code", timeout or 0.0)
        return code

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def _path(self, name: str) -> str:
        return os.path.join(self._files.name, name)


def run_code(
    code: str,
    *arguments: str,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code to its end, as `Forked` does."""
    process = Forked(code, *arguments, folder=folder, environment=environment)
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()  # without an effect on a process that has ended
    return subprocess.CompletedProcess("forked code", process.wait(), out, err)


def _execute(
    code: str, arguments: tuple[str, ...], folder: Path, variables: dict[str, str], *files: str
) -> None:
    """Run code as a script; multiprocessing prints its error and sets the exit code.

    files: where standard output and standard error are written.
    """
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    # Dynamo looks up the code's globals in its module.
    sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(code, "<code>", "exec"), sys.modules["__main__"].__dict__)
