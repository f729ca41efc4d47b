"""The ingredients of a library of native kernels: sources, flags, compiler, CPU."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

FLAGS = (
    "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fno-semantic-interposition", "-DNDEBUG",
)  # fmt: skip
# Instructions that the code may use: those of this CPU, of a level of CPUs, or of every CPU of the
# architecture.
INSTRUCTIONS = {
    "native": ("-march=native",),
    "avx512": (
        "-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
    ),
    "avx2": ("-march=x86-64-v3",),
    "any": (),
}  # fmt: skip
# Sources that are built into libraries of their own when a call first needs them, which keeps the
# first build short. All others are the part "core".
PARTS = {
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
# Sources with no inner loops: a lower optimisation level, which compiles faster, costs no speed.
_LEVELS = {
    "operators.cpp": "-Og",
    "inputs.cpp": "-Og",
    "attention.cpp": "-O1",
    "counts.cpp": "-O1",
    "masks.cpp": "-O1",
    "program.cpp": "-O1",
    "walk.cpp": "-O1",
}
_FULL_LEVEL = "-O3"
_COMPILERS = ("g++", "clang++")


class NativeUnavailable(RuntimeError):
    """The native kernels cannot be used here, with reason and remedy."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the bytes of a library.

    compiler: the command.
    version: what the compiler prints for --version.
    flags: of every source.
    links: of the library.
    sources: name and content of each file, headers included.
    part: "core", a value of `PARTS`, "forward" for all sources without gradients, or "whole" for
        all sources.
    isa: a key of `INSTRUCTIONS`.
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
        """The library's file name, with a digest of the recipe."""
        digest = hashlib.sha256()
        # Code for every CPU of a level depends on the architecture only.
        cpu = cpu_features() if self.isa == "native" else platform.machine()
        environment = (torch.__version__, cpu, self.version, self.part)
        for text in (*environment, *self.compiler, *self.flags, *self.links):
            digest.update(text.encode() + b"\0")
        for source, content in self.sources:
            header = f"{source}\0{optimisation_level(source)}\0{len(content)}\0"
            digest.update(header.encode() + content)
        return f"native-{digest.hexdigest()[:32]}.so"

    @property
    def units(self) -> list[str]:
        """The sources that are compiled, those that take longest first."""
        units = []
        for name, content in self.sources:
            if self._includes(name):
                is_light = optimisation_level(name) != _FULL_LEVEL
                units.append((is_light, -len(content), name))
        return [name for *_, name in sorted(units)]

    def _includes(self, source: str) -> bool:
        if not source.endswith(".cpp"):
            return False
        if self.part == "forward":
            return not source.startswith("backward") and PARTS.get(source) != "counts"
        return self.part in ("whole", PARTS.get(source, "core"))

    @property
    def title(self) -> str:
        """The name of the library in the line that a build prints."""
        is_part = self.part not in ("core", "whole", "forward")
        suffix = f"'s part '{self.part}'" if is_part else ""
        machines = {"native": "this machine", "any": "programs without Python"}
        machine = machines.get(self.isa, f"CPUs with {self.isa.upper()}")
        return f"the native kernel{suffix} for {machine}"


def recipe(
    sources: Path,
    defines: Sequence[str],
    part: str,
    core: Path | None,
    isa: str = "native",
) -> Recipe:
    """The recipe of a part on this machine.

    sources: the folder of C++ files.
    defines: macros, without -D.
    core: the library of the part "core", which other parts are linked against.
    isa: a key of `INSTRUCTIONS`.

    Raises NativeUnavailable without a compiler.
    """
    if sys.platform == "win32":
        raise NativeUnavailable(
            "the native kernels are not built on Windows; the other lowerings need no compiler"
        )
    compiler = find_compiler()
    torch_folder = Path(torch.__file__).parent
    macros = [f"-D{name}" for name in defines]
    flags = (*FLAGS, *INSTRUCTIONS[isa], *macros, f"-I{torch_folder / 'include'}")
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))
    contents = tuple((path.name, path.read_bytes()) for path in files)
    links = _links(torch_folder / "lib", core)
    return Recipe(compiler, _version(compiler), flags, links, contents, part, isa)


def _links(torch_libraries: Path, core: Path | None) -> tuple[str, ...]:
    links = ["-shared", f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}"]
    if sys.platform == "linux":
        # Undefined symbols fail at the link, not in a call; own symbols precede a program's.
        links += ["-Wl,-z,defs", "-Wl,-Bsymbolic"]
    links += ["-ltorch", "-ltorch_cpu", "-lc10"]
    if core is not None:
        links += [f"-L{core.parent}", f"-l:{core.name}", "-Wl,-rpath,$ORIGIN"]
    return tuple(links)


def optimisation_level(source: str) -> str:
    """The compiler's optimisation flag for a source."""
    return _LEVELS.get(source, _FULL_LEVEL)


def find_compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: CXX, or the first on PATH.

    Raises NativeUnavailable.
    """
    import shlex  # only a build needs it

    variable = os.environ.get("CXX", "").strip()
    if variable:
        command = shlex.split(variable)
        if shutil.which(command[0]) is None:
            raise NativeUnavailable(
                f"CXX={variable!r} names no program that can be found; "
                "set CXX to a C++17 compiler, or unset it"
            )
        return tuple(command)
    for name in _COMPILERS:
        if shutil.which(name) is not None:
            return (name,)
    raise NativeUnavailable(
        "no C++ compiler is on PATH; install g++ (Debian: apt install g++) or clang++, "
        "or set CXX to one"
    )


def _version(compiler: tuple[str, ...]) -> str:
    command = [*compiler, "--version"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(
            f"the C++ compiler {' '.join(compiler)!r} does not run: {error}"
        ) from error
    return process.stdout


def cpu_features() -> str:
    """The instruction sets of this CPU, which decide what -march=native compiles to."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.lower().startswith(("flags", "features")):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return f"{platform.machine()} {platform.processor()}"
