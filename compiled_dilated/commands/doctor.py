"""`compiled-dilated doctor`: what this machine has, what will run on it, and what to do about what will not."""

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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer

from .arguments import Json, print_json

_LEAST_PYTHON = (3, 11)
_LEAST_TORCH = (2, 11)
_COMPILER_SECONDS = 60
_LOW_MEMORY_BYTES = 4 * 2**30

_INSTALL_COMPILER = "Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; or name another: CXX=clang++"


@dataclass(frozen=True)
class Finding:
    """One line. state: "ok"; "absent", which is fine but limits what runs; "failed", which is not fine."""

    name: str
    state: str
    found: str
    fix: str = ""


def doctor(json: Json = False) -> None:
    """Say what is here, what will run and what not, one line each, with the fix for what fails.

    Exit code 1 if something essential is missing: Python, torch, attention itself, or the C++ compiler that torch.compile needs.
    """
    findings = [check() for check in CHECKS]
    ok = all(finding.state != "failed" for finding in findings)
    if json:
        print_json({"ok": ok, "findings": [asdict(finding) for finding in findings]})
    else:
        from tabulate import tabulate

        rows = [[finding.name, finding.state, finding.found] for finding in findings]
        for finding, line in zip(
            findings,
            tabulate(rows, tablefmt="plain", disable_numparse=True).splitlines(),
            strict=True,
        ):
            typer.echo(line)
            if finding.fix:
                typer.echo(f"  fix: {finding.fix}")
    raise typer.Exit(0 if ok else 1)


def _python() -> Finding:
    ok = sys.version_info >= _LEAST_PYTHON
    found = f"{platform.python_version()} ({sys.executable})"
    return Finding(
        "python",
        "ok" if ok else "failed",
        found,
        "" if ok else "install Python 3.11 or newer and set up again",
    )


def _torch() -> Finding:
    version = tuple(
        int("".join(filter(str.isdigit, part)) or 0)
        for part in torch.__version__.split("+")[0].split(".")[:2]
    )
    ok = version >= _LEAST_TORCH
    return Finding(
        "torch",
        "ok" if ok else "failed",
        torch.__version__,
        "" if ok else "pip install 'torch>=2.11'",
    )


def _attention() -> Finding:
    """A small program, forward and backward, against the reference."""
    from .. import programs
    from ..compiler import compile
    from ..reference import reference

    program = programs.longnet((16, 32), (1, 2), causal=True)
    q = torch.randn(
        1, 2, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    out, truth = compile(program)(q, q, q), reference(program, q, q, q)
    assert isinstance(truth, torch.Tensor)
    (grad,), (true_grad,) = torch.autograd.grad(out.sum(), q), torch.autograd.grad(truth.sum(), q)
    error = float(
        torch.stack([(out - truth).detach().abs().max(), (grad - true_grad).abs().max()]).max()
    )
    fix = "the installation is broken or this is a bug: set up again, then run the tests"
    return Finding(
        "attention",
        "ok" if error < 1e-10 else "failed",
        f"largest error {error:.0e} against the reference",
        "" if error < 1e-10 else fix,
    )


def _compiler() -> Finding:
    command = shlex.split(os.environ.get("CXX", "g++"))
    path = shutil.which(command[0]) if command else None
    if path is None:
        return Finding(
            "compiler",
            "failed",
            f"no {command[0] if command else 'CXX'} on PATH: torch.compile will not run on the CPU",
            _INSTALL_COMPILER,
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(
            "#include <cmath>\nint probe(double x) { return static_cast<int>(std::sqrt(x)); }\n"
        )
        try:
            run = subprocess.run(
                [*command, "-shared", "-fPIC", "-o", str(source.with_suffix(".so")), str(source)],
                capture_output=True, text=True, timeout=_COMPILER_SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding("compiler", "failed", f"{path}: {error}", _INSTALL_COMPILER)
    if run.returncode:
        return Finding(
            "compiler",
            "failed",
            f"{path}: {(run.stderr.strip().splitlines() or ['fails'])[0]}",
            _INSTALL_COMPILER,
        )
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True
    ).stdout.splitlines()
    return Finding("compiler", "ok", version[0] if version else path)


def _inductor() -> Finding:
    """torch.compile of one small function on the CPU, which needs Python's headers beside the compiler."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    x = torch.ones(64)
    try:
        right = torch.allclose(torch.compile(function)(x), function(x))
    except Exception as error:  # whatever the code generator, the compiler or the loader may raise: it is the finding
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        fix = f"repair the compiler above; Python's headers: apt install python3.{sys.version_info.minor}-dev"
        return Finding("torch.compile", "failed", f"{type(error).__name__}: {lines[0]}", fix)
    return Finding(
        "torch.compile",
        "ok" if right else "failed",
        "inductor generates and runs C++ for this CPU" if right else "wrong result",
    )


def _device() -> Finding:
    if not torch.cuda.is_available():
        built = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else f"CUDA {torch.version.cuda} finds no GPU"
        )
        return Finding("gpu", "absent", f"none; {built}. Everything runs on the CPU", "")
    triton = importlib.util.find_spec("triton") is not None
    memory = torch.cuda.get_device_properties(0).total_memory
    found = f"{torch.cuda.get_device_name()}, {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return Finding(
        "gpu",
        "ok" if triton else "failed",
        found,
        "" if triton else "pip install triton: torch.compile needs it on a GPU",
    )


def _flex() -> Finding:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return Finding(
            "flex attention",
            "absent",
            "not in this torch: lowering 'flex' is refused",
            "pip install 'torch>=2.11'",
        )
    where = (
        "forward and backward on the GPU"
        if torch.cuda.is_available()
        else "forward alone: torch has no backward of it on a CPU"
    )
    return Finding("flex attention", "ok", where)


def _distributed() -> Finding:
    if not torch.distributed.is_available():
        return Finding(
            "distributed",
            "absent",
            "not in this torch: nothing over several processes",
            "install a torch built with it",
        )
    backends = [
        name
        for name in ("gloo", "nccl", "mpi")
        if getattr(torch.distributed, f"is_{name}_available")()
    ]
    return Finding(
        "distributed", "ok" if backends else "absent", ", ".join(backends) or "no backend"
    )


def _machine() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gibibytes = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB of it free"
    found = f"{cores} cores, {torch.get_num_threads()} threads, {gibibytes}"
    low = memory.available < _LOW_MEMORY_BYTES
    return Finding(
        "machine",
        "absent" if low else "ok",
        found,
        "free some memory: the demo takes about 4 GiB" if low else "",
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python, _torch, _attention, _compiler, _inductor, _device, _flex, _distributed, _machine
)  # fmt: skip
