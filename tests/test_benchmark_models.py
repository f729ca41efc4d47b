"""benchmarks/models.py: failures are rows, wrong results are reported, names of cases differ."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CHILD = """
import json, sys, time
job = json.loads(sys.argv[2])
if job["do"] == "grow":
    import torch
    torch.ones(2**30)
if job["do"] == "wait":
    time.sleep(60)
if job["do"] == "raise":
    raise NotImplementedError("no backward here")
print("noise")
print(json.dumps({"seconds": [1.0]}))
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks("models")` imports a script of benchmarks/ and its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(
    ("do", "row"),
    [
        ("work", {"seconds": [1.0]}),
        ("grow", {"failed": "out of 2 GiB of memory"}),
        ("wait", {"failed": "took longer than 2 s"}),
        ("raise", {"failed": "NotImplementedError: no backward here"}),
    ],
)
def test_a_case_in_a_process_of_its_own(
    benchmarks: Any, tmp_path: Path, do: str, row: dict[str, Any]
) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    seconds = 2 if do == "wait" else 120
    assert benchmarks("harness.apart").row_of(str(script), {"do": do}, 2 * 2**30, seconds) == row


def test_a_reason_is_the_exceptions_own_line(benchmarks: Any) -> None:
    error = "torch._dynamo.exc.Unsupported: a call"
    stderr = f"Traceback:\n  File x\n{error}\n  Hint: none\n\nSet TORCHDYNAMO_VERBOSE=1 for more\n"
    apart = benchmarks("harness.apart")
    assert apart.reason_of(1, stderr, 2**30) == error
    assert apart.reason_of(-9, "", 2**30) == "out of 1 GiB of memory"
    assert apart.reason_of(-11, "", 2**30) == "ended by SIGSEGV"


def row_of(way: str, result: list[float], seconds: float = 2.0) -> dict[str, Any]:
    case = {"work": "prefill", "tokens": 512, "program": "plain", "way": way}
    times = {"seconds": [seconds], "first_seconds": 3.0}
    return case | times | {"peak_bytes": 2**21, "graphs": 0, "result": result}


def test_rows_are_compared_with_sdpa(benchmarks: Any) -> None:
    models = benchmarks("models")
    base = row_of("sdpa", [1.0, -2.0])
    close = models.judged(row_of("ours", [1.0, -2.0001], seconds=1.0), base)
    wrong = models.judged(row_of("eager", [1.0, -2.1]), base)
    assert (close["time_of_sdpa"], close["peak_of_sdpa"]) == (0.5, 1.0)
    assert "failed" not in close
    assert wrong["failed"].startswith("another result than sdpa's")
    assert "failed" in models.judged(row_of("ours", [1.0, math.nan]), base)
    assert close["is_compared"]
    assert not models.judged(row_of("ours", [1.0, -2.0]), None)["is_compared"]
    assert not models.judged(row_of("ours", [1.0, -2.0]), {**base, "failed": "x"})["is_compared"]
    printed = models.table([base, close, wrong])
    assert "prefill, 512, plain, eager: another result than sdpa's" in printed
    assert "0.50" in printed


def test_tokens_are_equal_to_the_last(benchmarks: Any) -> None:
    models = benchmarks("models")
    base, row = row_of("sdpa", [4000, 3, 5]), row_of("ours", [4000, 3, 6])
    base["work"] = row["work"] = "decode static"
    judged = models.judged(row, base)
    assert judged["failed"] == "another result than sdpa's: 6 for 5, number 2"
    assert models._is_fault(judged)


@pytest.mark.parametrize(
    ("way", "reason", "is_fault"),
    [
        ("ours", "out of 8 GiB of memory", False),
        ("ours", "took longer than 9 s", False),
        ("ours", "ended by SIGSEGV", True),
        ("flex", "ended by SIGSEGV", False),
    ],
)
def test_a_failure_of_ours_is_a_fault(
    benchmarks: Any, way: str, reason: str, is_fault: bool
) -> None:
    assert benchmarks("models")._is_fault({"way": way, "failed": reason}) == is_fault


def test_names_of_cases_differ_and_sdpa_comes_first(benchmarks: Any) -> None:
    models = benchmarks("models")
    jobs = models.jobs_of(models.LENGTHS)
    assert len({job.name for job in jobs}) == len(jobs)
    bases = set()
    for job in jobs:
        assert job.way == "sdpa" or (job.work, job.tokens) in bases
        if job.way == "sdpa":
            bases.add((job.work, job.tokens))


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    cases = ["--only", "64 tokens, plain, sdpa", "--only", "64 tokens, plain, ours"]
    options = ["--quick", "--lengths", "64", *cases, "--json", str(target)]
    command = [sys.executable, "benchmarks/models.py", *options]
    run = subprocess.run(
        command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads(target.read_text())
    assert record["complete"]
    assert not [row for row in record["rows"] if "failed" in row]
