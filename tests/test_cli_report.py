"""`compiled-dilated report`: choice of cases, JSON, refused numbers, Ctrl-C."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_code

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RING = "StandardRingAttention"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/report.py, whose cases end at once."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    running = importlib.import_module("reporting.running")
    figures = {"seconds": [1.0], "error": 0.0, "has_nan": False, "compared": "all rows"}
    monkeypatch.setattr(running, "row_of", lambda *arguments: dict(figures))
    return importlib.import_module("report")


def test_json_is_alone_on_stdout(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "single", "--quick", "--only", RING, "--directory", str(tmp_path)]
    assert report.main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert [row["job"]["way"] for row in json.loads(printed.out)] == [RING]
    assert f"[1/1] single: {RING}" in printed.err
    assert report.main([*command, "--anew"]) == 0
    assert f"[1/1] single: {RING}" in capsys.readouterr().out


def test_the_list_has_the_chosen_cases(report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["run", "single", "--quick", "--list", "--only", RING]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"single: {RING}, 1,024 tokens")
    assert report.main(["run", "single", "--quick", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("option", ["--list", "--quick"])
def test_a_text_that_no_name_contains_is_refused(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    directory = ["--directory", str(tmp_path)]
    assert report.main(["run", "single", "--only", "Rnig", option, *directory]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "no case's name contains 'Rnig'; `compiled-dilated report run --list`" in printed.err


@pytest.mark.parametrize("option", ["--limit", "--seconds"])
@pytest.mark.parametrize("number", ["nan", "inf", "0", "-1", "1e999", "x"])
def test_limits_are_finite_numbers_above_0(
    report: Any, capsys: pytest.CaptureFixture[str], option: str, number: str
) -> None:
    with pytest.raises(SystemExit) as end:
        report.main(["run", "--list", option, number])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: must be a finite number above 0, as 8; got {number!r}" in error


# The command with a script in a session of their own, as in a terminal.
COMMAND = """
import os, signal, sys
from pathlib import Path
from compiled_dilated import cli
from compiled_dilated.commands import report
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)
report._SCRIPT = Path(sys.argv[1])
report._SECONDS_TO_END = float(sys.argv[2])
cli.app(["report"])
"""
# It interrupts the command, and needs a second to end, as a large case does.
INTERRUPTED = """
import os, signal, time
try:
    {interrupt}
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("stopped; the same command goes on", flush=True)
    raise SystemExit(130)
"""
INTERRUPTS = {
    "of a terminal": ("os.killpg(os.getpgrp(), signal.SIGINT)", "30"),
    "of one process": ("os.kill(os.getppid(), signal.SIGINT)", "0.1"),
}


@pytest.mark.parametrize(("interrupt", "seconds"), INTERRUPTS.values(), ids=INTERRUPTS)
def test_ctrl_c_waits_for_the_script(tmp_path: Path, interrupt: str, seconds: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(interrupt=interrupt))
    done = run_code(COMMAND, str(script), seconds)
    assert (done.stdout, done.returncode) == ("stopped; the same command goes on\n", 130)


def test_a_signal_is_an_exit_code_of_shells(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert run_code(COMMAND, str(script), "1").returncode == 128 + 9
