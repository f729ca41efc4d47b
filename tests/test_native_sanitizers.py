"""Native kernels under the address sanitizer and the undefined-behavior sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.native_builds import compiler_with, report
from tests.support.native_table import NEAR, TABLE
from tests.support.native_tampering import TAMPERING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and Linux"
    ),
]

# Builds all parts before a sanitizer is loaded, which would slow the compiler down.
BUILD = """
from compiled_dilated.native import build, recipes
core = build.library(part="core")
for part in sorted(set(recipes.PARTS.values())):
    build.library(part=part, core=core)
"""


def runtime(name: str) -> str:
    """The path of a sanitizer's library.

    The name alone where the compiler has none.
    """
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of processes whose kernels check every address and every undefined step."""
    folder = tmp_path_factory.mktemp("sanitized")
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("this compiler brings no sanitizers")
    flags = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1", "-O1")
    environment = {
        "CXX": compiler_with(folder / "compiler", *flags),
        "COMPILED_DILATED_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-c", BUILD]
    subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, check=True)
    return {
        **environment,
        "LD_PRELOAD": ":".join(os.path.realpath(path) for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=0",
        "OMP_NUM_THREADS": "2",
    }


def test_sanitizers_report_nothing(fresh_python: Any, sanitized: dict[str, str]) -> None:
    process = fresh_python("-c", TABLE.replace("()", "(6)"), **sanitized)
    assert "runtime error" not in process.stderr, report(process)
    assert "AddressSanitizer" not in process.stderr, report(process)
    assert process.returncode == 0, report(process)
    assert process.stdout.endswith(NEAR), report(process)


def test_sanitizers_report_no_bad_address_of_tampered_code(
    fresh_python: Any, sanitized: dict[str, str]
) -> None:
    """Sums of tampered numbers may overflow, which is harmless and only printed."""
    process = fresh_python("-c", TAMPERING, "7", "500", **sanitized)
    assert "AddressSanitizer" not in process.stderr, report(process)
    assert process.stdout.endswith("alive\n"), report(process)
    steps = {line for line in process.stderr.splitlines() if "runtime error" in line}
    print("undefined steps:", *sorted(steps), sep="\n")
