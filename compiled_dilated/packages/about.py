"""Description of a package: its entries, versions, machine and files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..native import cpp
from .entries import PLACES, Entry, Input

FORMAT = 3


def library_path(package: Path) -> Path:
    """Path of the library that programs without Python open, beside a package."""
    return package.with_name(package.name + ".so")


def about_path(package: Path) -> Path:
    """Path of the description beside a package."""
    return package.with_name(package.name + ".json")


def gpu_isa(device: torch.device) -> str:
    """The instruction set of a GPU, as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class About:
    """A package's description.

    name: the exported program as text, or the model's class.
    entries: "model", and "decode" if exported.
    isa: instruction set of the generated code: "avx2" or "native", of a GPU "sm_90" and the like.
    cpu: torch's CPU capability at export.
    machine: processor architecture at export.
    torch, compiled_dilated: versions at export.
    cuda: version of CUDA that torch was built with, for a GPU; else empty.
    kernel: SHA-256 of the native kernel's sources.
    files: SHA-256 by file suffix.
    """

    name: str
    entries: Mapping[str, Entry]
    isa: str
    cpu: str
    machine: str
    torch: str
    compiled_dilated: str
    kernel: str
    files: Mapping[str, str]
    cuda: str = ""
    format: int = FORMAT

    @property
    def is_of_gpu(self) -> bool:
        """Whether the package runs on a GPU."""
        return self.isa.startswith("sm_")

    def check_fields(self) -> None:
        """Raise ValueError for fields that no export writes."""
        if "model" not in self.entries:
            raise ValueError("it has no entry 'model'")
        if not {".pt2", ".pt2.so"} <= self.files.keys():
            raise ValueError("it has no digests of .pt2 and .pt2.so")
        if not self.is_of_gpu and self.isa not in cpp.ISAS:
            raise ValueError(f"its isa is {self.isa!r}")

    def check_machine(self) -> None:
        """Raise ValueError unless this torch, compiled_dilated and device run the package."""
        # AOTInductor's code calls torch's C interface, which changes between releases.
        if torch.__version__.partition("+")[0] != self.torch:
            raise ValueError(
                f"the package is for torch {self.torch}; this is {torch.__version__}. "
                "Export it again with this one"
            )
        if platform.machine() != self.machine:
            raise ValueError(
                f"the package is for {self.machine}; this machine is {platform.machine()}. "
                "Export it there"
            )
        if self.is_of_gpu:
            self._check_gpu()
        else:
            self._check_cpu()
        # The graph's programs and checks are encoded for one version of the kernel.
        if self.kernel != cpp.sources_digest():
            raise ValueError(
                "the package's graph is for the kernel of another version of compiled_dilated. "
                "Export it again with this one, or load it without importing compiled_dilated "
                "(docs/packages.md)"
            )

    def _check_gpu(self) -> None:
        """Raise ValueError unless this torch has a GPU of the package's kind."""
        if not torch.cuda.is_available():
            raise ValueError(
                f"the package is for a GPU, {self.isa}, and torch {torch.__version__} finds none. "
                "Load it on a machine with one"
            )
        # Generated code calls libraries of CUDA, and kernels are machine code of one kind of GPU.
        if torch.version.cuda != self.cuda:
            raise ValueError(
                f"the package is for a torch built with CUDA {self.cuda}; "
                f"this one, {torch.__version__}, is built with {torch.version.cuda}. "
                "Export it again with this one"
            )
        isa = gpu_isa(torch.device("cuda"))
        if isa != self.isa:
            raise ValueError(
                f"the package's kernels are for {self.isa}; this GPU, "
                f"{torch.cuda.get_device_name()}, is {isa}. Export it on such a GPU"
            )

    def _check_cpu(self) -> None:
        """Raise ValueError unless this CPU has the package's instructions."""
        capability = torch.backends.cpu.get_cpu_capability()
        if self.isa == "native" and capability != self.cpu:
            raise ValueError(
                f"the package is for CPUs with {self.cpu} alone, as isa='native' makes it; "
                f"this one has {capability}. Export it on such a CPU, or with isa='avx2'"
            )
        if cpp.best_kernels(self.isa) is None:
            raise ValueError(f"the package needs a CPU with AVX2; this one has {capability}")

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def metadata(self) -> dict[str, str]:
        """Metadata of the .pt2, as `get_metadata()` returns it in C++."""
        names = ("name", "isa", "compiled_dilated", "kernel")
        texts: dict[str, str] = {name: getattr(self, name) for name in names}
        for name, entry in self.entries.items():
            texts[f"{name}.inputs"] = "; ".join(map(str, entry.inputs))
            for size, (least, most) in entry.ranges.items():
                texts[f"{name}.{size}"] = f"{least},{most}"
        return texts

    def __str__(self) -> str:
        lines = [self.name]
        for name, entry in self.entries.items():
            lines.append(f"  {name}")
            lines += [f"    {line}" for line in entry.lines()]
        code = f"the CPU that exported it, {self.cpu}"
        if self.isa == "avx2":
            code = "AVX2"
        if self.is_of_gpu:
            code = f"{self.isa}, CUDA {self.cuda}"
        versions = f"torch {self.torch}, compiled_dilated {self.compiled_dilated}"
        lines.append(f"  {versions}, {self.machine}, code for {code}")
        lines += [f"  {suffix}: sha256 {value}" for suffix, value in self.files.items()]
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> About:
    """Read a package's description, without executing anything of the package.

    Raises FileNotFoundError if the description is missing, ValueError if it is invalid.
    """
    if not Path(path).name:
        raise ValueError(f"path must name a package, FILE.pt2; got {str(path)!r}")
    description = about_path(Path(path))
    if not description.exists():
        raise FileNotFoundError(
            f"{description} is missing: the files of a package are written together by "
            "compiled_dilated.export"
        )
    try:
        fields = json.loads(description.read_text())
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']}, and this version reads {FORMAT}")
        fields["entries"] = {name: _entry(entry) for name, entry in fields["entries"].items()}
        about = About(**fields)
        about.check_fields()
        return about
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{description} does not describe a package: {error}. Export it again"
        ) from error


def _entry(fields: dict[str, Any]) -> Entry:
    """The entry of a description's fields."""
    inputs = []
    for x in fields["inputs"]:
        inputs.append(Input(x["dtype"], tuple(x["shape"]), x["contiguous"]))
    ranges = {}
    for name, (least, most) in fields["ranges"].items():
        ranges[name] = (int(least), int(most))
    attention, device = tuple(fields["attention"]), fields["device"]
    if device not in PLACES:
        raise ValueError(f"its device is {device!r}")
    return Entry(tuple(inputs), ranges, attention, fields["queries_last"], device)
