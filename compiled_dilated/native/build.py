"""The library of native kernels: compiled once on a machine, by its own compiler, and kept by content.

    load -> library -> a recipe (sources, flags, compiler, CPU) -> native-<digest of the recipe>.so, and .so.sha256 beside it
    _load_part -> the same for a part that a call first needs: functions, the backward, float64, AMX

A library is used only where its bytes have the digest that was written with it; anything else is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "src"

_COMPILERS = ("g++", "clang++")
_FLAGS = (
    "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-semantic-interposition",
    "-DNDEBUG",
)  # fmt: skip
# What the code may use: this CPU's own instructions, those of a level of CPUs, or of every CPU of the architecture.
_INSTRUCTIONS = {
    "native": ("-march=native",),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx2": ("-march=x86-64-v3",),
    "any": (),
}
# Sources in which a call spends next to no time: the first call waits less for them.
_LIGHT = {
    "operators.cpp": "-Og",
    "inputs.cpp": "-Og",
    "attention.cpp": "-O1",
    "counts.cpp": "-O1",
    "masks.cpp": "-O1",
    "program.cpp": "-O1",
    "walk.cpp": "-O1",
}
# Sources that are built into libraries of their own when a call first needs them, so that the first call waits for few.
_PARTS = {
    "functions.cpp": "functions",
    "function_part.cpp": "functions",
    "function_loops.cpp": "functions",
    "function_bounds.cpp": "functions",
    "forward_amx.cpp": "amx",
    "counts.cpp": "counts",
    "inputs.cpp": "inputs",
    "backward_amx.cpp": "backward_amx",
    "backward_f32.cpp": "backward",
    "forward_f64.cpp": "double",
    "backward_f64.cpp": "double",
}
# What a shell has in COMPILED_DILATED_NATIVE.
_SWITCH = {"off": False, "on": True, "": True}
# Seconds that one source takes, for the line that a user reads while waiting.
_SECONDS_A_SOURCE = 2
# The kinds of machines that share a home directory, times versions in use.
_MOST_KEPT = 48
_STALE_SECONDS = 3600.0


class NativeUnavailable(RuntimeError):
    """The native kernels cannot be used here; the text says why, and what to do."""


# What is built --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """All that decides what comes out.

    compiler: its command. version: what it says of itself. flags, links: of every source, and of the library.
    sources: by name, headers too. part: "core", one of the others, "forward" for all of these that compute no gradients, or
    "whole". isa: a key of _INSTRUCTIONS.
    """

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    links: tuple[str, ...]
    sources: tuple[tuple[str, bytes], ...]
    part: str
    isa: str

    @property
    def name(self) -> str:
        """The library's file name."""
        digest = hashlib.sha256()
        cpu = _cpu() if self.isa == "native" else platform.machine()
        for text in (torch.__version__, cpu, self.version, self.part, *self.compiler, *self.flags, *self.links):
            digest.update(text.encode() + b"\0")
        for source, content in self.sources:
            digest.update(f"{source}\0{_level(source)}\0{len(content)}\0".encode() + content)
        return f"native-{digest.hexdigest()[:32]}.so"

    @property
    def units(self) -> list[str]:
        """The sources that become objects, the longest first."""
        units = [(_level(name) != "-O3", -len(content), name) for name, content in self.sources if self._holds(name)]
        return [name for *_, name in sorted(units)]

    def _holds(self, unit: str) -> bool:
        if self.part == "forward":
            return unit.endswith(".cpp") and not unit.startswith("backward") and _PARTS.get(unit) != "counts"
        return unit.endswith(".cpp") and self.part in ("whole", _PARTS.get(unit, "core"))

    @property
    def title(self) -> str:
        """What a user reads while it is built."""
        of_part = f"'s part '{self.part}'" if self.part not in ("core", "whole", "forward") else ""
        cpus = {"native": "this machine", "any": "programs without Python"}.get(self.isa, f"CPUs with {self.isa.upper()}")
        return f"the native kernel{of_part} for {cpus}"


def _level(unit: str) -> str:
    """How far the compiler optimises a source."""
    return _LIGHT.get(unit, "-O3")


def _recipe(sources: Path, defines: Sequence[str], part: str, core: Path | None, isa: str) -> _Recipe:
    if sys.platform == "win32":
        raise NativeUnavailable("the native kernels are not built on Windows; the other lowerings need no compiler")
    compiler = _compiler()
    torch_at = Path(torch.__file__).parent
    library_at = torch_at / "lib"
    flags = (*_FLAGS, *_INSTRUCTIONS[isa], *(f"-D{name}" for name in defines), f"-I{torch_at / 'include'}")
    strict = ("-Wl,-z,defs", "-Wl,-Bsymbolic") if sys.platform == "linux" else ()
    beside = () if core is None else (f"-L{core.parent}", f"-l:{core.name}", "-Wl,-rpath,$ORIGIN")
    links = ("-shared", f"-L{library_at}", f"-Wl,-rpath,{library_at}", *strict, "-ltorch", "-ltorch_cpu", "-lc10", *beside)
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))
    return _Recipe(compiler, _version(compiler), flags, links, tuple((path.name, path.read_bytes()) for path in files), part, isa)


def _compiler() -> tuple[str, ...]:
    import shlex  # with its first use

    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise NativeUnavailable(
                f"CXX={chosen!r} names no program that can be found; set CXX to a C++17 compiler, or unset it"
            )
        return tuple(command)
    for name in _COMPILERS:
        if shutil.which(name) is not None:
            return (name,)
    raise NativeUnavailable("no C++ compiler is on PATH; install g++ (Debian: apt install g++) or clang++, or set CXX to one")


def _version(compiler: tuple[str, ...]) -> str:
    try:
        said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the C++ compiler {' '.join(compiler)!r} does not run: {error}") from error
    return said.stdout


def _cpu() -> str:
    """What this machine's CPU can do: -march=native makes another library for another one."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.lower().startswith(("flags", "features")):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return f"{platform.machine()} {platform.processor()}"


# Where it is kept -----------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Make the user's own folder of libraries, or check the one there is."""
    named = os.environ.get("COMPILED_DILATED_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(named) if named else base / "compiled_dilated"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = path.stat()
    except OSError as error:
        raise NativeUnavailable(f"{path} cannot be made: {error}; set COMPILED_DILATED_CACHE to a folder of your own") from error
    way_out = f"use `chmod 700 {path}`, or set COMPILED_DILATED_CACHE to a folder of your own"
    if state.st_uid != os.getuid():
        raise NativeUnavailable(f"{path} belongs to user {state.st_uid}, who could put code there; {way_out}")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailable(f"{path} is writable by others, who could put code there; {way_out}")
    return path


def _is_whole(library: Path) -> bool:
    """Whether the library is there, byte by byte as it was built."""
    try:
        written = _digest_file(library).read_text().strip()
        return written == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


@contextlib.contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """One process builds and others wait; a process that dies lets go. File systems without locks build more than once."""
    import fcntl

    with open(kept / ".lock", "a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tidy(kept: Path, built: str) -> None:
    """Remove what killed builds left, and the libraries that were used least lately."""
    for path in kept.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    libraries = [path for path in kept.glob("native-*.so") if path.name != built]
    for path in sorted(libraries, key=_used, reverse=True)[_MOST_KEPT - 1 :]:
        for each in (path, _digest_file(path)):
            each.unlink(missing_ok=True)


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# How it is built ------------------------------------------------------------------------------------------------------------


def library(
    sources: Path | None = None,
    defines: Sequence[str] = (),
    part: str = "whole",
    core: Path | None = None,
    isa: str = "native",
) -> Path:
    """Build the library of these sources if it is not there, and return its path.

    part: the sources to take, "whole" for all, "forward" for all that a forward needs.
    core: the library of the part "core", which other parts need.
    isa: the instructions that the code may use, a key of _INSTRUCTIONS.

    Raises NativeUnavailable.
    """
    recipe = _recipe(SOURCES if sources is None else sources, defines, part, core, isa)
    kept = folder()
    path = kept / recipe.name
    if not _is_whole(path):
        with _alone(kept):
            if not _is_whole(path):
                _build(recipe, path)
                _tidy(kept, path.name)
    with contextlib.suppress(OSError):
        os.utime(path)
    return path


def _build(recipe: _Recipe, path: Path) -> None:
    at_once = min(len(recipe.units), _cores())
    seconds = _SECONDS_A_SOURCE * -(-len(recipe.units) // at_once)
    print(
        f"compiled_dilated: building {recipe.title}, once (about {seconds} s) ...",
        file=sys.stderr,
        flush=True,
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as temporary:
            made = _compile(recipe, Path(temporary), at_once)
            digest = Path(temporary) / "digest"
            digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest() + "\n")
            os.replace(made, path)
            os.replace(digest, _digest_file(path))
    except OSError as error:
        raise NativeUnavailable(f"the native kernels cannot be kept in {path.parent}: {error}") from error


def _compile(recipe: _Recipe, into: Path, at_once: int) -> Path:
    """Compile every source as it was read, whoever edits it meanwhile, some at a time, and link them."""
    made = into / "library.so"
    for name, content in recipe.sources:
        (into / name).write_bytes(content)
    flags = (*recipe.flags, f"-fmacro-prefix-map={into}/=")
    objects = [str(into / f"{unit}.o") for unit in recipe.units]
    commands = [
        [*recipe.compiler, _level(unit), *flags, "-c", str(into / unit), "-o", to]
        for unit, to in zip(recipe.units, objects, strict=True)
    ]
    pool = ThreadPoolExecutor(at_once)
    try:
        for _ in pool.map(_run, commands):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    _run([*recipe.compiler, *objects, *recipe.links, "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error:" in line or "undefined" in line] or lines
        raise NativeUnavailable(
            "the native kernels did not compile; set CXX to another C++17 compiler (g++ 12 is tested), or "
            f"COMPILED_DILATED_NATIVE=off to do without.\n{' '.join(command)} ended with {done.returncode}:\n"
            + "\n".join(errors[:5])
        )


def _cores() -> int:
    """How many processes may run at a time here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# How it is used -------------------------------------------------------------------------------------------------------------


_lock = threading.Lock()
# What became of this process's library: nothing yet, loaded, or the reason why not.
_outcome: bool | NativeUnavailable | None = None


def load() -> None:
    """Build the library if needed and let torch run the operators from it.

    Once in a process; a failure is remembered too. Raises NativeUnavailable.
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
    """None if the native kernels can be used, which builds and loads them; else the reason why not."""
    try:
        load()
    except NativeUnavailable as error:
        return str(error)
    return None


def check_switch() -> None:
    """Raise NativeUnavailable where the environment turns the kernels off."""
    said = os.environ.get("COMPILED_DILATED_NATIVE", "")
    if said not in _SWITCH:
        raise ValueError(f"COMPILED_DILATED_NATIVE must be 'on' or 'off'; got {said!r}")
    if not _SWITCH[said]:
        raise NativeUnavailable("COMPILED_DILATED_NATIVE=off turns the native kernels off; unset it to use them")


def load_part(name: str) -> None:
    """Build a part if needed and open it. Raises NativeUnavailable."""
    load()
    with _lock:
        ctypes.CDLL(str(library(part=name, core=library(part="core"))))


# Called from C++ where a part is first needed; kept, as C++ holds it for good.
_NEED = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@_NEED
def _load_part(name: bytes) -> None:
    try:
        with _lock:
            ctypes.CDLL(str(library(part=name.decode(), core=library(part="core"))))
    except NativeUnavailable as error:  # C++ says that the part is missing; the reason stands here
        print(f"compiled_dilated: {error}", file=sys.stderr, flush=True)


def _open(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
        core = ctypes.CDLL(str(path))
        if hasattr(core, "native_set_loader"):
            core.native_set_loader(_load_part)
    except OSError as error:
        raise NativeUnavailable(
            f"{path} cannot be opened: {error}; set COMPILED_DILATED_CACHE to a folder from which programs may run"
        ) from error
