"""`python -m passes`: figures, timelines and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from passes.__main__ import app
from tests.graphs import Gelu

# Factories for MODULE:FACTORY.


def small() -> tuple[Any, Any]:
    return Gelu(), (torch.empty(4096, 64, device="meta"),)


def broken() -> int:
    return 3


def bare_tensor() -> tuple[Any, Any]:
    return Gelu(), torch.empty(4, 64)


def too_many_inputs() -> tuple[Any, Any]:
    return Gelu(), (torch.empty(4, 64), torch.empty(4, 64))


def too_narrow() -> tuple[Any, Any]:
    return Gelu(), (torch.empty(4, 63),)


def uncalled_class() -> tuple[Any, Any]:
    return Gelu, (torch.empty(4, 64),)


def not_to_be_called() -> tuple[Any, Any]:
    raise AssertionError("called before the options were checked")


def failing() -> tuple[Any, Any]:
    raise ValueError("the factory's own")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_the_report_and_the_timeline(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    result = run(f"{__name__}:small", "--png", str(picture))
    assert result.exit_code == 0, result.output
    parts = ("graph 0, inference: predicted peak ", "no pass", "seconds (model)", "(inputs)")
    for part in (*parts, "darkest at the peak"):
        assert part in result.stdout
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


NAMED = "MODULE:FACTORY must name a module and a function of it, as models.llama:small; got "
# Options with the message that they print.
BAD_USAGE: list[tuple[list[str], str]] = [
    (["nowhere"], f"{NAMED}'nowhere'"),
    (["..:small"], f"{NAMED}'..:small'"),
    (["no_such_module:f"], "No module named 'no_such_module'"),
    ([f"{__name__}:missing"], "has no function 'missing'"),
    ([f"{__name__}:broken"], "must return (model, example_inputs), the inputs a tuple; got int"),
    ([f"{__name__}:bare_tensor"], "of inputs of the model; got a tensor of shape (4, 64)"),
    ([f"{__name__}:too_many_inputs"], "(x: 'Tensor') -> 'Tensor'; got 2 inputs: too many"),
    ([f"{__name__}:too_narrow"], "that the model can compute with; got a tensor of shape (4, 63)"),
    ([f"{__name__}:uncalled_class"], "torch.nn.Module or a function; got the class Gelu"),
    ([f"{__name__}:small", "--budget", "much"], "--budget must be a number and one of B, KiB"),
    ([f"{__name__}:small", "--budget", "9" * 400 + "B"], "--budget must be less than 8,388,608"),
    ([f"{__name__}:not_to_be_called", "--png", "memory.doc"], "--png must end in one of "),
    (
        [f"{__name__}:not_to_be_called", "--png", "nowhere/memory.png"],
        "--png must be in an existing directory; got 'nowhere/memory.png'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_USAGE)
def test_bad_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_exception_of_the_factory_keeps_its_traceback() -> None:
    result = run(f"{__name__}:failing")
    assert isinstance(result.exception, ValueError)
    assert result.stderr == ""


def test_python_m_passes_runs(fresh_python: Any) -> None:
    result = fresh_python("-m", "passes", "--help")
    assert result.returncode == 0
    assert "MODULE:FACTORY" in result.stdout
