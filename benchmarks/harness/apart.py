"""Cases in processes of their own, with limits of memory and time.

A failure becomes a row.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
_MOST_CHARACTERS = 160

# Messages of torch and the C++ runtime for exhausted memory.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "MemoryError",
    "out of memory",
)


def row_of(script: str, job: Mapping[str, Any], limit_bytes: int, seconds: float) -> Row:
    """Run `script --job JSON`, whose last line is its figures as JSON.

    limit_bytes: private memory of the process.
    seconds: time of the process.

    Returns the figures, or {"failed": reason}.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    command = [sys.executable, script, "--job", json.dumps(job)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {seconds:g} s"}
    if run.returncode == 0:
        row: Row = json.loads(run.stdout.splitlines()[-1])
        return row
    return {"failed": reason_of(run.returncode, run.stderr, limit_bytes)}


def reason_of(returncode: int, stderr: str, limit_bytes: int) -> str:
    """Why a process failed: out of memory, a signal, or its exception."""
    if returncode == -signal.SIGKILL or any(words in stderr for words in _OUT_OF_MEMORY):
        return f"out of {limit_bytes / 2**30:.3g} GiB of memory"
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    # The line of an exception is not indented: "torch._dynamo.exc.Unsupported: ...".
    errors = re.findall(r"^(?:\w+\.)*[A-Z]\w*(?:: .*)?$", stderr, re.MULTILINE)
    last = errors or stderr.strip().splitlines() or [f"exit code {returncode}"]
    return last[-1].strip()[:_MOST_CHARACTERS]
