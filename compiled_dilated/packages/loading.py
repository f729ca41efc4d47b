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
    """A loaded package, called like the exported model."""

    def __init__(self, about: About, runs: Mapping[str, Callable[..., Any]]) -> None:
        self.about, self._runs = about, runs

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the entry "model".

        Raises TypeError or ValueError for inputs that do not fit.
        """
        return _run(self.about.entries["model"], self._runs["model"], inputs)

    def decode(self, *inputs: Tensor) -> Any:
        """Run the entry "decode": queries against a cache.

        Raises TypeError or ValueError for inputs that do not fit, ValueError without such an entry.
        """
        if "decode" not in self._runs:
            raise ValueError(
                f"the package of {self.about.name} has no entry for decoding; "
                "export it with decode=True"
            )
        return _run(self.about.entries["decode"], self._runs["decode"], inputs)

    def __repr__(self) -> str:
        return f"Loaded({self.about.name})"


def _run(entry: Entry, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    """Check the inputs, and run an entry without gradients."""
    entry.check(inputs)
    with torch.no_grad():
        return run(*entry.with_strides(inputs))


def load(path: str | os.PathLike[str]) -> Loaded:
    """Load a package that `export` wrote.

    Raises FileNotFoundError if a file is missing, and ValueError if a digest differs or if torch,
    compiled_dilated, the CPU or the GPU do not fit. Both are raised before any code is opened.
    """
    package = Path(path)
    if not package.exists():
        raise FileNotFoundError(f"{package} is missing")
    about = inspect(package)
    # Digests first: no code of a changed file is opened.
    for suffix, expected in about.files.items():
        file = package.with_suffix(suffix)
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: the files of a package are written together by "
                "compiled_dilated.export"
            )
        if digest(file) != expected:
            raise ValueError(
                f"{file} is not the file that was written: its digest differs. Export it again"
            )
    about.check_machine()
    _open_operators(package, about)
    return Loaded(about, {name: _function(package, name) for name in about.entries})


def _open_operators(package: Path, about: About) -> None:
    """Load the kernel: built on this machine, else the package's.

    A package for a GPU brings its kernels in its graphs, and the check of its inputs.
    """
    if about.is_of_gpu:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            "compiled_dilated::check_inputs", "CUDA"
        ):
            torch.ops.load_library(str(package.with_suffix(".pt2.checks.so")))
        return
    build.check_switch()
    try:
        build.load()
    except build.NativeUnavailable:
        # Another package may have registered the operator already.
        if not torch._C._dispatch_has_kernel_for_dispatch_key("compiled_dilated::native", "CPU"):
            kernel = package.with_suffix(f".pt2.{cpp.best_kernels(about.isa)}.so")
            torch.ops.load_library(str(kernel))


def _function(package: Path, entry: str) -> Callable[..., Any]:
    """An entry as a function of its tensors.

    As torch._inductor.aoti_load_package, which would import and run a compiler to detect the CPU.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), entry, False, 1, -1)
    spec = pytree.treespec_loads(loader.get_call_spec()[1])

    def run(*inputs: Tensor) -> Any:
        return pytree.tree_unflatten(loader.boxed_run([*inputs]), spec)

    return run
