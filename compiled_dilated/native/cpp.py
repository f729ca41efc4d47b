"""The kernel as files beside each other, for programs without Python.

stem.so          what such a program opens: it defines the operators, and opens that one of the others which the CPU runs
stem.avx512.so   for CPUs with AVX-512, with AMX where they have it
stem.avx2.so     for CPUs with AVX2
stem.native.so   in place of these two: for the CPU that built it alone
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from pathlib import Path

import torch

from . import build

ISAS = ("avx2", "native")
# What torch calls the levels that door.cpp knows.
_LEVELS = {"AVX2": "avx2", "AVX512": "avx512"}


def kernels_for(isa: str) -> tuple[str, ...]:
    """The kernels of a package whose code may use these instructions, the fastest first."""
    return ("native",) if isa == "native" else ("avx512", "avx2")


def write(library: Path, isa: str) -> dict[str, Path]:
    """Write the files of a library.so, and return them by what stands behind the stem. Raises NativeUnavailable.

    isa: "avx2" for every CPU with AVX2, "native" for this one.
    """
    build.check_switch()
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    defines = (f"NATIVE_LEVEL={level}",) if isa == "native" else ()
    libraries = {".so": build.library(build.SOURCES / "door", defines, isa="any")}
    for kernels in kernels_for(isa):
        libraries[f".{kernels}.so"] = build.library(part="forward", isa=kernels)
    return {
        suffix: Path(shutil.copyfile(path, library.with_suffix(suffix)))
        for suffix, path in libraries.items()
    }


def best_kernels(isa: str) -> str | None:
    """The kernels among those of `write` that this CPU runs, as door.cpp chooses; None if it runs none."""
    here = torch.backends.cpu.get_cpu_capability()
    levels = {"native": True, "avx512": here == "AVX512", "avx2": here in _LEVELS}
    return next((kernels for kernels in kernels_for(isa) if levels[kernels]), None)


def why_not_portable() -> str | None:
    """None if code for other CPUs than this one can be made here, else the reason why not."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"levels of CPUs are those of x86-64, and this machine is {platform.machine()}"
    from torch._inductor import config

    if not hasattr(config.cpp, "march"):
        return f"torch {torch.__version__} compiles for its own CPU alone (2.13 does not)"
    return None


def sources_digest() -> str:
    """The SHA-256 of what kernels are built from: programs as numbers mean the same only to the same kernels."""
    digest = hashlib.sha256()
    for path in sorted(build.SOURCES.rglob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
