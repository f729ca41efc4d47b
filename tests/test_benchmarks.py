"""The harness of benchmarks/attention.py and masks.py: shares, bars, families, reports."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from compiled_dilated import masks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, imported as by the scripts beside it.

    The number of threads is restored.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    package = importlib.import_module("harness")
    for name in ("problems", "cases", "turns", "reports"):
        importlib.import_module(f"harness.{name}")
    yield package
    torch.set_num_threads(threads)


def small(harness: Any, tokens: int = 128, **settings: Any) -> Any:
    """A window of 8 over few tokens, as a share of SDPA."""
    problem = harness.problems.Problem(masks.window(8), tokens, heads=2, head_dim=16)
    return harness.cases.Case(
        f"window-{tokens}", problem, of=harness.cases.in_time_of_dense(problem), **settings
    )


def test_rates_a_case_and_its_rivals(harness: Any) -> None:
    case = small(harness, bars=(0.0, 1e9))
    settings = harness.turns.Settings(
        turns=4, least=2, seconds=0.0, rival_turns=1, block_seconds=0.0
    )
    rivals = ("fallback", "SDPA")
    forward = harness.turns.rate(case, False, settings, rivals)
    training = harness.turns.rate(case, True, settings, rivals)
    assert len(forward["seconds"]) == len(forward["baseline_seconds"]) == 2
    assert (forward["met"], training["met"]) == (True, False)
    assert set(rivals) == set(forward["rivals"])
    assert all(rival["share"] > 0 for rival in training["rivals"].values())
    assert 0 < forward["useful_of_computed"] <= 1


def test_a_rival_that_refuses_is_named(harness: Any) -> None:
    problem = harness.problems.Problem(
        masks.full(), 16, heads=1, head_dim=8, score_mod=lambda score, b, h, q, kv: score * 2
    )
    case = harness.cases.Case("doubled", problem)
    refused = harness.turns._rival(case, "SDPA", False)
    assert refused == "ValueError: SDPA has no such score_mod"


def test_all_ways_agree(harness: Any) -> None:
    data = {"documents": torch.arange(64)[None] // 24}
    mask = masks.causal() & masks.documents(ids="documents")
    problem = harness.problems.Problem(
        mask, 64, heads=2, kv_heads=1, head_dim=8, data=data, by_token=True
    )
    tensors = problem.tensors(False)
    expected = harness.problems.WAYS["SDPA"](problem)(*tensors)
    for name in ("ours", "fallback"):
        torch.testing.assert_close(harness.problems.WAYS[name](problem)(*tensors), expected)


def test_compares_lengths_of_a_family(harness: Any) -> None:
    row = {"family": "window", "pass": "forward", "dtype": "float32", "heads": 8}
    row |= {"baseline_seconds": [1.0]}
    rows = [
        row | {"tokens": 100, "seconds": [1.0], "share": 0.8},
        row | {"tokens": 1000, "seconds": [12.5], "share": 0.6},
    ]
    per_token, useful = harness.turns.family_rows(rows, {"window": 0.9})
    assert per_token["case"] == "window, 100 to 1000: tokens a second"
    assert (per_token["share"], per_token["met"]) == (0.8, False)
    assert (useful["share"], useful["met"]) == (pytest.approx(0.75), None)


def test_measures_beside_a_busy_process_that_ends(harness: Any) -> None:
    settings = harness.turns.Settings(turns=1, least=1, block_seconds=0.0)
    row = harness.turns.slow_down(small(harness), False, settings)
    assert row["slower"]["ours"]["median"] > 0
    assert len(row["busy_seconds"]["baseline"]) == 1
    with harness.turns.busy_process() as process:
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not process.is_running()


def test_writes_a_table_and_a_file(
    harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        small(harness, tokens, family="window", rivals=("fallback",), bars=(1e9, None))
        for tokens in (64, 128)
    ]
    parser = harness.reports.parser("About.", cases, ("fallback",))
    options = parser.parse_args(
        ["--turns", "1", "--check", "--json", str(tmp_path / "out.json"), "--passes", "forward"]
    )
    assert harness.reports.run(options, cases, {}) == 1
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["complete"]
    assert [row["case"] for row in record["rows"][:2]] == ["window-64", "window-128"]
    assert record["hardware"]["isa"] == torch.backends.cpu.get_cpu_capability()
    printed = capsys.readouterr().out
    assert "[2/2] window-128, float32, forward" in printed
    assert "missed: window-64, forward; window-128, forward" in printed


@pytest.mark.parametrize("script", ["attention", "masks"])
def test_names_of_cases_differ(harness: Any, script: str) -> None:
    module = importlib.import_module(script) if script == "attention" else _masks()
    cases = module.CASES if script == "attention" else module.cases()
    names = [case.name for case in cases]
    assert len(names) == len(set(names)) > 30


def _masks() -> Any:
    """benchmarks/masks.py, whose name is that of many modules."""
    specification = importlib.util.spec_from_file_location(
        "benchmark_of_masks", BENCHMARKS / "masks.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
