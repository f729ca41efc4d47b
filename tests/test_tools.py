"""Scripts in tools/ report missing programs; scripts in benchmarks/ start."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
USED_BY_SETUP = ("bash", "cat", "cksum", "dirname", "env", "head", "rm")


@pytest.fixture
def setup_on(tmp_path: Path) -> Any:
    """A function that runs tools/setup with only some programs on PATH.

    setup_on(python3="exit 0"): the programs, as bodies of sh scripts.
    """
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for tool in USED_BY_SETUP:
        (bin_folder / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool} here"))

    def run(*arguments: str, **programs: str) -> subprocess.CompletedProcess[str]:
        for name, body in programs.items():
            file = bin_folder / name
            file.write_text(f"#!/bin/sh\n{body}\n")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        environment = {"PATH": str(bin_folder), "COMPILED_DILATED_VENV": str(tmp_path / "venv")}
        command = [str(ROOT / "tools/setup"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def python_after(code: str) -> str:
    """This Python as a script, which executes `code` before that of tools/setup."""
    return f'exec {sys.executable} -c "import sys, os; {code}; exec(sys.argv[1])" "$2"'


PYTHON = f"python3.{sys.version_info.minor}"
# By id: python3 on PATH (None: no python3), and the message; g++ is there in all cases.
MISSING = {
    "no python": (None, "3.11 or newer with venv and its C headers is needed. Found: none"),
    "old python": (
        python_after("sys.version_info = (3, 9)"),
        "python3 is Python 3.9; 3.11 or newer is needed",
    ),
    "launcher without a python": (
        "echo 'no such version'; exit 127",
        "python3 no such version",
    ),
    "no venv": (
        python_after("sys.modules['venv'] = None"),
        f"python3 cannot make virtual environments; Debian, Ubuntu: apt install {PYTHON}-venv",
    ),
    "no headers": (
        python_after("os.path.exists = lambda path: False"),
        "python3 has no Python.h, which torch.compile needs; "
        f"Debian, Ubuntu: apt install {PYTHON}-dev",
    ),
}


def test_setup_needs_a_compiler(setup_on: Any, tmp_path: Path) -> None:
    run = setup_on()
    assert run.returncode == 1
    assert "no C++ compiler 'g++' on PATH" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_leaves_the_environment_of_another_checkout_alone(
    setup_on: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (tmp_path / "venv").symlink_to(other)
    run = setup_on(**{"g++": "exit 0", "python3": f'exec {sys.executable} "$@"'})
    assert run.returncode == 1
    assert "is a link, to an environment that was set up for another checkout" in run.stderr
    assert [path.name for path in other.iterdir()] == ["bin"]


@pytest.mark.parametrize(("python", "message"), MISSING.values(), ids=list(MISSING))
def test_setup_needs_a_usable_python(
    setup_on: Any, tmp_path: Path, python: str | None, message: str
) -> None:
    run = setup_on(**{"g++": "exit 0"}, **({} if python is None else {"python3": python}))
    assert run.returncode == 1
    assert message in run.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_refuses_an_unknown_argument(setup_on: Any) -> None:
    run = setup_on("all")
    assert run.returncode == 1
    assert "unknown argument 'all'; expected nothing or 'dev'" in run.stderr


def test_gpu_check_without_a_gpu(fresh_python: Any, tmp_path: Path) -> None:
    target = str(tmp_path / "out.json")
    run = fresh_python("tools/gpu_check", "--json", target, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    message = "finds no GPU (torch.cuda.is_available() is False). Run this on a machine with a GPU"
    assert message in run.stderr
    assert not os.listdir(tmp_path)


# Runs each script as __main__ with --help, and prints its name if the help names --json.
HELP = """
import contextlib, io, runpy, sys
scripts = sys.argv[1:]
sys.argv[1:] = ["--help"]
for script in scripts:
    text = io.StringIO()
    sys.path[0] = script.rpartition("/")[0]
    sys.argv[0] = script
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, script
    assert "--json" in text.getvalue(), script
    print(script)
"""


def test_benchmarks_have_help(fresh_python: Any) -> None:
    """In one process: importing torch takes longer than a help text."""
    scripts = sorted(str(path) for path in (ROOT / "benchmarks").glob("*.py"))
    run = fresh_python("-c", HELP, *scripts)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == scripts
