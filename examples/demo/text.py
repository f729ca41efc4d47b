"""The demo's text: the sources of Python's own standard library, which is on any machine that runs this."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Packages that somebody installed, and tests, which repeat themselves.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_EVERY_HELD_OUT = 20
_LEAST_BYTES = 2**18


@dataclass(frozen=True, eq=False)
class Text:
    """Bytes (n,) uint8 to train on and, from other files, to validate on."""

    training: Tensor
    validation: Tensor
    files: int
    folder: str

    @property
    def unigram_bits(self) -> float:
        """Bits a byte of the best guess that knows how often each byte occurs and nothing else."""
        share = torch.bincount(self.training.int(), minlength=256).double() / len(self.training)
        return float(-(share[share > 0] * share[share > 0].log2()).sum())

    def to_json(self) -> dict[str, Any]:
        """What it is, without the text itself."""
        sizes = {"training_bytes": len(self.training), "validation_bytes": len(self.validation)}
        return {
            "folder": self.folder,
            "files": self.files,
            **sizes,
            "unigram_bits": self.unigram_bits,
        }

    def windows(self, tokens: int, count: int, random: torch.Generator) -> Tensor:
        """(count, tokens + 1) bytes from random places of the training text, int64."""
        starts = torch.randint(len(self.training) - tokens, (count,), generator=random)
        return torch.stack(
            [self.training[start : start + tokens + 1] for start in starts.tolist()]
        ).long()

    def held_out(self, tokens: int, count: int) -> Tensor:
        """(count or fewer, tokens + 1) bytes from the start of the validation text, int64."""
        count = min(count, len(self.validation) // (tokens + 1))
        return self.validation[: count * (tokens + 1)].view(count, tokens + 1).long()


def read(folder: Path | None = None) -> Text:
    """The .py files of a folder (None: the standard library's) by path, those that are UTF-8; every 20th is held out.

    Raises ValueError where there is too little text.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, content in enumerate(_sources(folder)):
        parts[number % _EVERY_HELD_OUT == 0].append(content)
    training, validation = (b"\n".join(part) for part in parts)
    if min(len(training), len(validation) * _EVERY_HELD_OUT) < _LEAST_BYTES:
        raise ValueError(
            f"{folder} holds {len(training) + len(validation):,} bytes of Python sources; the demo needs {_LEAST_BYTES:,}. "
            "Give it a folder with more: --text FOLDER"
        )
    train, held_out = (
        torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (training, validation)
    )
    return Text(train, held_out, sum(map(len, parts)), str(folder))


def _sources(folder: Path) -> Iterator[bytes]:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name in sorted(paths):
        if not _LEFT_OUT & set(name.split("/")):
            content = paths[name].read_bytes()
            try:
                content.decode()
            except UnicodeDecodeError:
                continue
            yield content
