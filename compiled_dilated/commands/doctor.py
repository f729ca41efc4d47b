"""`compiled-dilated doctor`: checks of this machine's installation, with remedies."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from .arguments import Json, print_json

_LEAST_PYTHON = (3, 11)
_LEAST_TORCH = (2, 11)
_COMPILER_SECONDS = 60
_LOW_MEMORY_BYTES = 4 * 2**30

_INSTALL_COMPILER = (
    "Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; "
    "or name another: CXX=clang++"
)
_PROBE = "#include <cmath>\nint probe(double x) { return static_cast<int>(std::sqrt(x)); }\n"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    name: the checked component.
    state: "ok"; "absent": fewer things run; "failed": essential and broken.
    detail: versions, sizes or the error.
    fix: the remedy; empty if none is needed.
    """

    name: str
    state: str
    detail: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """The finding as plain values."""
        return {"name": self.name, "state": self.state, "found": self.detail, "fix": self.fix}


def doctor(json: Json = False) -> None:
    """Check this machine's installation, with remedies.

    Exit code 1 if something essential fails: Python, torch, attention itself, or the C++ compiler
    that torch.compile needs.
    """
    findings = [_finding(check) for check in CHECKS]
    ok = all(finding.state != "failed" for finding in findings)
    if json:
        print_json({"ok": ok, "findings": [finding.to_json() for finding in findings]})
        raise typer.Exit(0 if ok else 1)
    from tabulate import tabulate

    # A row per finding, its remedy below it.
    rows = [[finding.name, finding.state, finding.detail] for finding in findings]
    lines = tabulate(rows, tablefmt="plain", disable_numparse=True).splitlines()
    for finding, line in zip(findings, lines, strict=True):
        typer.echo(line)
        if finding.fix:
            typer.echo(f"  fix: {finding.fix}")
    raise typer.Exit(0 if ok else 1)


def _finding(check: Callable[[], Finding]) -> Finding:
    """The finding of a check; that it cannot run is one too."""
    try:
        return check()
    # Whatever stops a check, as a full disk, must not hide the other findings.
    except Exception as error:
        name = check.__name__.lstrip("_")
        return Finding(name, "failed", _in_a_line(error), "repair what the error names")


def _in_a_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _checked(name: str, ok: bool, detail: str, fix: str) -> Finding:
    """The finding of an essential component; `fix` applies if it failed."""
    if ok:
        return Finding(name, "ok", detail)
    return Finding(name, "failed", detail, fix)


def _python() -> Finding:
    """The version of Python."""
    ok = sys.version_info >= _LEAST_PYTHON
    detail = f"{platform.python_version()} ({sys.executable})"
    return _checked("python", ok, detail, "install Python 3.11 or newer and set up again")


def _torch() -> Finding:
    """The version of torch."""
    # A part may have letters, as "0a0" of a nightly build: its digits count.
    parts = torch.__version__.split("+")[0].split(".")[:2]
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)
    return _checked(
        "torch", version >= _LEAST_TORCH, torch.__version__, "pip install 'torch>=2.11'"
    )


def _attention() -> Finding:
    """Compare a small program with the reference, forward and backward."""
    from .. import programs
    from ..compiler import compile
    from ..reference import reference

    program = programs.longnet((16, 32), (1, 2), causal=True)
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 50, 8, dtype=torch.float64, generator=random).requires_grad_()
    out, truth = compile(program)(q, q, q), reference(program, q, q, q)
    assert isinstance(truth, torch.Tensor)
    (grad,), (true_grad,) = torch.autograd.grad(out.sum(), q), torch.autograd.grad(truth.sum(), q)
    errors = [(out - truth).detach().abs().max(), (grad - true_grad).abs().max()]
    error = float(torch.stack(errors).max())
    fix = "the installation is broken or this is a bug: set up again, then run the tests"
    return _checked(
        "attention", error < 1e-10, f"largest error {error:.0e} against the reference", fix
    )


def _compiler() -> Finding:
    """Compile a small library with the C++ compiler that torch.compile would use."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    name = "CXX"
    path: str | None = None
    if command:
        name = command[0]
        path = shutil.which(name)
    if path is None:
        detail = f"no {name} on PATH: torch.compile will not run on the CPU"
        return Finding("compiler", "failed", detail, _INSTALL_COMPILER)
    # A compiler that is present may still lack its headers or linker.
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_PROBE)
        build = [*command, "-shared", "-fPIC", "-o", str(library), str(source)]
        try:
            run = subprocess.run(build, capture_output=True, text=True, timeout=_COMPILER_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding("compiler", "failed", f"{path}: {error}", _INSTALL_COMPILER)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["fails"])[0]
        return Finding("compiler", "failed", f"{path}: {reason}", _INSTALL_COMPILER)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return Finding("compiler", "ok", version.splitlines()[0] if version else path)


def _native() -> Finding:
    """Build and load the native kernel; without it 'auto' is slower."""
    from ..native import build

    reason = build.available()
    if reason is None:
        return Finding("native kernel", "ok", "built and loaded for this CPU")
    # Errors of the compiler follow the first line.
    detail = f"lowering 'auto' is a slower one: {reason.splitlines()[0]}"
    return Finding("native kernel", "absent", detail)


def _inductor() -> Finding:
    """Compile a small function with torch.compile, which needs Python's headers too."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    x = torch.ones(64)
    try:
        is_right = torch.allclose(torch.compile(function)(x), function(x))
    # Errors of the code generator, the compiler or the loader are the finding.
    except Exception as error:
        headers = f"apt install python3.{sys.version_info.minor}-dev"
        fix = f"repair the compiler above; Python's headers: {headers}"
        return Finding("torch.compile", "failed", _in_a_line(error), fix)
    if not is_right:
        return Finding("torch.compile", "failed", "wrong result")
    return Finding("torch.compile", "ok", "inductor generates and runs C++ for this CPU")


def _device() -> Finding:
    """The GPU, and Triton, which torch.compile needs on it."""
    if not torch.cuda.is_available():
        reason = f"CUDA {torch.version.cuda} finds no GPU"
        if torch.version.cuda is None:
            reason = "this torch is a CPU build"
        return Finding("gpu", "absent", f"none; {reason}. Everything runs on the CPU")
    has_triton = importlib.util.find_spec("triton") is not None
    memory = torch.cuda.get_device_properties(0).total_memory
    detail = f"{torch.cuda.get_device_name()}, {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return _checked(
        "gpu", has_triton, detail, "pip install triton: torch.compile needs it on a GPU"
    )


def _flex() -> Finding:
    """FlexAttention of the installed torch."""
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        detail = "not in this torch: lowering 'flex' is refused"
        return Finding("flex attention", "absent", detail, "pip install 'torch>=2.11'")
    if torch.cuda.is_available():
        return Finding("flex attention", "ok", "forward and backward on the GPU")
    detail = "forward alone: torch has no backward of it on a CPU"
    return Finding("flex attention", "ok", detail)


def _distributed() -> Finding:
    """Backends of torch.distributed."""
    if not torch.distributed.is_available():
        detail = "not in this torch: nothing over several processes"
        return Finding("distributed", "absent", detail, "install a torch built with it")
    names = ("gloo", "nccl", "mpi")
    backends = [name for name in names if getattr(torch.distributed, f"is_{name}_available")()]
    if not backends:
        return Finding("distributed", "absent", "no backend")
    return Finding("distributed", "ok", ", ".join(backends))


def _machine() -> Finding:
    """Cores, threads and memory."""
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gibibytes = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB of it free"
    detail = f"{cores} cores, {torch.get_num_threads()} threads, {gibibytes}"
    if memory.available < _LOW_MEMORY_BYTES:
        return Finding("machine", "absent", detail, "free some memory: the demo takes about 4 GiB")
    return Finding("machine", "ok", detail)


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python, _torch, _attention, _compiler, _native, _inductor, _device, _flex, _distributed,
    _machine,
)  # fmt: skip
