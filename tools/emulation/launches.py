"""Kernels of packages: recorded where inductor saves them, run where the driver launches them.

A launch is that of compiled code: its grid and its arguments are read from the launch, and a kernel
is recognised by the bytes of its machine code. Triton's interpreter then runs its source.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import pretended, toolkit  # isort: skip

import torch
import torch._inductor.runtime.triton_heuristics as triton_heuristics
import triton
from torch._inductor.codecache import PyCodeCache
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

_INTEGERS = {"i1": ctypes.c_bool, "i32": ctypes.c_int32, "i64": ctypes.c_int64}
_FLOATS = {"fp32": ctypes.c_float, "fp64": ctypes.c_double}
_POINTERS = {
    "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*i32": torch.int32,
    "*i64": torch.int64, "*i1": torch.bool, "*fp64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel that a package holds.

    name: of its function.
    source: inductor's module that defines it.
    signature: types of the arguments that are passed, by name.
    constants: the others.
    threads, shared: of a launch.
    """

    name: str
    source: str
    signature: dict[str, str]
    constants: dict[str, Any]
    threads: int
    shared: int


# Saved kernels by the digest of their machine code, and opened modules by number.
SAVED: dict[str, Kernel] = {}
_MODULES: list[Kernel] = []
# Names of launched kernels and their grids, in order.
LAUNCHED: list[tuple[str, tuple[int, ...]]] = []


def _saved(autotuner: Any, stream: Any, launcher: Any) -> None:
    """Record a kernel that inductor saves for a package."""
    _save(autotuner, stream, launcher)
    meta, metadata = autotuner.triton_meta, launcher.bin.metadata
    name = autotuner.fn.__name__
    # The last source by this name: each graph has one.
    source = [text for of, text in pretended.KERNELS if of == name][-1]
    constants = {**meta.get("constants", {}), **launcher.config.kwargs}
    signature = {}
    for argument in autotuner.fn.arg_names:
        kind = meta["signature"].get(argument, "constexpr")
        if kind != "constexpr" and argument not in constants:
            signature[argument] = kind
    SAVED[hashlib.sha256(launcher.bin.asm["cubin"]).hexdigest()] = Kernel(
        name, source, signature, constants, 32 * metadata.num_warps, metadata.shared
    )


def _bytes_of(path: bytes | None, address: int | None) -> bytes:
    """The machine code of a module: a file, or an ELF image in memory."""
    if path is not None:
        return Path(path.decode()).read_bytes()
    assert address is not None
    header = ctypes.string_at(address, 64)
    # The table of sections ends an image: its offset, the size of an entry and their count.
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return ctypes.string_at(address, offset + size * count)


def _load(path: bytes | None, address: int | None) -> int:
    """Open a module; 0 where its machine code was not saved."""
    code = _bytes_of(path, address)
    kernel = SAVED.get(hashlib.sha256(code).hexdigest())
    if kernel is None:
        print(f"emulation: no saved kernel has these {len(code)} bytes", file=sys.stderr)
        return 0
    if f".text.{kernel.name}".encode() not in code:
        print(f"emulation: the machine code of {kernel.name} has no such function", file=sys.stderr)
        return 0
    _MODULES.append(kernel)
    return len(_MODULES)


def _launch(module: int, name: bytes, grid: Any, threads: int, shared: int, arguments: Any) -> int:
    """Run a kernel in the interpreter; 0 where the launch does not fit it."""
    try:
        kernel = _MODULES[module - 1]
        if (name.decode(), threads, shared) != (kernel.name, kernel.threads, kernel.shared):
            raise ValueError(f"{name!r}, {threads}, {shared}: not a launch of {kernel}")
        sizes = grid[0], grid[1], grid[2]
        LAUNCHED.append((kernel.name, sizes))
        _interpret(kernel, sizes, _values(kernel, arguments))
    # An exception cannot pass through C.
    except Exception:
        traceback.print_exc()
        return 0
    return 1


def _values(kernel: Kernel, arguments: Any) -> dict[str, Any]:
    """The arguments of a launch by name; those after the last are scratch memory."""
    values: dict[str, Any] = {}
    for number, (name, kind) in enumerate(kernel.signature.items()):
        address = arguments[number]
        if kind in _POINTERS:
            values[name] = _tensor_at(ctypes.c_uint64.from_address(address).value, _POINTERS[kind])
        else:
            values[name] = (_INTEGERS | _FLOATS)[kind].from_address(address).value
    return values


def _tensor_at(address: int, dtype: torch.dtype) -> Any:
    """A tensor of one number at an address, from which a kernel takes the address alone."""
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=1)


def _interpret(kernel: Kernel, grid: tuple[int, ...], values: dict[str, Any]) -> None:
    function = _interpreted(kernel)
    named = {**kernel.constants, **values}
    function[grid](**{name: named[name] for name in function.arg_names})


_FUNCTIONS: dict[str, Any] = {}


def _interpreted(kernel: Kernel) -> Any:
    """A kernel's function as one of the interpreter."""
    if kernel.source not in _FUNCTIONS:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            # A comment, so that it is not the module of the compiled one.
            module = PyCodeCache.load(f"{kernel.source}\n# interpreted\n")
        _FUNCTIONS[kernel.source] = getattr(module, kernel.name).fn
    return _FUNCTIONS[kernel.source]


def _called(function: Any, *arguments: Any, **options: Any) -> Any:
    """Run a function of Triton's library that a kernel calls, which is there to be compiled."""
    if function.fn not in _LIBRARY:
        _LIBRARY[function.fn] = InterpretedFunction(function.fn)
    return _LIBRARY[function.fn](*arguments, **options)


_LIBRARY: dict[Any, InterpretedFunction] = {}
_Load = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_char_p, ctypes.c_void_p)
_Launch = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
# C++ keeps their addresses, so they must stay alive.
_CALLED: tuple[Callable[..., int], ...] = (_Load(_load), _Launch(_launch))

toolkit.DRIVER.pretend(*_CALLED)
JITFunction.__call__ = _called
_save = triton_heuristics.CachingAutotuner.save_gpu_kernel
triton_heuristics.CachingAutotuner.save_gpu_kernel = _saved
