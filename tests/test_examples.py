"""The examples run in their short forms.

They exit with an error if their checks fail.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Text of each example's output. Each checks its own numbers, and exits with an error.
PRINTED = {
    "big_bird_bert": "logits of 1,024 tokens differ from the float64 reference by",
    "cpp/prefill": "C++ and Python agree",
    "fsdp_ring": "losses differ by",
    "generate_with_sinks": "gives the same tokens",
    "llama_longnet": "after 4 steps of 2,048 tokens",
    "longformer_documents": "attention differs from the dense float64 reference by",
    "packed_documents": "a padded batch would have",
    "vit_neighborhoods": "of new images classified right",
}
# Examples that start processes, or compile for minutes.
APART = ("cpp/prefill", "fsdp_ring")


def test_every_example_is_run_and_listed() -> None:
    paths = [path.relative_to(EXAMPLES).with_suffix("") for path in EXAMPLES.rglob("*.py")]
    # The demo has tests of its own.
    names = {path.as_posix() for path in paths if path.parts[0] != "demo"}
    assert names == set(PRINTED)
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`python examples/{name}.py`" in readme for name in PRINTED)


def run_here(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run an example in this process.

    Importing transformers takes longer than the short form.
    """
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("name", [name for name in PRINTED if name not in APART])
def test_an_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(name, monkeypatch, "--short")
    printed = capsys.readouterr().out
    assert PRINTED[name] in printed
    assert "not called yet" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_an_example_of_several_processes_runs(name: str, fresh_python: Callable[..., Any]) -> None:
    run = fresh_python(str(EXAMPLES / f"{name}.py"), "--short")
    assert run.returncode == 0, run.stderr
    assert PRINTED[name] in run.stdout


@pytest.mark.parametrize("name", PRINTED)
def test_every_example_has_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_here(name, monkeypatch, "--help")
    assert end.value.code == 0
    assert "--short" in capsys.readouterr().out
