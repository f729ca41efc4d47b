"""Streamed runs of four ranks over small files in a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks

SHAPE, RANKS = (1, 2, 16, 2), 4
RUN = cd.compile(masks.causal(), ranks=RANKS, transport="streamed")


def write_inputs(directory: Path) -> None:
    """q.npy, k.npy and v.npy."""
    random = np.random.default_rng(0)
    for name in ("q", "k", "v"):
        np.save(directory / f"{name}.npy", random.standard_normal(SHAPE))


def enter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory with inputs the working directory."""
    write_inputs(directory)
    monkeypatch.chdir(directory)
    return directory


def stream(out: Any = "out.npy", **options: Any) -> Any:
    """Run over inputs of the working directory, or of the options."""
    q, k, v = (options.pop(name, f"{name}.npy") for name in ("q", "k", "v"))
    return RUN(q, k, v, out, **options)


def reference(**options: Any) -> torch.Tensor:
    """The reference for `stream`."""
    q, k, v = (torch.from_numpy(np.load(f"{name}.npy")) for name in ("q", "k", "v"))
    out = cd.reference(masks.causal(), q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    return out


def snapshot(directory: Path) -> dict[str, bytes | str]:
    """The bytes of every file and the target of every link."""
    contents: dict[str, bytes | str] = {}
    for path in directory.rglob("*"):
        if path.is_symlink():
            contents[path.name] = os.readlink(path)
        elif path.is_file():
            contents[path.name] = path.read_bytes()
    return contents


def error_of(call: Callable[[], object]) -> Exception | None:
    """The TypeError, ValueError or OSError of a call, or None."""
    try:
        call()
    except (TypeError, ValueError, OSError) as error:
        return error
    return None
