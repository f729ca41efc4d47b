"""Files of a streamed run: path checks, and creation without following links."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Errors of a full disk, an exhausted quota, and a file that would be too large.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def input_file(name: str, value: object) -> Path:
    """Return the path of a regular file that exists.

    name: the argument, for the error.

    Raises TypeError if `value` is no path; ValueError if no file can have that path, or if it leads
    to something other than a file; OSError if the file does not exist or cannot be accessed.
    """
    path = _path(name, value)
    if not _exists(name, path):
        raise FileNotFoundError(
            errno.ENOENT,
            f"{name} must be a file; there is none at {str(path)!r}. "
            "Write it with numpy.save, or correct the path",
        )
    return path


def output_file(name: str, value: object) -> Path:
    """Return the path of an existing or new regular file.

    The directory must exist. Raises as `input_file` does. A link to nothing is a ValueError: a file
    would be created where it leads.
    """
    path = _path(name, value)
    if not _exists(name, path) and not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"{name}={str(path)!r} is in a directory that does not exist. "
            f"Create {str(path.parent)!r} first",
        )
    return path


def _path(name: str, value: object) -> Path:
    """Return a path that the file system can represent."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(
            f"{name} must be a path, a str or pathlib.Path; got {type(value).__name__}. "
            "Pass the path of the file"
        )
    if not text:
        raise ValueError(f"{name} must be a path; got an empty str. Pass the path of the file")
    try:
        unusable = b"\0" in os.fsencode(text)
    except UnicodeEncodeError:  # a lone surrogate, which no file name can contain
        unusable = True
    if unusable:
        raise ValueError(
            f"{name} must be a path; got {text!r}, which no file can be called. "
            "Pass the path of the file"
        )
    return Path(text)


def _exists(name: str, path: Path) -> bool:
    """Whether a regular file exists.

    Raises ValueError for anything else, and for a link to nothing.
    """
    with opening(name, path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink():
                raise ValueError(
                    f"{name}={str(path)!r} is a symbolic link to {os.readlink(path)!r}, "
                    "which does not exist. Pass the file itself, or remove the link"
                ) from None
            return False
    if not stat.S_ISREG(mode):
        kind = "directory" if stat.S_ISDIR(mode) else "device, pipe or socket"
        raise ValueError(
            f"{name}={str(path)!r} is a {kind}; it must be a regular file. Pass the path of a file"
        )
    return True


@contextlib.contextmanager
def opening(name: str, path: Path) -> Iterator[None]:
    """Name the argument in errors of opening or creating its file."""
    try:
        yield
    except OSError as error:
        remedy = "Change its permissions, or pass another file"
        if error.errno in NO_ROOM:
            remedy = "Make room"
        raise OSError(
            error.errno, f"{name}={str(path)!r} cannot be used: {error.strerror}. {remedy}"
        ) from error


def is_same(first: Path, second: Path) -> bool:
    """Return whether two paths lead to one file, through links as well."""
    if first.exists() and second.exists():
        return first.samefile(second)
    return os.path.realpath(first) == os.path.realpath(second)


@contextlib.contextmanager
def created_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, named `path` once it is complete.

    Until then it has a random name in the same directory. It is created exclusively, and removed
    after any error or interrupt. Its content and its name are on disk when this returns.
    """
    unfinished = path.with_name(f"unfinished-{secrets.token_hex(8)}")
    # O_EXCL: fails if anything has this name, even a link to nothing.
    with unfinished.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink()
            raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Write a directory to disk.

    The fsync of a file does not write its name.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
