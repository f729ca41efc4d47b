"""tools/gpu_check without a GPU.

Its file of results, stages that are stopped, and exit codes.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compiled_dilated.lowerings.devices import Constants

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/gpu_check as a module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(TOOLS / "gpu_check"))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Its data classes look their module up.
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    loader.exec_module(module)
    return module


@pytest.fixture
def records(tool: ModuleType, tmp_path: Path) -> Any:
    return tool.Records(tmp_path / "results.json")


def finished(records: Any, stage: str, **outcomes: bool) -> None:
    """Cases of a stage that have run to their ends."""
    for case, ok in outcomes.items():
        records.append("start", stage=stage, case=case)
        records.append("outcome", stage=stage, case=case, ok=ok, error="wrong")
    records.append("end", stage=stage, seconds=1.0)


def test_a_line_that_a_stop_cut_off_is_left_out(records: Any) -> None:
    records.append("start", stage="smoke", case="flex")
    with records.path.open("a") as file:
        file.write('{"event": "outcome", "stage": "smo')
    assert [event["event"] for event in records.events()] == ["start"]
    assert records.under_way("smoke") == "flex"


def test_a_case_is_under_way_until_its_outcome(records: Any) -> None:
    assert records.under_way("smoke") is None
    records.append("start", stage="smoke", case="flex")
    assert records.under_way("smoke") == "flex"
    records.append("outcome", stage="smoke", case="flex", ok=True)
    assert records.under_way("smoke") is None
    assert not records.ended("smoke")


@pytest.mark.parametrize(
    ("outcomes", "last", "exit_code"),
    [
        ({"tiled": True, "flex": True}, True, 0),
        ({"tiled": True, "flex": False}, True, 1),
        ({"tiled": True, "flex": True}, False, 3),
        ({"tiled": False}, False, 1),
    ],
    ids=["passed", "failed", "not finished", "failed and not finished"],
)
def test_exit_codes(
    tool: ModuleType, records: Any, outcomes: dict[str, bool], last: bool, exit_code: int
) -> None:
    finished(records, "smoke", **outcomes)
    if last:
        finished(records, "edges", width=True)
    assert tool.report(records, ["smoke", "edges"], 1.0) == exit_code


def process(records: Any, endings: list[tuple[str | None, int | None]]) -> Any:
    """Workers in the place of `run`, one for each call.

    A worker is the case that it starts, and its exit code.
    """

    def run(command: list[str], seconds: float) -> int | None:
        case, exit_code = endings.pop(0)
        if case is not None:
            records.append("start", stage="smoke", case=case)
        if exit_code == 0:
            records.append("outcome", stage="smoke", case=case, ok=True)
            records.append("end", stage="smoke", seconds=1.0)
        return exit_code

    return run


@pytest.mark.parametrize(
    ("endings", "failed"),
    [
        ([("flex", -9), ("tiled", 0)], {"flex": "the process ended with -9"}),
        ([("flex", None)], {"flex": "stopped: the 60 s of the stage were over"}),
        ([(None, 1)], {"start": "the process ended with 1"}),
        ([("flex", -9), ("tiled", -11), ("auto", 0)], {"flex": "-9", "tiled": "-11"}),
    ],
    ids=["crash", "time", "no start", "two crashes"],
)
def test_what_ends_a_process_is_the_failure_of_its_case(
    tool: ModuleType,
    records: Any,
    monkeypatch: pytest.MonkeyPatch,
    endings: list[tuple[str | None, int | None]],
    failed: dict[str, str],
) -> None:
    monkeypatch.setattr(tool, "run", process(records, endings))
    tool.run_stage(tool.STAGES[0], records, 60.0, emulated=False)
    assert not endings
    outcomes = records.outcomes("smoke")
    errors = {name: x["error"] for name, x in outcomes.items() if not x["ok"]}
    assert errors.keys() == failed.keys()
    assert all(failed[name] in error for name, error in errors.items())


def test_a_stage_of_one_run_goes_on_after_a_stop(
    tool: ModuleType, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "run", process(records, [("pytest", None)]))
    tool.run_stage(tool.Limit("smoke", 1, is_one_run=True), records, 1.0, emulated=False)
    assert not records.outcomes("smoke")


MACHINE = {"gpu": "H100", "torch": "2.11", "triton": "3.6", "commit": "0123abc", "code": "45de"}


def test_a_second_call_runs_only_what_is_left(
    tool: ModuleType, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.append("machine", **MACHINE)
    finished(records, "smoke", flex=True)
    ran: list[str] = []

    def run_stage(stage: Any, *settings: Any) -> None:
        ran.append(stage.name)
        finished(records, stage.name, case=True)

    monkeypatch.setattr(tool, "find_machine", lambda emulated: (MACHINE, ""))
    monkeypatch.setattr(tool, "run_stage", run_stage)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--json", str(records.path)])
    assert tool.main() == 0
    assert ran == [name for name in tool.NAMES if name != "smoke"]
    ran.clear()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--json", str(records.path), "--fresh"])
    assert tool.main() == 0
    assert ran == [*tool.NAMES]


@pytest.mark.parametrize("name", ["gpu", "torch", "triton", "commit", "code"])
def test_results_of_another_machine_or_code_are_not_continued(
    tool: ModuleType, records: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str
) -> None:
    records.append("machine", **MACHINE)
    here = MACHINE | {name: "another"}
    monkeypatch.setattr(tool, "find_machine", lambda emulated: (here, ""))
    monkeypatch.setattr(tool, "run_stage", lambda *settings: pytest.fail("a stage ran"))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--json", str(records.path)])
    assert tool.main() == 2
    error = capsys.readouterr().err
    assert "holds results of H100 with torch 2.11, Triton 3.6, commit 0123abc, code 45de" in error
    assert f"; this is {tool.in_words(here)}. Name another --json FILE" in error


def test_results_of_unknown_code_are_not_continued(tool: ModuleType) -> None:
    """Files of earlier versions name no code."""
    before = {name: MACHINE[name] for name in ("gpu", "torch", "triton")}
    assert tool.differs(before, MACHINE)
    assert "commit None, code None" in tool.in_words(before)


def test_edited_code_is_other_code(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_stages import machine

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    source = tmp_path / "compiled_dilated" / "masks.py"
    source.parent.mkdir()
    source.write_text("one = 1\n")
    first = machine.digest(tmp_path)
    # What is compiled from it, and what no stage runs, are no code.
    source.with_suffix(".pyc").write_text("one")
    (tmp_path / "gpu_check.json").write_text("{}")
    assert machine.digest(tmp_path) == first
    source.write_text("one = 2\n")
    assert machine.digest(tmp_path) != first
    assert machine.commit(tmp_path) is None

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *author, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", "compiled_dilated")
    git("commit", "-m", "first")
    commit = machine.commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    source.write_text("one = 3\n")
    assert machine.commit(tmp_path) == f"{commit}-dirty"


def test_skipped_cases_are_counted_apart(tool: ModuleType, records: Any, capsys: Any) -> None:
    from gpu_stages.stage import Stage

    stage = Stage("edges", records, "cpu", True)
    stage.case("far", lambda: {"skipped": "needs 64 GiB, 20 are free"})
    stage.case("near", dict)
    records.append("end", stage="edges", seconds=1.0)
    assert "edges: far: skipped: needs 64 GiB, 20 are free (" in capsys.readouterr().out
    assert tool.report(records, ["edges"], 1.0) == 0
    printed = capsys.readouterr().out
    assert "edges: 1 passed, 0 failed, 1 skipped; all cases ran" in printed
    assert "    far: skipped: needs 64 GiB, 20 are free\n" in printed


def test_a_case_records_its_error_and_the_next_one_runs(tool: ModuleType, records: Any) -> None:
    from gpu_stages.stage import DeviceLost, Stage

    stage = Stage("smoke", records, "cpu", True)
    stage.case("wrong", lambda: {"number": 1 // 0})
    stage.case("right", lambda: {"number": 1, "error": 0.5})
    stage.case("right", lambda: pytest.fail("a case with an outcome ran again"))
    outcomes = records.outcomes("smoke")
    assert outcomes["wrong"]["error"].startswith("ZeroDivisionError")
    assert outcomes["right"]["number"] == 1

    def lose() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost):
        stage.case("lost", lose)
    assert not records.outcomes("smoke")["lost"]["ok"]


def test_constants_are_shares_of_the_best_dense_kernel(tool: ModuleType) -> None:
    from gpu_stages.constants import derive

    def rate(flops: float) -> dict[str, Any]:
        return {"ok": True, "forward": {"flops": flops}}

    outcomes = {
        "dense flash bfloat16 64 8192": rate(300e12),
        "dense cudnn bfloat16 64 8192": rate(500e12),
        "dense efficient bfloat16 64 8192": rate(150e12),
        "dense efficient float32 64 8192": rate(30e12),
        "merge bfloat16": {"ok": True, "bytes_per_second": 2e12},
        "host efficient": {"ok": True, "host_us": 30.0},
        "host lattice": {"ok": True, "host_us": 10.0},
        "flex partial bfloat16 64": rate(200e12),
        "lanes full bfloat16 64": rate(400e12),
        "lanes partial bfloat16 64": rate(250e12),
        "flex partial float32 64": rate(10e12),
        "lanes partial float32 64": rate(20e12),
    }
    derived = derive(outcomes, 8192)
    assert derived == pytest.approx(
        {
            "flops_per_byte": 250.0,
            "flops_per_call": 500e12 * 40e-6,
            "tiles": 0.3,
            "flex": 0.4,
            "lanes_full": 0.8,
            "lanes_partial": 0.5,
            "flex_float32": 0.1,
            "lanes_float32": 0.2,
        }
    )
    assert derived.keys() == {x.name for x in fields(Constants)} - {"working_set", "measured"}
    del outcomes["merge bfloat16"]
    with pytest.raises(AssertionError, match="'merge bfloat16' has no number"):
        derive(outcomes, 8192)


def test_help_names_stages_and_exit_codes(fresh_python: Any) -> None:
    run = fresh_python("tools/gpu_check", "--help")
    assert run.returncode == 0
    for text in ("smoke", "constants", "suite", "edges", "benchmark", "exit code", "--report"):
        assert text in run.stdout


def test_a_report_of_no_file_says_that_nothing_ran(fresh_python: Any, tmp_path: Path) -> None:
    run = fresh_python("tools/gpu_check", "--report", "--json", str(tmp_path / "none.json"))
    assert run.returncode == 3
    assert "smoke: 0 passed, 0 failed, 0 skipped; not run" in run.stdout
    assert not (tmp_path / "none.json").exists()


def test_results_are_lines_of_json(records: Any) -> None:
    records.append("machine", gpu="H100")
    records.append("end", stage="smoke", seconds=1.0)
    lines = records.path.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["machine", "end"]


SOURCE = """
def after_a_return(q, device):
    if device == "cpu":
        return q.one()
    q.gpu()
    return q.gpu()

def sides(q, device):
    if device != "cpu" and q:
        q.gpu()
    if device == "cpu" and q:
        return q.one()
    if device.type == "cuda":
        q.gpu()
    else:
        q.one()
    if not q or device == "cpu":
        return q.one()
    q.gpu()
"""


def test_lines_that_only_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    lines = importlib.import_module("emulation.lines")
    visitor = lines._Visitor("source.py")
    visitor.visit(ast.parse(SOURCE))
    text = SOURCE.splitlines()
    expected = {number for number, line in enumerate(text, 1) if "gpu" in line}
    assert set(visitor.lines) == expected
    assert set(visitor.lines.values()) == {"after_a_return", "sides"}


def test_lines_listed_as_not_reached_exist_and_have_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    lines = importlib.import_module("emulation.lines")
    everything, _ = lines.unreached({})
    listed = json.loads((TOOLS / "emulation/unreached.json").read_text())
    assert set(listed) <= set(everything)
    assert all(len(reason) > 10 for reason in listed.values())
