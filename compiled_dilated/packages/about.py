"""Description of a package: its inputs, ranges and machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1


def library_path(package: Path) -> Path:
    """Path of the native kernel beside a package."""
    return package.with_name(package.name + ".so")


def about_path(package: Path) -> Path:
    """Path of the description beside a package."""
    return package.with_name(package.name + ".json")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Input:
    """A tensor that a package takes. shape: numbers, or names of ranges."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class About:
    """A package's description.

    name: of what was exported, a program as text or a model's class. inputs: in order. ranges: (least, most) by name. torch: its
    version. cpu: the instructions that the files use. files: SHA-256 by suffix.
    """

    name: str
    inputs: tuple[Input, ...]
    ranges: Mapping[str, tuple[int, int]]
    torch: str
    cpu: str
    machine: str
    files: Mapping[str, str]
    format: int = FORMAT

    def check_inputs(self, inputs: Sequence[object]) -> None:
        """Raise TypeError or ValueError unless a package may run with these."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the package takes {len(self.inputs)} tensors; got {len(inputs)}")
        sizes: dict[str, int] = {}
        for number, (x, expected) in enumerate(zip(inputs, self.inputs, strict=True)):
            if not isinstance(x, Tensor):
                raise TypeError(f"input {number} must be a tensor; got {type(x).__name__}")
            if str(x.dtype) != f"torch.{expected.dtype}" or x.device.type != "cpu":
                raise TypeError(f"input {number} must be {expected.dtype} on a CPU; got {x.dtype} on {x.device}")
            if x.dim() != len(expected.shape):
                raise ValueError(f"input {number} must have the shape {_shown(expected.shape)}; got {tuple(x.shape)}")
            for size, wanted in zip(x.shape, expected.shape, strict=True):
                if isinstance(wanted, str):
                    wanted = sizes.setdefault(wanted, size)
                if size != wanted:
                    raise ValueError(f"input {number} must have the shape {_shown(expected.shape)}; got {tuple(x.shape)}")
        for name, size in sizes.items():
            least, most = self.ranges[name]
            if not least <= size <= most:
                raise ValueError(f"{name} must be from {least:,} to {most:,}, for which the package was made; got {size:,}")

    def check_machine(self) -> None:
        """Raise ValueError unless this torch and this CPU run the package."""
        if torch.__version__.partition("+")[0] != self.torch:
            raise ValueError(f"the package is for torch {self.torch}; this is {torch.__version__}. Export it again with this one")
        if platform.machine() != self.machine:
            raise ValueError(f"the package is for {self.machine}; this machine is {platform.machine()}. Export it there")
        if torch.backends.cpu.get_cpu_capability() != self.cpu:
            raise ValueError(
                f"the package uses {self.cpu}; this CPU has {torch.backends.cpu.get_cpu_capability()}. Export it on such a CPU"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [self.name]
        for number, x in enumerate(self.inputs):
            lines.append(f"  input {number}: {x.dtype} {_shown(x.shape)}")
        for name, (least, most) in self.ranges.items():
            lines.append(f"  {name}: {least:,} to {most:,}")
        lines.append(f"  torch {self.torch}, {self.machine}, {self.cpu}")
        for suffix, value in self.files.items():
            lines.append(f"  {suffix}: sha256 {value}")
        return "\n".join(lines)


def _shown(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def inspect(path: str | os.PathLike[str]) -> About:
    """What a package says of itself; nothing of it is executed.

    Raises FileNotFoundError where the description is missing, ValueError where it is none.
    """
    beside = about_path(Path(path))
    if not beside.exists():
        raise FileNotFoundError(f"{beside} is missing: a package is three files, written together by compiled_dilated.export")
    try:
        fields = json.loads(beside.read_text())
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']}, and this version reads {FORMAT}")
        fields["inputs"] = tuple(Input(x["dtype"], tuple(x["shape"])) for x in fields["inputs"])
        fields["ranges"] = {name: (int(least), int(most)) for name, (least, most) in fields["ranges"].items()}
        return About(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{beside} does not describe a package: {error}. Export it again") from error
