"""`compiled-dilated export` and `inspect`: files, output and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.cli import app

FACTORY = """
import torch
from compiled_dilated import masks

def make():
    inputs = tuple(torch.randn(1, 2, 20, 8) for _ in range(3))
    return masks.causal() & masks.window(8), inputs
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; commands add it to sys.path to import a factory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return tmp_path


def test_export_and_inspect(folder: Path) -> None:
    (folder / "factory_of_a_window.py").write_text(FACTORY)
    options = ("--lengths", "1,4096", "--json")
    exported = run("export", "factory_of_a_window:make", "model.pt2", *options)
    assert exported.exit_code == 0, exported.output
    assert "tokens: 1 to 4,096" in run("inspect", "model.pt2").stdout
    description = json.loads(exported.stdout[exported.stdout.index("{") :])
    assert json.loads(run("inspect", "model.pt2", "--json").stdout) == description
    q, k, v = torch.randn(3, 1, 2, 33, 8)
    expected = cd.compile(masks.causal() & masks.window(8))(q, k, v)
    torch.testing.assert_close(cd.load("model.pt2")(q, k, v), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "none.pt2"), "none.pt2.json is missing"),
        (("export", "nowhere:make", "model.pt2"), "No module named 'nowhere'"),
        (("export", "json:nothing", "model.pt2"), "json has no function 'nothing'"),
        (("export", "time:time", "model.pt2"), "(model or program, example inputs); got float"),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not list(folder.iterdir())


def test_a_range_has_two_numbers(folder: Path) -> None:
    (folder / "factory_of_a_mask.py").write_text(FACTORY)
    result = run("export", "factory_of_a_mask:make", "model.pt2", "--lengths", "3")
    assert result.exit_code == 2
    assert "--lengths takes LEAST,MOST, as in 1,65536; got '3'" in " ".join(result.output.split())
