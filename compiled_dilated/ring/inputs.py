"""Checks of the arguments of a streamed run.

Only `sink`, called last, creates a file.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import arguments
from . import files
from .sources import FileSink, FileSource, SampleSink, Sink, Source, check_dtype, sizes


def source(name: str, value: Any) -> Source:
    """Open a .npy file for reading, or check a source."""
    if isinstance(value, (str, os.PathLike)):
        return FileSource(value, name)
    absent = [key for key in ("shape", "dtype", "read_into") if not hasattr(value, key)]
    if absent or not callable(value.read_into):
        raise TypeError(
            f"{name} must be the path of a .npy file, or a source with shape, dtype and read_into; "
            f"got {type(value).__name__}. "
            "Pass the path of an open file; save a tensor with numpy.save"
        )
    if not isinstance(value.shape, tuple):
        raise TypeError(
            f"{name}.shape must be a tuple (batch, heads, tokens, head_dim); "
            f"got {type(value.shape).__name__}"
        )
    sizes(f"{name}.shape", value.shape)
    check_dtype(f"{name}.dtype", value.dtype)
    checked: Source = value
    return checked


def sink_path(value: Any) -> Path | None:
    """Check a sink, and return the path of its file or None."""
    methods = ("write", "held", "sync")
    absent = [method for method in methods if not callable(getattr(value, method, None))]
    if absent:
        raise TypeError(
            "out must be the path of a .npy file, or a sink with write, held and sync; "
            f"got {type(value).__name__} without {', '.join(absent)}. Pass the path of the file"
        )
    if isinstance(value, (FileSink, SampleSink)):
        return value.path
    return None


def sink(value: Any, shape: Sequence[int], dtype: torch.dtype) -> Sink:
    """Open or create the output, or check a sink's shape and dtype."""
    if isinstance(value, (str, os.PathLike)):
        return FileSink(value, shape, dtype, "out")
    if isinstance(value, (FileSink, SampleSink)):
        if (value.shape, value.dtype) != (tuple(shape), dtype):
            raise ValueError(
                f"out is a {type(value).__name__} for {value.shape} of {value.dtype}; "
                f"the output is {tuple(shape)} of {dtype}. Create it with that shape and dtype"
            )
        return value
    checked: Sink = value
    return checked


def check_distinct(sources: Sequence[Source], output: Path | None, journal: Path | None) -> None:
    """Raise if a file to be written is also another argument.

    Files are compared through links and different paths.
    """
    paths: dict[str, Path] = {}
    for name, origin in zip("qkv", sources, strict=True):
        if isinstance(origin, FileSource):
            paths[name] = origin.path
    for name, path in (("out", output), ("journal", journal)):
        if path is None:
            continue
        for used_name, used in paths.items():
            if files.is_same(path, used):
                raise ValueError(
                    f"{name}={str(path)!r} and {used_name}={str(used)!r} are one file, "
                    f"which the run would overwrite. Pass another path as {name}"
                )
        paths[name] = path


def check_callback(value: object) -> None:
    """Raise unless `on_progress` can be called."""
    if value is not None and not callable(value):
        raise TypeError(
            f"on_progress must be a function of one Progress, or None; got {type(value).__name__}"
        )


def seconds(name: str, value: object) -> float:
    """Check that a limit is a non-negative number of seconds."""
    remedy = "Leave it out for no limit"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {arguments.kind_and_text(value)}. {remedy}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be a number that a float can hold; got one beyond 1e308. {remedy}"
        ) from None
    if not number >= 0:  # nan too
        raise ValueError(f"{name} must be a number of at least 0; got {number}. {remedy}")
    return number


def device(value: Any) -> torch.device:
    """Return the torch device of a name."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"device must be the name of a torch device; got {value!r}. Write 'cpu' or 'cuda'"
        ) from error


def check_usable(where: torch.device) -> None:
    """Raise unless tensors can be copied to a device and back."""
    try:
        torch.zeros(1).to(where).cpu()
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise ValueError(
            f"device {str(where)!r} cannot compute here ({error}). Compile with another device"
        ) from error
