"""The kernel as libraries in one folder, for programs without Python.

stem.so          the library to open: defines the operators, and opens the kernels for the CPU
stem.avx512.so   kernels for CPUs with AVX-512, with AMX where available
stem.avx2.so     kernels for CPUs with AVX2
stem.native.so   in place of these two: kernels for the CPU that built them
stem.checks.so   in place of all kernels, of a package for a GPU: the check of its inputs
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from . import build

ISAS = ("avx2", "native")
# From torch's names of CPU levels to those of door.cpp.
_LEVELS = {"AVX2": "avx2", "AVX512": "avx512"}


def kernels_for(isa: str) -> tuple[str, ...]:
    """The kernels of a package for these instructions, the fastest first."""
    return ("native",) if isa == "native" else ("avx512", "avx2")


def write(library: Path, isa: str) -> dict[str, Path]:
    """Write the files of a library; returns them by suffix.

    library: the path of stem.so.
    isa: "avx2" for every CPU with AVX2, "native" for this one.

    Raises NativeUnavailable.
    """
    build.check_switch()
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    defines = (f"NATIVE_LEVEL={level}",) if isa == "native" else ()
    libraries = {".so": build.library(build.SOURCES / "door", defines, isa="any")}
    for kernels in kernels_for(isa):
        libraries[f".{kernels}.so"] = build.library(part="forward", isa=kernels)
    return _copied(libraries, library)


def write_checks(library: Path) -> dict[str, Path]:
    """As `write`, with the check of inputs alone: for a GPU."""
    build.check_switch()
    libraries = {
        ".so": build.library(build.SOURCES / "door", ("CHECKS_ALONE",), isa="any"),
        ".checks.so": build.library(part="inputs", isa="any"),
    }
    return _copied(libraries, library)


def _copied(libraries: Mapping[str, Path], library: Path) -> dict[str, Path]:
    """Copies of libraries beside each other, by suffix."""
    files = {}
    for suffix, path in libraries.items():
        files[suffix] = Path(shutil.copyfile(path, library.with_suffix(suffix)))
    return files


def best_kernels(isa: str) -> str | None:
    """The kernels that door.cpp chooses on this CPU; None if none suit."""
    level = torch.backends.cpu.get_cpu_capability()
    runs = {"native": True, "avx512": level == "AVX512", "avx2": level in _LEVELS}
    return next((kernels for kernels in kernels_for(isa) if runs[kernels]), None)


def why_not_portable() -> str | None:
    """Why no code for other CPUs can be built; None if possible."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"levels of CPUs are those of x86-64, and this machine is {platform.machine()}"
    from torch._inductor import config

    if not hasattr(config.cpp, "march"):
        return f"torch {torch.__version__} compiles for its own CPU alone (2.13 does not)"
    return None


def sources_digest() -> str:
    """The SHA-256 of the sources, which define what encoded programs mean."""
    digest = hashlib.sha256()
    for path in sorted(build.SOURCES.rglob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
