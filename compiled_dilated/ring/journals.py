"""Journals: finished ranks of a long run, an append-only file with checksums."""

from __future__ import annotations

import json
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from . import files

# No journal has a longer first line: of other files no more is read.
_LONGEST_HEADER_BYTES = 2**24
# Errors show at most this much of a value in another file's first line.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 1000


def checksum(stored: bytes | memoryview) -> str:
    """Return the CRC-32 of a rank's stored rows.

    It detects torn writes, not tampering.
    """
    try:
        return f"{zlib.crc32(stored):08x}"
    except TypeError:
        raise TypeError(
            "the methods write and held of a sink must return bytes, those it stores for the rows; "
            f"got {type(stored).__name__}"
        ) from None


class JournalError(ValueError):
    """A journal that a run cannot continue.

    fault: the reason.
    removable: whether the remedy may suggest to remove the file.
    """

    def __init__(self, fault: str, path: Path, *, removable: bool) -> None:
        self.fault, self.path, self.removable = fault, path, removable
        super().__init__(f"{fault}. {self.remedy('journal')}")

    def remedy(self, argument: str) -> str:
        """The next step for the user, for the named argument.

        It never suggests to remove a file that is not a journal.
        """
        if self.removable:
            return f"Name another {argument}, or remove {self.path} to start again"
        return f"Name another {argument}"


class Journal:
    """Lines of JSON: the run, then its finished ranks.

    An existing journal is read as follows:

        first line
            of this run                                   the ranks below it are finished
            cut off, or the file is empty                 rewritten: no rank was finished
            of another run                                JournalError with the differences
            anything else                                 JournalError: not a journal; not changed
        other lines
            {"rank": number, "checksum": 8 hex digits}    the rank is finished; its last line counts
            not JSON, not UTF-8, too deep, no line end    torn by a crash: dropped, with later lines
            other JSON, or no rank of this run            JournalError: no crash writes that

    path: a regular file, or a new one; only read before `begin`. None stores nothing.
    about: properties that define the run, by name.
    ranks: all ranks that can finish.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any], ranks: Container[int]) -> None:
        self.path, self.about, self.ranks = path, dict(about), ranks
        self.done: dict[int, str] = {}
        self._unsynced: list[dict[str, Any]] = []
        self._header = _as_lines([self.about])
        # Length of the file without torn lines; `begin` cuts it there.
        self._intact_bytes = 0
        if path is not None and path.exists():
            with files.opening("journal", path):
                self._read(path)

    def _read(self, path: Path) -> None:
        """Collect the finished ranks of an existing journal."""
        with path.open("rb") as file:
            first = file.readline(max(_LONGEST_HEADER_BYTES, len(self._header)))
            # Empty, or a header that was cut off: no rank was finished.
            if first != self._header and self._header.startswith(first):
                return
            self._check_header(first, path)
            self._intact_bytes = len(first)
            for number, line in enumerate(file, 2):
                try:
                    entry = _parsed(line)
                except ValueError:  # torn
                    break
                if not self._is_finished_rank(entry):
                    raise JournalError(
                        f"line {number} of the journal {path} is {line[:80]!r}, "
                        "which no run like this one wrote: "
                        "it is not a rank of the run with the checksum of its rows",
                        path,
                        removable=True,
                    )
                self.done[entry["rank"]] = entry["checksum"]
                self._intact_bytes += len(line)

    def _check_header(self, line: bytes, path: Path) -> None:
        """Raise JournalError unless a first line describes this run."""
        # A line without any property of a run is no journal's.
        try:
            header = _parsed(line)
        except ValueError:
            header = None
        if not isinstance(header, dict) or not header.keys() & self.about.keys():
            raise JournalError(
                f"{path} is no journal of a streamed run: it begins with {line[:40]!r}",
                path,
                removable=False,
            )
        # The differences from this run, those of both sides.
        differences = []
        for key in dict.fromkeys((*self.about, *header)):
            recorded, current = header.get(key), self.about.get(key)
            if recorded != current:
                recorded, current = _SHORT.repr(recorded), _SHORT.repr(current)
                differences.append(f"{key} is {recorded} there and {current} here")
        if differences:
            raise JournalError(
                f"the journal {path} is of another run: {'; '.join(differences)}",
                path,
                removable=True,
            )

    def _is_finished_rank(self, entry: Any) -> bool:
        """Whether an entry is a rank of this run with a checksum."""
        if not isinstance(entry, dict) or entry.keys() != {"rank", "checksum"}:
            return False
        rank, digest = entry["rank"], entry["checksum"]
        has_types = type(rank) is int and isinstance(digest, str)
        return has_types and rank in self.ranks and re.fullmatch("[0-9a-f]{8}", digest) is not None

    def begin(self) -> None:
        """Create the file, or cut off torn lines, before the first `add`."""
        if self.path is None:
            return
        with files.opening("journal", self.path):
            if not self.path.exists():
                # Exclusively: a link created meanwhile is not followed.
                self.path.open("xb").close()
                files.sync_directory(self.path.parent)
            os.truncate(self.path, self._intact_bytes)
            if not self._intact_bytes:
                self._append(self._header)

    def drop_torn(self, is_intact: Callable[[int, str], bool]) -> list[int]:
        """Drop finished ranks whose stored rows are damaged; returns them.

        is_intact: a function of a rank and its checksum.
        """
        torn = [rank for rank, digest in self.done.items() if not is_intact(rank, digest)]
        for rank in torn:
            del self.done[rank]
        return torn

    def add(self, rank: int, digest: str) -> None:
        """Mark a rank as finished; on disk after the next `sync`."""
        self.done[rank] = digest
        self._unsynced.append({"rank": rank, "checksum": digest})

    def sync(self) -> None:
        """Append the lines of `add` to the file.

        The output of their ranks must be on disk already.
        """
        if self.path is not None and self._unsynced:
            self._append(_as_lines(self._unsynced))
        self._unsynced = []

    def _append(self, lines: bytes) -> None:
        """Append lines and fsync.

        After a failure none of them remains.
        """
        assert self.path is not None
        with open(self.path, "ab", buffering=0, opener=_without_creating) as file:
            size = file.seek(0, os.SEEK_END)
            remaining = memoryview(lines)
            try:
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            except OSError:
                file.truncate(size)
                raise
            os.fsync(file.fileno())


def _without_creating(path: str, flags: int) -> int:
    """Open an existing file.

    A journal that was removed during the run must not be created again without its first line.
    """
    try:
        return os.open(path, flags & ~os.O_CREAT)
    except FileNotFoundError as error:
        raise OSError(error.errno, f"the journal {path} was removed meanwhile") from error


def _as_lines(entries: list[dict[str, Any]]) -> bytes:
    """Entries as lines of JSON, with sorted keys."""
    return "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries).encode()


def _parsed(line: bytes) -> Any:
    """The value of one complete line of JSON; ValueError for anything else."""
    if not line.endswith(b"\n"):
        raise ValueError("no end of line")
    try:
        return json.loads(line.decode())
    except RecursionError as error:
        raise ValueError("nested too deep") from error
