"""Files of a streamed run.

No file is both read and written, and a power cut tears none.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compiled_dilated.ring import pipeline
from compiled_dilated.ring.journals import checksum
from compiled_dilated.ring.sources import FileSink, FileSource, SampleSink
from tests.streaming import RANKS, RUN, SHAPE, enter, snapshot, stream


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


# Files that are one


def as_itself(name: str) -> str:
    return name


def by_another_path(name: str) -> str:
    (Path.cwd() / "inner").mkdir()
    return f"inner/../{name}"


def by_symbolic_link(name: str) -> str:
    os.symlink(name, "other")
    return "other"


def by_hard_link(name: str) -> str:
    os.link(name, "other")
    return "other"


WAYS = [as_itself, by_another_path, by_symbolic_link, by_hard_link]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_output_that_is_an_input_is_refused(
    home: Path, name: str, way: Callable[[str], str]
) -> None:
    path = way(f"{name}.npy")
    before = snapshot(home)
    message = rf"out='{path}' and {name}='{name}\.npy' are one file.* Pass another path as out"
    with pytest.raises(ValueError, match=message):
        stream(path)
    assert snapshot(home) == before


def test_one_file_for_every_argument_is_refused(home: Path) -> None:
    before = snapshot(home)
    with pytest.raises(ValueError, match=r"out='q\.npy' and q='q\.npy' are one file"):
        RUN("q.npy", "q.npy", "q.npy", "q.npy")
    assert snapshot(home) == before
    assert RUN("q.npy", "q.npy", "q.npy", "out.npy").complete


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["k", "out"])
def test_a_journal_that_is_an_input_or_the_output_is_refused(
    home: Path, name: str, way: Callable[[str], str]
) -> None:
    stream()
    path = way(f"{name}.npy")
    before = snapshot(home)
    message = rf"journal='{path}' and {name}='{name}\.npy' are one file"
    with pytest.raises(ValueError, match=message):
        stream(journal=path)
    assert snapshot(home) == before


def test_new_files_are_compared_by_their_resolved_paths(home: Path) -> None:
    os.symlink(home, "link")
    before = snapshot(home)
    message = r"journal='link/out\.npy' and out='out\.npy' are one file"
    with pytest.raises(ValueError, match=message):
        stream(journal="link/out.npy")
    assert snapshot(home) == before
    assert stream("link/out.npy", journal="link/journal").complete


def test_sources_and_sinks_of_the_library_are_compared_by_their_files(home: Path) -> None:
    before = snapshot(home)
    with pytest.raises(ValueError, match=r"out='q\.npy' and q='q\.npy' are one file"):
        stream(FileSink("q.npy", SHAPE, torch.float64), q=FileSource("q.npy"))
    np.save("rows.npy", np.zeros((1, 2, 3, 2)))
    with pytest.raises(ValueError, match=r"journal='rows\.npy' and out='rows\.npy' are one file"):
        stream(SampleSink("rows.npy", SHAPE, [0, 3, 7], torch.float64), journal="rows.npy")
    os.unlink("rows.npy")
    assert snapshot(home) == before


# Links, and files that are being created


@pytest.mark.parametrize("argument", ["out", "journal"])
def test_a_link_to_nothing_is_refused(home: Path, argument: str) -> None:
    os.symlink("elsewhere", "link")
    before = snapshot(home)
    message = f"{argument}='link' is a symbolic link to 'elsewhere', which does not exist"
    with pytest.raises(ValueError, match=message):
        stream(**{argument: "link"})
    assert snapshot(home) == before


def test_a_link_under_the_name_of_an_unfinished_output_is_not_followed(home: Path) -> None:
    Path("precious").write_text("a thesis")
    os.symlink("precious", "out.npy.unfinished")
    assert stream().complete
    assert Path("precious").read_text() == "a thesis"


def test_an_unfinished_file_is_created_exclusively(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["0", "0", "1"])
    monkeypatch.setattr("secrets.token_hex", lambda count: next(names))
    Path("precious").write_text("a thesis")
    os.symlink("precious", "unfinished-0")
    before = snapshot(home)
    for _ in range(2):
        with pytest.raises(FileExistsError):
            stream()
        assert snapshot(home) == before
    assert stream().complete


def test_unfinished_outputs_have_names_that_differ(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_path = Path.open

    def recording(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "xb":
            opened.append(path.name)
        return open_path(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", recording)
    for number in range(3):
        stream(f"out{number}.npy")
    assert len(set(opened)) == 3
    assert all(len(name) > len("unfinished-") + 12 for name in opened)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_unfinished_output_is_removed_after_an_error(
    home: Path, monkeypatch: Any, error: BaseException
) -> None:
    def full(*arguments: int) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = snapshot(home)
    with pytest.raises(type(error)):
        stream(journal="journal")
    assert snapshot(home) == before


def test_the_output_has_the_permissions_of_other_new_files(home: Path) -> None:
    stream(journal="journal")
    Path("plain").touch()
    modes = {Path(name).stat().st_mode for name in ("plain", "out.npy", "journal")}
    assert len(modes) == 1


# Power cuts


class Disk:
    """The state after a power cut.

    Files and directories are as they were at their last fsync.

    files: bytes by name.
    names: paths in the directories.
    before_a_file: called before the fsync of a file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files, self.names, self._fsync = dict[str, bytes](), set[str](), os.fsync
        self.before_a_file: Callable[[], None] = lambda: None
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._fsync(descriptor)
        if path.is_dir():
            self.names.update(str(path / name) for name in os.listdir(path))
        else:
            self.before_a_file()
            self.files[path.name] = path.read_bytes()

    def checksums(self) -> dict[int, str]:
        """Checksums of the output on disk, by rank."""
        if "out.npy" not in self.files:
            return {}
        out = np.load(io.BytesIO(self.files["out.npy"]))
        parts = np.split(out, RANKS, axis=2)
        return {rank: checksum(part.tobytes()) for rank, part in enumerate(parts)}


def ranks_and_checksums(journal: bytes) -> dict[int, str]:
    entries = [json.loads(line) for line in journal.splitlines()[1:]]
    return {entry["rank"]: entry["checksum"] for entry in entries}


def test_a_journal_names_only_ranks_whose_output_was_fsynced(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may write a journal to disk before its fsync."""
    disk, seen = Disk(monkeypatch), set[int]()

    def check() -> None:
        path = Path("journal")
        finished = ranks_and_checksums(path.read_bytes()) if path.exists() else {}
        assert finished.items() <= disk.checksums().items()
        seen.update(finished)

    disk.before_a_file = check
    monkeypatch.setattr(pipeline, "_SYNC_SECONDS", -1.0)
    stream(journal="journal", on_progress=lambda progress: check())
    assert seen == set(range(RANKS))


@pytest.mark.parametrize("seconds", [-1.0, 60.0])
def test_all_files_of_a_finished_run_were_fsynced(
    home: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr(pipeline, "_SYNC_SECONDS", seconds)
    stream(journal="journal")
    for name in ("out.npy", "journal"):
        assert disk.files[name] == Path(name).read_bytes()
    assert ranks_and_checksums(disk.files["journal"]) == disk.checksums()


def test_the_names_of_new_files_were_fsynced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    Path("results").mkdir()
    stream("results/out.npy", journal="journal")
    assert {str(home / "results" / "out.npy"), str(home / "journal")} <= disk.names


def test_a_disk_that_fails_at_the_end_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sink: FileSink) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileSink, "sync", fail)
    message = (
        r"cannot write the end of the output: Input/output error\. "
        r"4 of 4 ranks .* call again with the same journal"
    )
    with pytest.raises(OSError, match=message):
        stream(journal="journal")
