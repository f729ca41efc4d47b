"""A command whose processes all end with it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

import psutil


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command; returns its exit code.

    Ctrl-C ends it and all that it has started, at once and without a word of theirs: torchrun and
    its ranks would print a hundred lines.

    Raises KeyboardInterrupt.
    """
    # In a session of its own, so that Ctrl-C in a terminal comes to this process alone.
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        _kill(process.pid)
        process.wait()
        raise


def _kill(pid: int) -> None:
    """Kill a process and its descendants."""
    try:
        parent = psutil.Process(pid)
        parent.suspend()  # it starts no more
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
