"""Processes whose native kernels are compiled with other flags."""

from __future__ import annotations

import subprocess
from pathlib import Path


def compiler_with(path: Path, *flags: str) -> str:
    """Write a compiler that appends flags to its arguments; returns its path.

    The last flags win over those of the library.
    """
    path.write_text(f'#!/bin/sh\nexec g++ "$@" {" ".join(flags)}\n')
    path.chmod(0o700)
    return str(path)


def report(process: subprocess.CompletedProcess[str]) -> str:
    """The exit status and the ends of both outputs, for assertions."""
    outputs = f"{process.stdout[-3000:]}\n{process.stderr[-12000:]}"
    return f"ended with {process.returncode}\n{outputs}"
