"""The library of native kernels, compiled once per machine.

    load -> library -> recipe (recipes.py) -> native-<digest of the recipe>.so (cache.py)
    _load_part -> the same for a part that a call first needs: functions, the backward, float64, AMX

A library is used if its bytes have the digest that was stored with it, and built again otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .cache import BUILDING, digest_file, folder, is_intact, locked, tidy, write_error
from .recipes import NativeUnavailable, Recipe, optimisation_level, recipe

__all__ = [
    "SOURCES",
    "NativeUnavailable",
    "available",
    "check_switch",
    "library",
    "load",
    "load_part",
]

SOURCES = Path(__file__).parent / "src"

# The values of COMPILED_DILATED_NATIVE.
_SWITCH = {"off": False, "on": True, "": True}
# Seconds to compile one source, for the estimate that a build prints.
_SECONDS_PER_SOURCE = 2


# Building -----------------------------------------------------------------------------------


def library(
    sources: Path | None = None,
    defines: Sequence[str] = (),
    part: str = "whole",
    core: Path | None = None,
    isa: str = "native",
) -> Path:
    """Build a library unless it exists; returns its path.

    sources: the folder of C++ files, by default this package's.
    defines: macros, without -D.
    part: the sources to take, "whole" for all, "forward" for all that a forward needs.
    core: the library of the part "core", which other parts need.
    isa: the instructions that the code may use, a key of `recipes.INSTRUCTIONS`.

    Raises NativeUnavailable.
    """
    ingredients = recipe(SOURCES if sources is None else sources, defines, part, core, isa)
    path = folder() / ingredients.name
    if not is_intact(path):
        with locked(path.parent):
            # Another process may have built it during the wait.
            if not is_intact(path):
                _build(ingredients, path)
                tidy(path.parent, path.name)
    with contextlib.suppress(OSError):
        os.utime(path)  # the time of last use
    return path


def _build(ingredients: Recipe, path: Path) -> None:
    jobs = min(len(ingredients.units), _cores())
    seconds = _SECONDS_PER_SOURCE * -(-len(ingredients.units) // jobs)
    print(
        f"compiled_dilated: building {ingredients.title}, once (about {seconds} s) ...",
        file=sys.stderr,
        flush=True,
    )
    try:
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=path.parent) as temporary:
            output = _compile(ingredients, Path(temporary), jobs)
            digest = Path(temporary) / "digest"
            digest.write_text(hashlib.sha256(output.read_bytes()).hexdigest() + "\n")
            # Atomic, the library first: a library without its digest is built again.
            os.replace(output, path)
            os.replace(digest, digest_file(path))
    except OSError as error:
        raise write_error(path.parent, error) from error


def _compile(ingredients: Recipe, into: Path, jobs: int) -> Path:
    """Compile the sources in `jobs` processes and link them; returns the library."""
    # 1. The contents of the recipe: the files may have been edited since its digest was taken.
    for name, content in ingredients.sources:
        (into / name).write_bytes(content)
    # 2. Compile in parallel; the first error cancels what has not started.
    compiler = ingredients.compiler
    flags = (*ingredients.flags, f"-fmacro-prefix-map={into}/=")
    objects, commands = [], []
    for unit in ingredients.units:
        output, level = str(into / f"{unit}.o"), optimisation_level(unit)
        objects.append(output)
        commands.append([*compiler, level, *flags, "-c", str(into / unit), "-o", output])
    pool = ThreadPoolExecutor(jobs)
    try:
        for _ in pool.map(_run, commands):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    # 3. Link.
    output = str(into / "library.so")
    _run([*compiler, *objects, *ingredients.links, "-o", output])
    return Path(output)


def _run(command: list[str]) -> None:
    """Run a compiler; raises NativeUnavailable with its first errors if it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    process = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment
    )
    if process.returncode == 0:
        return
    lines = process.stderr.splitlines()
    errors = [line for line in lines if "error:" in line or "undefined" in line] or lines
    raise NativeUnavailable(
        "the native kernels did not compile; set CXX to another C++17 compiler (g++ 12 is tested), "
        "or COMPILED_DILATED_NATIVE=off to do without.\n"
        f"{' '.join(command)} ended with {process.returncode}:\n" + "\n".join(errors[:5])
    )


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Loading ------------------------------------------------------------------------------------


_lock = threading.Lock()
# The state of this process's library: None before the first call, True, or why it failed.
_outcome: bool | NativeUnavailable | None = None


def load() -> None:
    """Build the library if needed, and register its operators with torch.

    Idempotent; a failure is remembered too. Raises NativeUnavailable.
    """
    global _outcome
    check_switch()
    with _lock:
        if _outcome is None:
            try:
                _open(library(part="core"))
                _outcome = True
            except NativeUnavailable as error:
                _outcome = error
        if isinstance(_outcome, NativeUnavailable):
            raise NativeUnavailable(*_outcome.args)


def available() -> str | None:
    """Build and load the native kernels; returns the reason of a failure."""
    try:
        load()
    except NativeUnavailable as error:
        return str(error)
    return None


def check_switch() -> None:
    """Raise NativeUnavailable where the environment turns the kernels off."""
    value = os.environ.get("COMPILED_DILATED_NATIVE", "")
    if value not in _SWITCH:
        raise ValueError(f"COMPILED_DILATED_NATIVE must be 'on' or 'off'; got {value!r}")
    if not _SWITCH[value]:
        raise NativeUnavailable(
            "COMPILED_DILATED_NATIVE=off turns the native kernels off; unset it to use them"
        )


def load_part(name: str) -> None:
    """Build a part if needed and open it. Raises NativeUnavailable."""
    load()
    with _lock:
        ctypes.CDLL(str(library(part=name, core=library(part="core"))))


# A callback from C++, where a part is first needed. C++ keeps its address, so it must stay alive.
_PartLoader = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@_PartLoader
def _load_part(name: bytes) -> None:
    try:
        with _lock:
            ctypes.CDLL(str(library(part=name.decode(), core=library(part="core"))))
    except NativeUnavailable as error:
        # No exception can pass through C++, which itself raises that the part is missing.
        print(f"compiled_dilated: {error}", file=sys.stderr, flush=True)


def _open(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
        core = ctypes.CDLL(str(path))
        if hasattr(core, "native_set_loader"):
            core.native_set_loader(_load_part)
    except OSError as error:
        raise NativeUnavailable(
            f"{path} cannot be opened: {error}; "
            "set COMPILED_DILATED_CACHE to a folder from which programs may run"
        ) from error
