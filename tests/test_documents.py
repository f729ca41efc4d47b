"""README and docs: length, links, code blocks, figures and examples of docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from tests.documents import POSTLUDES, PRELUDES, SHARED, SLOW
from tests.support.forked import run_code

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *ROOT.glob("C*.md")]
PAGES += [*(ROOT / "docs").glob("**/*.md"), *(ROOT / "examples").glob("*.md")]
PAGES.sort()
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
SOURCES = [
    *sorted((ROOT / "compiled_dilated").rglob("*.py")),
    *sorted((ROOT / "passes").rglob("*.py")),
]
MODULES_WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if re.search(r"^ *>>> (?!.*doctest: \+SKIP)", path.read_text(), re.MULTILINE)
]


def pages_with_code() -> list[Any]:
    """The pages with blocks of Python."""
    parameters = []
    for page in PAGES:
        marks = (pytest.mark.slow,) if page.name in SLOW else ()
        if "```python" in page.read_text():
            parameters.append(pytest.param(page, id=page.name, marks=marks))
    return parameters


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 800


def test_the_picture_of_the_readme_is_its_mask() -> None:
    lines = [line[30:] for line in README.splitlines() if "█" in line]
    positions = torch.arange(len(lines))
    mask = masks.causal() & (masks.window(3) | masks.sinks(1))
    allowed = mask.allows(0, 0, positions[:, None], positions)
    for line, row in zip(lines, allowed.tolist(), strict=True):
        assert line == "".join(" █"[pair] for pair in row).rstrip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", pages_with_code())
def test_code_of_pages_runs(page: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall(page.read_text())
    # Blocks for machines without this library run in processes of their own, after all others.
    without_library = [block for block in blocks if "load_library(" in block]
    blocks = [block for block in blocks if block not in without_library]
    before, after = PRELUDES.get(page.name, ""), POSTLUDES.get(page.name, "")
    run = run_code("\n".join([SHARED, before, *blocks, after]), folder=tmp_path)
    assert run.returncode == 0, run.stderr
    for block in without_library:
        command = [sys.executable, "-c", "import torch\n" + block]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("module", MODULES_WITH_EXAMPLES, ids=str)
def test_examples_of_docstrings_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some examples write files
    q = torch.randn(1, 8, 256, 64)
    names = {"masks": masks, "global_tokens": masks.global_tokens, "q": q, "k": q, "v": q}
    # Modules take (B, N, H, D) and (B, N, E).
    query, x = torch.randn(1, 256, 8, 64), torch.randn(1, 256, 512)
    names |= {"query": query, "key": query, "value": query, "x": x}
    names |= {"attend": cd.compile(masks.causal())}
    flags = doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(importlib.import_module(module), optionflags=flags, extraglobs=names)
    assert results.attempted
    assert not results.failed


def test_figures_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "tools" / "measured"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
