"""Code in new processes, forked from one that has imported torch and this library."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "compiled_dilated"])


def run_code(code: str, folder: Path) -> None:
    """Run code in a process of its own; its error is an AssertionError here.

    Importing torch takes longer than most code; only code that imports it itself is run here.

    folder: the process's working directory.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_execute, args=(code, folder, sender))
    process.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        error = "the process ended without a result"
    process.join()
    assert not error, error


def _execute(code: str, folder: Path, sender: Connection) -> None:
    """Send the error of some code; an empty text if there is none."""
    os.chdir(folder)
    error = ""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        # Also of sys.exit and interrupts: the parent raises whatever ended the code.
        except BaseException:
            error = traceback.format_exc()
    sender.send(error)
