"""Native kernels compiled for other x86-64 machines.

A kernel runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.native_builds import compiler_with, report
from tests.support.native_table import NEAR, TABLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and Linux"
    ),
]

SUBJECTS = (
    "threads", "counts", "sizes", "strides", "data", "nonfinite", "accuracy", "tampering",
)  # fmt: skip
# Flags in /proc/cpuinfo of what g++ emits for a machine.
_V2 = "ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm"
_HASWELL = f"{_V2} avx avx2 fma f16c bmi1 bmi2 abm movbe"
FLAGS = {
    "haswell": _HASWELL,
    "x86-64-v2": _V2,
    "x86-64": "",
    "skylake-avx512": f"{_HASWELL} adx rdseed clwb avx512f avx512cd avx512bw avx512dq avx512vl",
}
QUICK_TESTS = tuple(f"tests/test_native_{subject}.py" for subject in SUBJECTS)


def environment_of(machine: str, folder: Path) -> dict[str, str]:
    """Environment variables of a process with kernels for a machine.

    The kernels are in a cache of their own.
    """
    return {
        "CXX": compiler_with(folder / "compiler", f"-march={machine}"),
        "COMPILED_DILATED_CACHE": str(folder / "cache"),
    }


def parameters(*machines: str) -> list[Any]:
    """The machines; those that this one is not are skipped."""
    flags: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("flags"):
                flags.update(line.partition(":")[2].split())
    out = []
    for machine in machines:
        missing = sorted(set(FLAGS[machine].split()) - flags)
        reason = f"this machine is no {machine}: it has no {' '.join(missing)}"
        out.append(pytest.param(machine, marks=pytest.mark.skipif(bool(missing), reason=reason)))
    return out


@pytest.mark.parametrize("machine", parameters(*FLAGS))
def test_other_vectors_give_the_same(machine: str, fresh_python: Any, tmp_path: Path) -> None:
    """AVX2, SSE and AVX-512 without AMX tiles."""
    process = fresh_python("-c", TABLE, **environment_of(machine, tmp_path))
    assert process.returncode == 0, report(process)
    assert process.stdout.endswith(NEAR), report(process)


@pytest.mark.parametrize("machine", parameters("haswell", "x86-64-v2"))
def test_the_quick_tests_of_other_vectors(machine: str, tmp_path: Path) -> None:
    """Quick tests of native operators with kernels for another machine.

    Without FMA every product is rounded: errors are then not compared with torch's, whose kernels
    use this machine's FMA.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK_TESTS]
    if machine == "x86-64-v2":
        command += ["-k", "not errors_are_no_larger_than_torchs"]
    environment = {**os.environ, **environment_of(machine, tmp_path)}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert process.returncode == 0, process.stdout[-6000:]
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed is not None, process.stdout[-6000:]
    assert int(passed[1]) > 0
