"""The build of native libraries: cache, folder, failures, the switch."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_dilated.native import build, cpp, recipes
from compiled_dilated.native.build import NativeUnavailable
from compiled_dilated.native.cache import folder
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


ANSWER = """
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("COMPILED_DILATED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMPILED_DILATED_NATIVE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A library of one function."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "answer.cpp").write_text(ANSWER)
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    return folder


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def no_compiler(command: list[str]) -> None:
    raise AssertionError(f"compiled again: {command}")


def wrapper(path: Path, before: str) -> str:
    """A compiler that does something first."""
    path.write_text(f'#!/bin/sh\n{before}\nexec {os.environ.get("CXX", "g++")} "$@"\n')
    path.chmod(0o700)
    return str(path)


def test_library_is_built_once(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = build.library(sources)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "compiled_dilated: building the native kernel for this machine, once (about "
    )
    monkeypatch.setattr(build, "_run", no_compiler)
    assert build.library(sources) == first
    assert capfd.readouterr().err == ""
    assert answer(first) == 42


DAMAGES = (
    "tampered", "truncated", "empty", "missing", "digest missing", "digest of another library",
    "digest is no text",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again(sources: Path, damage: str) -> None:
    library = build.library(sources)
    good, digest = library.read_bytes(), library.with_name(library.name + ".sha256")
    if damage == "tampered":
        library.write_bytes(good.replace(b"answer", b"Answer", 1))
    elif damage == "truncated":
        library.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "missing":
        library.unlink()
    elif damage == "digest missing":
        digest.unlink()
    elif damage == "digest of another library":
        digest.write_bytes(b"0" * 64)
    else:
        digest.write_bytes(b"\xff\xfe")
    assert build.library(sources) == library
    assert library.read_bytes() == good


def test_library_name_depends_on_all_build_inputs(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {build.library(sources).name, build.library(sources, defines=("ELSE",)).name}
    monkeypatch.setattr(recipes, "cpu_features", lambda: "another CPU")
    names.add(build.library(sources).name)
    monkeypatch.undo()
    monkeypatch.setenv("COMPILED_DILATED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "__version__", "another torch")
    names.add(build.library(sources).name)
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    changed = build.library(sources)
    assert answer(changed) == 43
    assert len(names | {changed.name}) == 5


PROBE = """
import ctypes, sys
from pathlib import Path
from compiled_dilated.native import build
print(ctypes.CDLL(str(build.library(Path(sys.argv[1])))).answer())
"""


def start(sources: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that builds."""
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, str(sources)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_build_once(sources: Path, tmp_path: Path) -> None:
    slow = wrapper(tmp_path / "slow", 'case "$*" in *-c*) sleep 1 ;; esac')
    processes = [start(sources, CXX=slow) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in outputs] == ["42", "42"]
    assert sorted(len(err.splitlines()) for _, err in outputs) == [0, 1]


def test_a_killed_build_harms_nothing(sources: Path, tmp_path: Path, cache: Path) -> None:
    hanging = wrapper(tmp_path / "hanging", 'case "$*" in *--version*) ;; *) sleep 3 ;; esac')
    process = start(sources, CXX=hanging)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".building-*/")):
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (leftover,) = cache.glob(".building-*")
    assert answer(build.library(sources)) == 42
    assert leftover.exists()  # it is recent: the build may still run
    os.utime(leftover, (0, 0))
    build.library(sources, defines=("ELSE",))
    assert not leftover.exists()


def test_least_recently_used_libraries_are_removed(sources: Path, cache: Path) -> None:
    cache.mkdir(mode=0o700)
    for number in range(60):
        for name in (f"native-{number}.so", f"native-{number}.so.sha256"):
            (cache / name).write_text("")
            os.utime(cache / name, (number, number))
    library = build.library(sources)
    names = {path.name for path in cache.glob("native-*.so")}
    assert names == {library.name} | {f"native-{number}.so" for number in range(13, 60)}
    assert len(list(cache.glob("*.sha256"))) == len(names)


def test_cache_folder_writable_by_others_is_refused(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.library(sources)
    assert cache.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o702):
        cache.chmod(mode)
        with pytest.raises(
            NativeUnavailable,
            match=r"is writable by others, who could put code there; use `chmod 700",
        ):
            build.library(sources)
    cache.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(
        NativeUnavailable, match=r"belongs to user \d+, .* set COMPILED_DILATED_CACHE"
    ):
        build.library(sources)


def test_cache_folder_that_cannot_be_created_raises(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPILED_DILATED_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        NativeUnavailable, match=r"cannot be created: .* set COMPILED_DILATED_CACHE"
    ):
        build.library(sources)


def test_cache_folder_that_takes_no_file_raises(sources: Path, cache: Path) -> None:
    # A folder stands for any reason why the lock cannot be opened, as a read-only disk.
    (cache / ".lock").mkdir(parents=True)
    cache.chmod(0o700)
    with pytest.raises(NativeUnavailable, match=r"cannot be kept in .* set COMPILED_DILATED_CACHE"):
        build.library(sources)


def test_a_user_without_a_home_directory_raises(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folder() == cache
    monkeypatch.delenv("COMPILED_DILATED_CACHE")
    with pytest.raises(
        NativeUnavailable, match=r"has no home directory .* set COMPILED_DILATED_CACHE"
    ):
        build.library(sources)


def test_cache_folder_follows_environment_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPILED_DILATED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "compiled_dilated"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == tmp_path / "home" / ".cache" / "compiled_dilated"


def test_missing_compiler_raises(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler is on PATH; install g\\+\\+"):
        build.library(sources)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeUnavailable, match="CXX='no-such-compiler' names no program"):
        build.library(sources)


def test_failing_compiler_raises(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", wrapper(tmp_path / "broken", "exit 3"))
    with pytest.raises(NativeUnavailable, match=r"does not run: .*exit status 3"):
        build.library(sources)


def test_failed_build_reports_compiler_errors(sources: Path, cache: Path) -> None:
    (sources / "wrong.cpp").write_text("int wrong() { return nothing; }\n")
    with pytest.raises(
        NativeUnavailable, match=r"did not compile; set CXX(.|\n)*'nothing' was not declared"
    ):
        build.library(sources)
    (sources / "wrong.cpp").write_text("int missing();\nint right() { return missing(); }\n")
    with pytest.raises(NativeUnavailable, match="undefined reference to `missing"):
        build.library(sources)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_a_failed_build_is_not_repeated(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "SOURCES", sources)
    (sources / "wrong.cpp").write_text("wrong\n")
    reason = build.available()
    assert reason is not None
    assert "did not compile" in reason
    monkeypatch.setattr(build, "_run", no_compiler)
    assert build.available() == reason
    with pytest.raises(NativeUnavailable, match="did not compile"):
        build.load()


def test_a_library_that_cannot_be_opened(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "library", lambda **parts: sources / "answer.h")
    assert "cannot be opened" in (build.available() or "")


def test_environment_switch_disables_native_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMPILED_DILATED_NATIVE", "off")
    assert (
        build.available()
        == "COMPILED_DILATED_NATIVE=off turns the native kernels off; unset it to use them"
    )
    with pytest.raises(NativeUnavailable, match="COMPILED_DILATED_NATIVE=off"):
        cpp.write(tmp_path / "kernel.so", "native")
    monkeypatch.setenv("COMPILED_DILATED_NATIVE", "no")
    with pytest.raises(ValueError, match="must be 'on' or 'off'; got 'no'"):
        build.available()


FIRST = """
import time
from compiled_dilated.native import build
start = time.perf_counter()
build.load()
print(f"{time.perf_counter() - start:.3f}")
"""


@pytest.mark.slow
def test_the_kernels_build_and_load_again(fresh_python: Any, cache: Path) -> None:
    seconds = {}
    for name in ("cold", "warm"):
        done = fresh_python("-c", FIRST, COMPILED_DILATED_CACHE=str(cache))
        assert done.returncode == 0, done.stderr
        seconds[name] = float(done.stdout)
    print("seconds to the first call:", seconds, "cores:", build._cores())
    assert seconds["warm"] < seconds["cold"]
