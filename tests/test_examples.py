"""The examples run as they stand, in their short forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# What each prints when it has done its work.
SAYS = {
    "generate_with_sinks": "gives the same tokens",
    "llama_longnet": "after 4 steps of 2,048 tokens",
    "vit_neighborhoods": "of new images told right",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_does_its_work(fresh_python: Callable[..., Any], name: str) -> None:
    run = fresh_python(str(EXAMPLES / f"{name}.py"), "--short")
    assert run.returncode == 0, run.stderr
    assert SAYS[name] in run.stdout
    assert "not called yet" not in run.stdout
