"""The source of this package: its name, its folder, its files."""

from __future__ import annotations

from pathlib import Path

NAME = __package__
ROOT = Path(__file__).parent


def files() -> list[Path]:
    """List every Python file of the package, sorted: what a compile cache must depend on."""
    return sorted(ROOT.rglob("*.py"))
