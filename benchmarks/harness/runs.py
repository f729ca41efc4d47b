"""Runs of benchmarks: their origin, choice of cases, and progress."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compiled_dilated import measure

_ROOT = Path(__file__).parents[2]


def origin() -> dict[str, Any]:
    """Hardware, versions, commit and arguments of this run, for its JSON."""
    return {
        "hardware": measure.hardware() | {"isa": torch.backends.cpu.get_cpu_capability()},
        "commit": commit(),
        "command": _arguments(),
    }


def commit() -> str | None:
    """The measured commit, marked if files differ; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    return run.stdout.strip() or None


def _arguments() -> list[str]:
    """The script's arguments, absolute paths as names: their directories are one machine's."""
    out = []
    for argument in sys.argv[1:]:
        path = Path(argument)
        out.append(path.name if path.is_absolute() else argument)
    return out


def is_chosen(name: str, only: Sequence[str] | None) -> bool:
    """Whether a case's name contains one of the texts of --only.

    Without texts, every case is chosen.
    """
    return not only or any(text in name for text in only)


def print_names(names: Sequence[str], only: Sequence[str] | None) -> int:
    """Print the names of the chosen cases; without any, exit code 2."""
    print("\n".join(names) or f"no case's name contains {only}; see --list")
    return 0 if names else 2


class Progress:
    """Progress of a run, with an estimate of the time left.

    count: measurements of the run.
    """

    def __init__(self, count: int) -> None:
        self.count, self.done, self.measured = count, 0, 0
        self.started = time.perf_counter()

    def start(self, name: str) -> None:
        """Print the name of the measurement that starts."""
        print(f"[{self.done + 1}/{self.count}] {name} ...", flush=True)

    def end(self, summary: str) -> None:
        """Print the measurement's figures, and the time left at the mean pace."""
        self.done, self.measured = self.done + 1, self.measured + 1
        elapsed = time.perf_counter() - self.started
        left = elapsed / self.measured * (self.count - self.done)
        print(f"    {summary}; about {_duration(left)} left", flush=True)

    def skip(self) -> None:
        """Count a measurement of an earlier run."""
        self.done += 1


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
