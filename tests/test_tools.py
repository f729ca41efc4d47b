"""The scripts in tools/ say what is missing, and fail; those in benchmarks/ start."""

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
    """`setup_on(python3="exit 0")`: runs tools/setup where only these programs (bodies of sh scripts) are on PATH."""
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
        return subprocess.run(
            [str(ROOT / "tools/setup"), *arguments], env=environment, capture_output=True, text=True
        )

    return run


def python_where(code: str) -> str:
    """A python3 that differs from this one by `code`, as far as tools/setup can tell."""
    return f'exec {sys.executable} -c "import sys, os; {code}; exec(sys.argv[1])" "$2"'


GXX = {"g++": "exit 0"}
THIS = f"python3.{sys.version_info.minor}"


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        pytest.param({}, "no C++ compiler 'g++' on PATH", id="no compiler"),
        pytest.param(
            GXX, "3.11 or newer with venv and its C headers is needed. Found: none", id="no python"
        ),
        pytest.param(
            GXX | {"python3": python_where("sys.version_info = (3, 9)")},
            "python3 is Python 3.9; 3.11 or newer is needed",
            id="old python",
        ),
        pytest.param(
            GXX | {"python3": "echo 'no such version'; exit 127"},
            "python3 no such version",
            id="launcher without a python",
        ),
        pytest.param(
            GXX | {"python3": python_where("sys.modules['venv'] = None")},
            f"python3 cannot make virtual environments; Debian, Ubuntu: apt install {THIS}-venv",
            id="no venv",
        ),
        pytest.param(
            GXX | {"python3": python_where("os.path.exists = lambda path: False")},
            f"python3 has no Python.h, which torch.compile needs; Debian, Ubuntu: apt install {THIS}-dev",
            id="no headers",
        ),
    ],
)
def test_setup_says_what_is_missing(
    setup_on: Any, tmp_path: Path, programs: dict[str, str], message: str
) -> None:
    run = setup_on(**programs)
    assert run.returncode == 1
    assert message in run.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_refuses_an_unknown_argument(setup_on: Any) -> None:
    run = setup_on("all")
    assert run.returncode == 1
    assert "unknown argument 'all'; expected nothing or 'dev'" in run.stderr


def test_gpu_check_without_a_gpu(fresh_python: Any, tmp_path: Path) -> None:
    run = fresh_python(
        "tools/gpu_check", "--json", str(tmp_path / "out.json"), CUDA_VISIBLE_DEVICES=""
    )
    assert run.returncode == 2
    assert (
        "finds no GPU (torch.cuda.is_available() is False). Run this on a machine with a GPU"
        in run.stderr
    )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmarks_say_what_they_measure(fresh_python: Any, script: str) -> None:
    run = fresh_python(f"benchmarks/{script}", "--help")
    assert run.returncode == 0, run.stderr
    assert "--json" in run.stdout
