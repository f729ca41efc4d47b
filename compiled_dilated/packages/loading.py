"""From files to a callable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..native import build
from .about import About, digest, inspect, library_path


class Loaded:
    """A package that runs. Called with tensors as `about.inputs` has them; returns what the model returned."""

    def __init__(self, about: About, run: Any) -> None:
        self.about, self._run = about, run

    def __call__(self, *inputs: Tensor) -> Any:
        """Run once the inputs fit. Raises TypeError or ValueError where they do not."""
        self.about.check_inputs(inputs)
        with torch.no_grad():
            return self._run(*inputs)

    def __repr__(self) -> str:
        return f"Loaded({self.about.name})"


def load(path: str | os.PathLike[str]) -> Loaded:
    """A package that `export` wrote, checked.

    Raises FileNotFoundError where one of its files is missing, and ValueError, before anything of it is opened, where their bytes
    are not those that were written, or where torch or the CPU are others.
    """
    package = Path(path)
    if not package.exists():
        raise FileNotFoundError(f"{package} is missing")
    about = inspect(package)
    for suffix, file in ((".pt2", package), (".pt2.so", library_path(package))):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: a package is three files, written together by compiled_dilated.export")
        if digest(file) != about.files[suffix]:
            raise ValueError(f"{file} is not the file that was written: its digest differs. Export it again")
    about.check_machine()
    # This process has the operators already, by a library of its own.
    build.load()
    return Loaded(about, torch._inductor.aoti_load_package(str(package)))
