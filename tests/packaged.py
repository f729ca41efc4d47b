"""Inputs, a model and a process without this library, for packages."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.native.cache import locked

SUFFIXES = ("", ".so", ".avx512.so", ".avx2.so", ".json")


@dataclass(frozen=True)
class Exported:
    """An exported model, the path of its package, and its description."""

    model: Any
    path: Path
    about: cd.packages.About

    def copied(self, folder: Path) -> Path:
        """Copy the files of the package; the path of the copy."""
        for suffix in SUFFIXES:
            shutil.copy(f"{self.path}{suffix}", folder / f"model.pt2{suffix}")
        return folder / "model.pt2"


def qkv(
    tokens: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, queries: int | None = None
) -> tuple[Tensor, ...]:
    """q, k and v, (batch, heads, tokens, 16).

    queries: tokens of q; None: as many as of k and v.
    """
    generator = torch.Generator().manual_seed(tokens)
    q_size = (heads, tokens if queries is None else queries)
    kv_size = (kv_heads, tokens)
    sizes = (q_size, kv_size, kv_size)
    return tuple(torch.randn(batch, *size, 16, generator=generator) for size in sizes)


def padding(tokens: int, batch: int = 2) -> Tensor:
    """Every fifth key is padding."""
    return torch.arange(tokens).expand(batch, -1) % 5 == 3


def padded(tokens: int, batch: int = 2, queries: int | None = None) -> tuple[Tensor, ...]:
    """Inputs of the package of `export_window`."""
    return (*qkv(tokens, batch, queries=queries), padding(tokens, batch))


def export_window(folder: Path) -> Exported:
    """A window with sinks and padding, as a package of two entries; exported once per folder."""
    program = masks.causal() & (masks.window(20) | masks.sinks(2)) & masks.padding("padding")
    path = folder / "model.pt2"
    with locked(folder):
        if not path.with_name("model.pt2.json").exists():
            inputs = (*qkv(50), torch.zeros(2, 50, dtype=torch.bool))
            cd.export(program, inputs, path, lengths=(1, 2**20), batches=(1, 8), decode=True)
    return Exported(program, path, cd.packages.inspect(path))


class Model(nn.Module):
    """Attention between layers, with padding and a score_mod that reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal() & masks.window(20) & masks.padding("padding"))
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.slopes = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.project(x).chunk(3, -1))

        def bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score - self.slopes[h] * (q - kv)

        y = self.attend(q, k, v, data={"padding": padding}, score_mod=bias)
        return self.out(y.transpose(1, 2).flatten(2))


def of_model(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs of `Model`."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, 32, generator=generator)
    return x, torch.rand(batch, tokens, generator=generator) < 0.2


# The beginning of a script that cannot import this library: it loads the package's library, and
# defines `path`, `load(entry)` and `opened()`.
WITHOUT = """
import sys
sys.modules["compiled_dilated"] = None
import torch
path = sys.argv[1]
torch.ops.load_library(path + ".so")

def load(entry):
    from torch._inductor.package import load_package
    if entry == "model":
        return torch._inductor.aoti_load_package(path)
    return load_package(path, entry)

def opened():
    with open("/proc/self/maps") as lines:
        return sorted({line.split()[-1].rpartition("/")[2] for line in lines if path + "." in line})
"""
