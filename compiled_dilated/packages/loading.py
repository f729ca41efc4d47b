"""From files to callables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..native import build, cpp
from .about import About, digest, inspect
from .entries import Entry


class Loaded:
    """A package that runs: called with tensors as its entry "model" has them, it returns what the model returned."""

    def __init__(self, about: About, runs: Mapping[str, Callable[..., Any]]) -> None:
        self.about, self._runs = about, runs

    def __call__(self, *inputs: Tensor) -> Any:
        """Run once the inputs fit. Raises TypeError or ValueError where they do not."""
        return _run(self.about.entries["model"], self._runs["model"], inputs)

    def decode(self, *inputs: Tensor) -> Any:
        """Run the entry "decode": some queries against a cache. Raises as a call does, and where there is no such entry."""
        if "decode" not in self._runs:
            raise ValueError(
                f"the package of {self.about.name} has no entry for decoding; export it with decode=True"
            )
        return _run(self.about.entries["decode"], self._runs["decode"], inputs)

    def __repr__(self) -> str:
        return f"Loaded({self.about.name})"


def _run(entry: Entry, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    entry.check(inputs)
    with torch.no_grad():
        return run(*entry.laid_out(inputs))


def load(path: str | os.PathLike[str]) -> Loaded:
    """A package that `export` wrote, checked.

    Raises FileNotFoundError where one of its files is missing, and ValueError, before anything of it is opened, where their bytes
    are not those that were written, or where torch, compiled_dilated or the CPU do not fit.
    """
    package = Path(path)
    if not package.exists():
        raise FileNotFoundError(f"{package} is missing")
    about = inspect(package)
    for suffix, expected in about.files.items():
        file = package.with_suffix(suffix)
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: the files of a package are written together by compiled_dilated.export"
            )
        if digest(file) != expected:
            raise ValueError(
                f"{file} is not the file that was written: its digest differs. Export it again"
            )
    about.check_machine()
    _open_operators(package, about)
    return Loaded(about, {name: _function(package, name) for name in about.entries})


def _open_operators(package: Path, about: About) -> None:
    """Open this machine's own kernel; where it cannot be built, the package's for this CPU."""
    build.check_switch()
    try:
        build.load()
    except build.NativeUnavailable:
        if not torch._C._dispatch_has_kernel_for_dispatch_key("compiled_dilated::native", "CPU"):
            torch.ops.load_library(
                str(package.with_suffix(f".pt2.{cpp.best_kernels(about.isa)}.so"))
            )


def _function(package: Path, entry: str) -> Callable[..., Any]:
    """An entry as a function of its tensors, which returns what the model returned.

    torch._inductor.aoti_load_package does the same, but first imports a compiler and runs it, to find out what this CPU has.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), entry, False, 1, -1)
    spec = pytree.treespec_loads(loader.get_call_spec()[1])

    def run(*inputs: Tensor) -> Any:
        return pytree.tree_unflatten(loader.boxed_run([*inputs]), spec)

    return run
