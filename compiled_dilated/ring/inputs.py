"""Checks of the arguments of a streamed run. Only `sink`, called last, creates a file."""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import files
from .sources import FileSink, FileSource, SampleSink, Sink, Source, check_dtype, sizes


def source(name: str, value: Any) -> Source:
    """Open a .npy file for reading, or check that an object is a source."""
    if isinstance(value, (str, os.PathLike)):
        return FileSource(value, name)
    absent = [
        attribute for attribute in ("shape", "dtype", "read_into") if not hasattr(value, attribute)
    ]
    if absent or not callable(value.read_into):
        raise TypeError(
            f"{name} must be the path of a .npy file, or a source with shape, dtype and read_into; "
            f"got {type(value).__name__}. Pass the path of an open file; save a tensor with numpy.save"
        )
    if not isinstance(value.shape, tuple):
        raise TypeError(
            f"{name}.shape must be a tuple (batch, heads, tokens, head_dim); got {type(value.shape).__name__}",
        )
    sizes(f"{name}.shape", value.shape)
    check_dtype(f"{name}.dtype", value.dtype)
    checked: Source = value
    return checked


def sink_path(value: Any) -> Path | None:
    """Check that an object is a sink, and return the path of its file where that is known."""
    absent = [
        method for method in ("write", "held", "sync") if not callable(getattr(value, method, None))
    ]
    if absent:
        raise TypeError(
            f"out must be the path of a .npy file, or a sink with write, held and sync; got {type(value).__name__} without "
            f"{', '.join(absent)}. Pass the path of the file"
        )
    if isinstance(value, (FileSink, SampleSink)):
        return value.path
    return None


def sink(value: Any, shape: Sequence[int], dtype: torch.dtype) -> Sink:
    """Open or create the output, or check the shape and dtype of a sink."""
    if isinstance(value, (str, os.PathLike)):
        return FileSink(value, shape, dtype, "out")
    if isinstance(value, (FileSink, SampleSink)) and (value.shape, value.dtype) != (
        tuple(shape),
        dtype,
    ):
        raise ValueError(
            f"out is a {type(value).__name__} for {value.shape} of {value.dtype}; the output is {tuple(shape)} of {dtype}. "
            "Create it with that shape and dtype"
        )
    checked: Sink = value
    return checked


def check_distinct(sources: Sequence[Source], output: Path | None, journal: Path | None) -> None:
    """Raise if a written file is also another argument, by any path or link."""
    paths = {
        name: origin.path
        for name, origin in zip("qkv", sources, strict=True)
        if isinstance(origin, FileSource)
    }
    for name, path in (("out", output), ("journal", journal)):
        if path is None:
            continue
        for other_name, other in paths.items():
            if files.is_same(path, other):
                raise ValueError(
                    f"{name}={str(path)!r} and {other_name}={str(other)!r} are one file, which the run would overwrite. "
                    f"Pass another path as {name}"
                )
        paths[name] = path


def check_callback(value: object) -> None:
    """Raise unless `on_progress` can be called."""
    if value is not None and not callable(value):
        raise TypeError(
            f"on_progress must be a function of one Progress, or None; got {type(value).__name__}",
        )


def seconds(name: str, value: object) -> float:
    """Check that a limit is a number of at least 0."""
    number = _number(name, value, "Leave it out for no limit")
    if not number >= 0:  # nan too
        raise ValueError(
            f"{name} must be a number of at least 0; got {number}. Leave it out for no limit",
        )
    return number


def _number(name: str, value: object, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}. {remedy}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be a number that a float can hold; got one beyond 1e308. {remedy}",
        ) from None


def device(value: Any) -> torch.device:
    """Return a device that torch knows by name."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"device must be the name of a torch device; got {value!r}. Write 'cpu' or 'cuda'",
        ) from error


def check_usable(where: torch.device) -> None:
    """Raise unless tensors can be brought to a device and back."""
    try:
        torch.zeros(1).to(where).cpu()
    except (RuntimeError, AssertionError) as error:  # both: a torch built without CUDA asserts
        raise ValueError(
            f"device {str(where)!r} cannot compute here ({error}). Compile with another device",
        ) from error
