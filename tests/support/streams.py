"""Streamed runs over files of any number of tokens.

Batch 2, four query heads, two key heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import compiled_dilated as cd

LONGNET = cd.longnet((64, 128, 256), (1, 2, 4), causal=True)
SHAPES = {"q": (4, 8), "k": (2, 8), "v": (2, 6)}


def write_files(directory: Path, tokens: int, dtype: Any = np.float64) -> dict[str, Path]:
    """Write q.npy, k.npy and v.npy.

    The paths are theirs, the output's and the journal's.
    """
    random = np.random.default_rng(0)
    for name, (heads, width) in SHAPES.items():
        numbers = random.standard_normal((2, heads, tokens, width))
        np.save(directory / f"{name}.npy", numbers.astype(dtype))
    paths = {name: directory / f"{name}.npy" for name in ("q", "k", "v", "out")}
    return paths | {"journal": directory / "journal"}


def inputs_of(paths: dict[str, Path]) -> tuple[Tensor, ...]:
    """q, k and v as tensors."""
    return tuple(torch.from_numpy(np.load(paths[name])) for name in ("q", "k", "v"))


def output_of(paths: dict[str, Path]) -> Tensor:
    """The output as a tensor."""
    return torch.from_numpy(np.load(paths["out"]))


def stream(paths: dict[str, Path], program: Any = LONGNET, ranks: int = 8, **options: Any) -> Any:
    """Run a program over the files, with a journal."""
    run = cd.compile(program, ranks=ranks, transport="streamed")
    q, k, v, out, journal = (paths[name] for name in ("q", "k", "v", "out", "journal"))
    return run(q, k, v, out, journal=journal, **options)
