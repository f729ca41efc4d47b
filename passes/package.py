"""The package's own name, folder and files."""

from __future__ import annotations

from pathlib import Path

NAME = __package__
ROOT = Path(__file__).parent


def files() -> list[Path]:
    """List all Python files of the package, for hashes of its source."""
    return sorted(ROOT.rglob("*.py"))
