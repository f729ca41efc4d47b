"""The command line: output, errors and exit codes.

Programs as text, `doctor`, `recommend` and measuring are among the subjects.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from compiled_dilated import longnet, masks, measure
from compiled_dilated.cli import app
from compiled_dilated.commands import arguments, doctor
from compiled_dilated.orders import hilbert
from compiled_dilated.parsing import ExpressionError
from compiled_dilated.programs import as_program
from compiled_dilated.recommendations import Request, recommend
from compiled_dilated.text import read_order, read_program

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread, and afterwards as many as before.

    Other processes slow down one thread least.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def printed_json(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize(
    "command", ["plan", "recommend", "show", "doctor", "export", "inspect", "memory"]
)
def test_every_command_has_help(command: str, option: str) -> None:
    result = run(command, option)
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.stdout
    assert command in run("--help").stdout


def test_prints_its_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    version = importlib.metadata.version("compiled-dilated")
    assert result.stdout == f"compiled-dilated {version}, torch {torch.__version__}\n"


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "compiled_dilated", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: python -m compiled_dilated" in process.stdout


# Programs as text


@pytest.mark.parametrize(
    "text",
    [
        "causal()",
        "causal() & (window(256) | sinks(4))",
        "~(segments(8) | ~full())",
        "neighborhood((8, 8), 1, causal=(True, False))",
        "tiles([(0, 0), (1, 0)], block=4)",
        "documents(ids='ids') & padding()",
        "Program((Branch(causal(), heads='0/2'), Branch(window(3), order=residue(2, period=8))))",
        "longnet((2048, 4096, 8192), (1, 2, 4), causal=True)",
        "longnet([16, 32], [1, 2], offsets='grouped')",
        "hilbert_window(grid=(8, 8), radius=2)",
        "block_sparse(0.1, 'dilated')",
    ],
)
def test_reads_programs(text: str) -> None:
    program = read_program(text)
    assert read_program(repr(program)) == program


def test_reads_line_breaks_and_unquoted_defaults_like_python() -> None:
    assert read_program(" causal() &\n window(2) ") == as_program(masks.causal() & masks.window(2))
    assert read_program("longnet((16, 32), (1, 2))") == longnet((16, 32), (1, 2))
    assert read_order("hilbert(4, 8)") == hilbert(4, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cusal()", "no mask, order or program is called 'cusal'; did you mean causal?"),
        ("__import__('os')", "no mask, order or program is called '__import__'. Known: Branch"),
        ("x", "no mask, order or program is called 'x'"),
        ("causal", "causal is a function; write causal(...)"),
        ("causal() and window(2)", "joined by `&`, `|` and `~`, not by `and`, `or` and `not`"),
        ("not causal()", "not by `and`, `or` and `not`"),
        ("causal().period", "only calls of masks, orders and programs, literals"),
        ("causal().__class__()", "only calls of masks, orders and programs, literals"),
        ("window(2 ** 9)", "only calls of masks, orders and programs, literals"),
        ("[window(n) for n in (1, 2)]", "only calls of masks, orders and programs, literals"),
        ("lambda: 1", "only calls of masks, orders and programs, literals"),
        ("window(*(1, 2))", "`*` and `**` cannot stand here"),
        ("window(**{})", "`*` and `**` cannot stand here"),
        ("causal() & 3", "join masks; this is the int 3\n  causal() & 3\n             ^"),
        ("window(-1)", "left must be at least 0; got -1\n  window(-1)\n  ^"),
        ("window(1, foo=2)", "unexpected keyword argument 'foo'"),
        ("longnet((16,), (1, 2))", "must be of one length"),
        ("segments(8) &", "invalid syntax"),
        ("(1, 2", "was never closed"),
        ("", "invalid syntax"),
        ("hilbert(4, 4)", "is an order, and a program or a mask is needed"),
        ("Branch(causal())", "write Program((Branch(...),))"),
        ("3", "is the int 3, and a program or a mask is needed"),
        ("~" * 60 + "causal()", "nested more than 50 deep"),
        ("(" * 3000 + ")" * 3000, "nested"),
        ("~" * 9000 + "causal()", "nested"),
        ("causal() & " * 1000, "an expression may have 10,000 characters"),
        ("from_mod(3)", "no mask, order or program is called 'from_mod'"),
    ],
)
def test_refuses_what_is_no_program(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as error:
        read_program(text)
    assert message in str(error.value)
    assert run("plan", "--", text).exit_code == 2


def test_refuses_what_is_no_order() -> None:
    with pytest.raises(ExpressionError, match=r"'causal\(\)' is a mask, and an order is needed"):
        read_order("causal()")


# doctor


def test_doctor_passes_here() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.stdout
    names = [finding["name"] for finding in printed_json(result)["findings"]]
    assert names[:5] == ["python", "torch", "attention", "compiler", "native kernel"]


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "CHECKS", (doctor._python, doctor._compiler))
    result = run("doctor")
    assert result.exit_code == 1
    assert "no no-such-compiler on PATH" in result.stdout
    assert "fix: Debian, Ubuntu: apt install g++" in result.stdout


def test_doctor_with_a_broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho 'cannot find cc1plus' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    finding = doctor._compiler()
    assert finding.state == "failed"
    assert "cannot find cc1plus" in finding.detail


def test_doctor_without_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_DILATED_NATIVE", "off")
    finding = doctor._native()
    assert finding.state == "absent"
    assert "lowering 'auto' is a slower one: COMPILED_DILATED_NATIVE=off" in finding.detail


def test_doctor_reports_a_check_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def _compiler() -> doctor.Finding:
        raise OSError("\nno usable temporary directory")

    monkeypatch.setattr(doctor, "CHECKS", (_compiler, doctor._python))
    result = run("doctor")
    assert result.exit_code == 1
    assert "compiler  failed  OSError: no usable temporary directory" in result.stdout
    assert "python    ok" in result.stdout


def test_doctor_with_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert doctor._torch().state == "failed"
    monkeypatch.setattr(torch, "__version__", "2.11.0a0+gitabc")
    assert doctor._torch().state == "ok"


# recommend


@pytest.mark.parametrize("option", ["--seconds", "--tflops"])
@pytest.mark.parametrize("number", ["nan", "inf", "0", "-1", "1e-320", "1e300"])
def test_recommend_refuses_numbers_that_are_no_time_or_rate(option: str, number: str) -> None:
    result = run("recommend", "--tokens", "100", "--memory", "8GiB", "--json", option, number)
    assert result.exit_code == 2
    assert not result.stdout
    message = f"{option} must be above 0, from 1e-9 to 1e9, as"
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_recommend_prints_json_of_the_least_and_largest_numbers() -> None:
    for number in ("1e-9", "1e9"):
        options = ("--seconds", number, "--tflops", number, "--json")
        result = run("recommend", "--tokens", "1000000", "--memory", "8GiB", *options)
        json.loads(result.stdout, parse_constant=pytest.fail)


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        arguments.print_json({"number": float("nan")})


def test_recommend_names_a_length_that_the_pattern_has() -> None:
    request = Request(tokens=64, limit=140 * 2**20, batch=4096, training=True)
    start = "nothing fits: raise --memory, or lower --batch"
    dense, pattern = (recommend(request, text) for text in ("full()", "hilbert_window((8, 8), 3)"))
    assert dense.best is pattern.best is None
    assert dense.reason == f"{start}, or shorten the sequence to at most 2 tokens"
    # The grid has one length; dense attention beside it has shorter ones.
    assert [option.longest for option in pattern.options] == [0, 2]
    assert pattern.reason == start


def test_recommend_names_no_length_of_0_tokens() -> None:
    result = recommend(Request(tokens=4096, limit=100))
    assert result.best is None
    assert result.reason == "nothing fits: raise --memory"


# measure


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []
    times = measure.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_interleaved_stops_after_its_seconds() -> None:
    times = measure.interleaved({"a": lambda: time.sleep(0.02)}, repeats=50, warmup=0, seconds=0.05)
    assert 1 <= len(times["a"]) < 10


def test_peak_bytes_counts_results_and_freed_tensors() -> None:
    size = 64 * 2**20

    def function() -> torch.Tensor:
        return torch.ones(size // 4) + 1  # two at once

    assert measure.peak_bytes(function) == pytest.approx(2 * size, rel=0.1)


def test_peak_is_sampled_without_a_high_water_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_RESET_PEAK", Path("/no/such/file"))
    assert measure.peak_bytes(lambda: torch.ones(2**25).add_(1)) == pytest.approx(2**27, rel=0.2)


def test_hardware_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "results" / "one.json"
    measure.write_json(file, measure.hardware())
    assert json.loads(file.read_text())["torch"] == torch.__version__


def test_an_interrupted_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.json"
    measure.write_json(file, {"before": 1})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure.write_json(file, {"after": 2})
    assert json.loads(file.read_text()) == {"before": 1}
    assert os.listdir(tmp_path) == ["one.json"]
