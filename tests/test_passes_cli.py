"""`python -m passes`: figures, timelines and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from passes.__main__ import app
from tests.graphs import Gelu


def small() -> tuple[Any, Any]:
    return Gelu(), (torch.empty(4096, 64, device="meta"),)


def broken() -> int:
    return 3


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def test_the_report_and_the_timeline(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    result = run(f"{__name__}:small", "--png", str(picture))
    assert result.exit_code == 0, result.output
    for expected in ("graph 0, inference: predicted peak ", "no pass", "seconds (model)", "(inputs)", "darkest at the peak"):
        assert expected in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json() -> None:
    result = run(f"{__name__}:small", "--json")
    assert result.exit_code == 0, result.output
    (graph,) = json.loads(result.stdout)["graphs"]
    assert graph["plain"]["added_bytes"] == 4096 * 64 * 4 * 5
    assert graph["live"]


def test_a_budget_that_nothing_fits_exits_with_1() -> None:
    result = run(f"{__name__}:small", "--budget", "1KiB")
    assert result.exit_code == 1
    assert "memory_budget must be at least" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "MODULE:FACTORY must name a module and a function of it, as models.llama:small; got 'nowhere'"),
        (["no_such_module:f"], "No module named 'no_such_module'"),
        ([f"{__name__}:missing"], "has no function 'missing'"),
        ([f"{__name__}:broken"], "must return (model, example_inputs), the inputs a tuple; got int"),
        ([f"{__name__}:small", "--budget", "much"], "--budget must be a number and one of B, KiB"),
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_it_runs_as_a_module(fresh_python: Any) -> None:
    result = fresh_python("-m", "passes", "--help")
    assert result.returncode == 0
    assert "MODULE:FACTORY" in result.stdout
