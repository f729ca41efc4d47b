"""The examples run as they stand, in their short forms, and say so where their own checks fail."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# What each prints when it has done its work; each checks its numbers itself, and exits with an error.
PRINTED = {
    "big_bird_bert": "logits of 1,024 tokens differ from the dense float64 reference by",
    "cpp/prefill": "C++ and Python agree",
    "fsdp_ring": "losses differ by",
    "generate_with_sinks": "gives the same tokens",
    "llama_longnet": "after 4 steps of 2,048 tokens",
    "longformer_documents": "attention differs from the dense float64 reference by",
    "packed_documents": "a padded batch would have",
    "vit_neighborhoods": "of new images classified right",
}
# Of other processes, or of minutes of compiling.
APART = ("cpp/prefill", "fsdp_ring")


def test_every_example_is_run_and_listed() -> None:
    files = {
        path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in EXAMPLES.rglob("*.py")
    }
    # The demo has tests of its own.
    files = {name for name in files if not name.startswith("demo/")}
    assert files == set(PRINTED)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`python examples/{name}.py`" in listed for name in PRINTED)


def run_here(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run an example in this process: importing transformers takes longer than the short form."""
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("name", [name for name in PRINTED if name not in APART])
def test_an_example_does_its_work(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(name, monkeypatch, "--short")
    printed = capsys.readouterr().out
    assert PRINTED[name] in printed
    assert "not called yet" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_an_example_of_several_processes_does_its_work(
    name: str, fresh_python: Callable[..., Any]
) -> None:
    run = fresh_python(str(EXAMPLES / f"{name}.py"), "--short")
    assert run.returncode == 0, run.stderr
    assert PRINTED[name] in run.stdout


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(name, monkeypatch, "--help")
    assert ended.value.code == 0
    assert "--short" in capsys.readouterr().out
