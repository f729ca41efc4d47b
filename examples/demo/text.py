"""The demo's text: the sources of Python's standard library.

They are present on every machine.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Installed packages, and tests, which are repetitive.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Every 20th file is validation text.
_EVERY_HELD_OUT = 20
_LEAST_BYTES = 2**18


@dataclass(frozen=True, eq=False)
class Text:
    """Training and validation text of different files.

    training, validation: (bytes,) uint8.
    files: number of files.
    folder: their path.
    """

    training: Tensor
    validation: Tensor
    files: int
    folder: str

    @property
    def unigram_bits(self) -> float:
        """Entropy of the distribution of single bytes, in bits a byte."""
        share = torch.bincount(self.training.int(), minlength=256).double() / len(self.training)
        return float(-(share[share > 0] * share[share > 0].log2()).sum())

    def to_json(self) -> dict[str, Any]:
        """Sizes and folder, without the text itself."""
        return {
            "folder": self.folder,
            "files": self.files,
            "training_bytes": len(self.training),
            "validation_bytes": len(self.validation),
            "unigram_bits": self.unigram_bits,
        }

    def windows(self, tokens: int, count: int, random: torch.Generator) -> Tensor:
        """Random windows of the training text, (count, tokens + 1) int64."""
        starts = torch.randint(len(self.training) - tokens, (count,), generator=random)
        windows = [self.training[start : start + tokens + 1] for start in starts.tolist()]
        return torch.stack(windows).long()

    def held_out(self, tokens: int, count: int) -> Tensor:
        """The first windows of the validation text, (count, tokens + 1) int64.

        count: fewer if the text is too short.
        """
        count = min(count, len(self.validation) // (tokens + 1))
        return self.validation[: count * (tokens + 1)].view(count, tokens + 1).long()


def read(folder: Path | None = None) -> Text:
    """Read the .py files of a folder in order of path.

    folder: None for the standard library's.

    Raises ValueError if there is too little text.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = list(_sources(folder))
    # Every so many files are for validation.
    validation = b"\n".join(files[::_EVERY_HELD_OUT])
    training_files = files.copy()
    del training_files[::_EVERY_HELD_OUT]
    training = b"\n".join(training_files)
    if min(len(training), len(validation) * _EVERY_HELD_OUT) < _LEAST_BYTES:
        raise ValueError(
            f"{folder} holds {len(training) + len(validation):,} bytes of Python sources; "
            f"the demo needs {_LEAST_BYTES:,}. Give it a folder with more: --text FOLDER"
        )
    return Text(_bytes(training), _bytes(validation), len(files), str(folder))


def _bytes(content: bytes) -> Tensor:
    """Bytes as a tensor (bytes,) uint8."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _sources(folder: Path) -> Iterator[bytes]:
    """Contents of a folder's .py files in UTF-8, by path."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name in sorted(paths):
        if not _LEFT_OUT & set(name.split("/")):
            content = paths[name].read_bytes()
            try:
                content.decode()
            except UnicodeDecodeError:
                continue
            yield content
