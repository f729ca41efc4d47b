"""`compiled-dilated bench`: it measures what it says, judges by what is required, and writes it down."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from compiled_dilated import compile, hilbert_window, masks
from compiled_dilated.cli import app
from compiled_dilated.commands import bench_measuring
from compiled_dilated.commands.bench_cases import Case, Rival, Setup, pairs_within
from compiled_dilated.commands.bench_tables import met, tables


@pytest.fixture
def threads() -> Iterator[None]:
    """Afterwards as many threads as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_lists_the_issue_s_cases() -> None:
    names = run("bench", "--list").stdout.split()
    assert names[:6] == ["longnet-16k", "longnet-128k", "window-16k", "window-64k", "hilbert-64x64", "hilbert-256x256"]
    assert {"flat-longnet", "flat-window", "flat-hilbert", "short-causal-512", "short-window-2048"} < set(names)


@pytest.mark.usefixtures("threads")
def test_measures_and_writes(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    result = run("bench", "--quick", "--case", "short-causal-512", "--case", "short-window-512", "--json", str(file))
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())
    assert record["complete"]
    assert record["hardware"]["threads"] == 2
    assert [row["case"] for row in record["rows"]] == ["short-causal-512"] * 2 + ["short-window-512"] * 2
    assert all(row["ratio"] > 0 for row in record["rows"])
    assert "short-causal-512" in result.stdout


def test_refuses_unknown_cases() -> None:
    result = run("bench", "--case", "nothing")
    assert result.exit_code == 2
    assert "no measurement's name holds 'nothing'; see --list" in result.stderr


def test_rates_a_case() -> None:
    setup = Setup(heads=2, head_dim=16, dense_tokens=128, repeats=2, seconds=0.1)
    row_major = Rival("ours, row-major", 1.0, lambda _: compile(masks.neighborhood((8, 8), 2)))
    case = Case("small", hilbert_window((8, 8), 2), 64, 0.0, math.inf, (row_major,))
    forward, both = bench_measuring._rate(case, False, setup)
    assert forward["useful_flops"] == 4 * 16 * 2 * pairs_within(8, 2) ** 2
    assert both["useful_flops"] == 3.5 * forward["useful_flops"]
    assert (forward["ok"], both["ok"]) == (True, False)
    assert forward["rivals"]["ours, row-major"]["ratio"] > 0
    assert not met(both)
    assert "NO" in tables([{"table": "rate", **both}])


def test_counts_the_pairs_of_a_neighborhood() -> None:
    assert pairs_within(7, 2) == sum(abs(a - b) <= 2 for a in range(7) for b in range(7))
    assert pairs_within(3, 12) == 9


def test_leaves_out_what_does_not_fit() -> None:
    assert "GiB of memory" in str(Setup().lacks_memory(2**34, backward=False))
    assert Setup().lacks_memory(2**10, backward=True) is None
