"""README and docs: short, and of figures, links and names that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compiled_dilated import masks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *ROOT.glob("C*.md"), *(ROOT / "examples").glob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def test_the_readme_is_a_door() -> None:
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 800


def test_the_picture_of_the_readme_is_its_mask() -> None:
    lines = [line[30:] for line in README.splitlines() if "█" in line]
    positions = torch.arange(len(lines))
    mask = masks.causal() & (masks.window(3) | masks.sinks(1))
    seen = mask.allows(0, 0, positions[:, None], positions)
    assert lines == ["".join("█" if pair else " " for pair in row).rstrip() for row in seen.tolist()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing


def test_figures_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "measured.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
