"""What of a long run is done: a file that only grows, one line a finished rank, believed only where its checksums hold."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def checksum(kept: bytes | memoryview) -> str:
    """Of what a sink keeps of a rank's rows. Told apart are rows written whole and rows that a crash tore, not a forger's."""
    return f"{zlib.crc32(kept):08x}"


class Journal:
    """Lines of JSON: what is computed, then the ranks that are finished. Without a path, nothing is remembered."""

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self.path, self.about = None if path is None else Path(path), dict(about)
        self.done: dict[int, str] = {}
        self._new: list[dict[str, Any]] = []
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path)
        else:
            self._append([self.about])

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        header = _parsed(lines[0])
        if header != self.about:
            other = header or {}
            odd = [
                f"{key} is {other.get(key)!r} there and {value!r} here"
                for key, value in self.about.items()
                if other.get(key) != value
            ]
            raise ValueError(
                f"the journal {path} is of another run: {'; '.join(odd)}. Name another journal, or remove this one to start again"
            )
        good = len(lines[0]) + 1
        for line in lines[1:-1]:  # what follows the last end of a line was being written when the process died
            entry = _parsed(line)
            if entry is None:
                break
            self.done[entry["rank"]] = entry["checksum"]
            good += len(line) + 1
        os.truncate(path, good)

    def keep(self, holds: Callable[[int, str], bool]) -> list[int]:
        """Forget the finished ranks whose output is not what was written; returns them."""
        torn = [rank for rank, digest in self.done.items() if not holds(rank, digest)]
        for rank in torn:
            del self.done[rank]
        return torn

    def add(self, rank: int, digest: str) -> None:
        """A rank is finished; on the disk after the next `sync`."""
        self.done[rank] = digest
        self._new.append({"rank": rank, "checksum": digest})

    def sync(self) -> None:
        """Write what is new. What it speaks of must be on the disk already."""
        if self.path is not None and self._new:
            self._append(self._new)
        self._new = []

    def _append(self, entries: list[dict[str, Any]]) -> None:
        assert self.path is not None
        with self.path.open("a") as file:
            file.write("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
