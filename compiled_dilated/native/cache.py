"""The user's folder of built libraries: private, digest-checked, and bounded in size."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from .recipes import NativeUnavailable

# Enough for all kinds of machines that share a home directory, times versions in use.
_MOST_LIBRARIES = 48
_STALE_SECONDS = 3600.0
BUILDING = ".building-"  # prefix of the temporary folders of builds


def folder() -> Path:
    """Create the user's folder of libraries, or check the existing one.

    COMPILED_DILATED_CACHE, or compiled_dilated in XDG_CACHE_HOME or ~/.cache.

    Raises NativeUnavailable where there is none, or where other users could write to it.
    """
    path = _path()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = path.stat()
    except OSError as error:
        raise NativeUnavailable(
            f"{path} cannot be created: {error}; set COMPILED_DILATED_CACHE to a folder of your own"
        ) from error
    remedy = f"use `chmod 700 {path}`, or set COMPILED_DILATED_CACHE to a folder of your own"
    if state.st_uid != os.getuid():
        raise NativeUnavailable(
            f"{path} belongs to user {state.st_uid}, who could put code there; {remedy}"
        )
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailable(f"{path} is writable by others, who could put code there; {remedy}")
    return path


def _path() -> Path:
    variable = os.environ.get("COMPILED_DILATED_CACHE")
    if variable:
        return Path(variable)
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches:
        return Path(caches) / "compiled_dilated"
    try:
        return Path.home() / ".cache" / "compiled_dilated"
    except RuntimeError as error:  # HOME is unset, and the user has no entry in passwd
        raise NativeUnavailable(
            f"user {os.getuid()} has no home directory to keep the native kernels in; "
            "set COMPILED_DILATED_CACHE to a folder that can be written to"
        ) from error


def is_intact(library: Path) -> bool:
    """Whether the library exists with the bytes that were built."""
    try:
        expected = digest_file(library).read_text().strip()
        return expected == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def digest_file(library: Path) -> Path:
    """The file beside a library with the digest of its bytes."""
    return library.with_name(library.name + ".sha256")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclude other processes from building in the folder.

    The kernel releases the lock of a process that dies. On file systems without locks two
    processes may build the same library, which is correct but slower.

    Raises NativeUnavailable for a folder that cannot be written to.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(path / ".lock", "a"))
        except OSError as error:
            raise write_error(path, error) from error
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_error(path: Path, error: OSError) -> NativeUnavailable:
    """The error of a folder on a full or read-only disk."""
    return NativeUnavailable(
        f"the native kernels cannot be kept in {path}: {error}; "
        "set COMPILED_DILATED_CACHE to a folder that can be written to, on a disk with space"
    )


def tidy(path: Path, newest: str) -> None:
    """Remove the leftovers of killed builds and the least recently used libraries.

    newest: the file name of the library that was just built.
    """
    for leftover in path.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    older = [library for library in path.glob("native-*.so") if library.name != newest]
    older.sort(key=_last_use, reverse=True)
    for library in older[_MOST_LIBRARIES - 1 :]:
        library.unlink(missing_ok=True)
        digest_file(library).unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
