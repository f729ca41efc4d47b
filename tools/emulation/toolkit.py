"""A pretended CUDA toolkit: headers and libraries for code that AOTInductor generates.

    include/          CUDA's own headers, from Triton's wheel
    cuda/driver.cpp   libcuda: modules and launches are passed to functions of `launches`
    cuda/device.cpp   libtorch_cuda: CUDA tensors in the memory of the host

Imported before torch, which looks for a toolkit and for the functions of its CUDA library once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path


def _folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


_SOURCES = Path(__file__).parent / "cuda"
_TORCH = _folder("torch")
# CUDA's headers in Triton's wheel.
_HEADERS = _folder("triton") / "backends/nvidia/include"
# Types of numbers that generated code for the host has no use for; they need a header of a compiler
# of CUDA that the wheel lacks.
_WITHOUT = ("cuda_bf16.h", "cuda_fp16.h", "cuda_fp8.h")
# As its version of torch, for CUDA; `pretended` says so too.
CUDA = "13.0"


def _built(home: Path, source: str, name: str, soname: str, *links: str) -> Path:
    """Compile a library of the toolkit."""
    library = home / "lib64" / name
    include = [f"-I{home / 'include'}", f"-I{_TORCH / 'include'}"]
    include.append(f"-I{_TORCH / 'include/torch/csrc/api/include'}")
    compiler = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{soname}"]
    command = [*compiler, str(_SOURCES / source), *include, f"-L{_TORCH / 'lib'}", *links]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def _made() -> ctypes.CDLL:
    """Build the toolkit, name it to torch and open its libraries; returns the driver."""
    home = Path(tempfile.mkdtemp(prefix="emulation-cuda-"))
    (home / "include").mkdir()
    for header in _HEADERS.iterdir():
        if header.name not in _WITHOUT:
            (home / "include" / header.name).symlink_to(header)
    for name in _WITHOUT:
        (home / "include" / name).touch()
    (home / "lib64").mkdir()
    os.environ["CUDA_HOME"] = str(home)
    driver = _built(home, "driver.cpp", "libcuda.so", "libcuda.so.1")
    links = ("-ltorch", "-ltorch_cpu", "-lc10")
    device = _built(home, "device.cpp", "libtorch_cuda.so", "libtorch_cuda.so", *links)
    # Opened here, so that generated code finds them by their names.
    ctypes.CDLL(str(_TORCH / "lib/libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    opened = ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(device), mode=ctypes.RTLD_GLOBAL)
    return opened


DRIVER = _made()
