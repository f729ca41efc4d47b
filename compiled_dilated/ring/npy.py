"""Files of a streamed run (.npy), read and written by plain calls.

A memory-mapped file would kill the process on a full disk.
"""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import files

Numbers = npt.NDArray[Any]
_MAGIC = b"\x93NUMPY"
# posix_fallocate takes no more, its header included.
_LARGEST_FILE_BYTES = 2**63 - 2**16


class NpyFile:
    """A .npy file (B, H, N, D) of float16, float32 or float64.

    name: the argument's name, for errors.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        array = _mapped(path, name)
        if array.ndim != 4 or array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(
                f"{name}={path} must hold (B, H, N, D) of float16, float32 or float64; "
                f"got {array.shape} of {array.dtype}. Save it with numpy.save"
            )
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{name}={path} is in Fortran order; "
                "save it with numpy.save(path, numpy.ascontiguousarray(x))"
            )
        self.shape: tuple[int, int, int, int] = array.shape
        self.dtype, self.offset = array.dtype, int(array.offset)

    def _position(self, b: int, head: int, row: int) -> int:
        """Byte at which a row begins."""
        _, heads, tokens, width = self.shape
        return self.offset + int(((b * heads + head) * tokens + row) * width * self.dtype.itemsize)

    def read_into(self, out: Numbers, heads: range, rows: range) -> None:
        """Fill out, (B, heads, len(rows), D)."""
        for b in range(self.shape[0]):
            for i, head in enumerate(heads):
                self._read(b, head, rows, out[b, i])

    def _read(self, b: int, head: int, rows: range, out: Numbers) -> None:
        """Fill out, (len(rows), D).

        Rows skipped by the step are read too, and dropped: one read is faster than many.
        """
        span = out
        if rows.step != 1:
            span = np.empty((rows[-1] + 1 - rows.start, self.shape[3]), self.dtype)
        unread = as_bytes(span)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._position(b, head, rows.start))
            while unread:
                count = file.readinto(unread)
                if not count:
                    raise OSError(
                        f"{self.path} ends within rows {rows.start} to {rows[-1]} of head {head}: "
                        "it was cut off meanwhile"
                    )
                unread = unread[count:]
        if span is not out:
            out[:] = span[:: rows.step]

    def write(self, b: int, head: int, rows: range, part: Numbers) -> None:
        """Write consecutive rows of a head, (len(rows), D)."""
        assert rows.step == 1
        with self.path.open("r+b") as file:
            file.seek(self._position(b, head, rows.start))
            file.write(as_bytes(part))


def as_bytes(numbers: Numbers) -> memoryview:
    """The bytes in C order, without a copy if possible."""
    return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data


def _mapped(path: Path, name: str) -> np.memmap[Any, np.dtype[Any]]:
    """Map a .npy file, to read its shape, dtype and offset."""
    with files.opening(name, path), path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic.startswith(b"PK"):
        raise ValueError(
            f"{name}={path} is an .npz archive of several arrays; save one array with numpy.save"
        )
    if magic != _MAGIC:
        content = f"it begins with {magic!r}" if magic else "it is empty"
        raise ValueError(f"{name}={path} is no .npy file: {content}. Write it with numpy.save")
    try:
        array: np.memmap[Any, np.dtype[Any]] = np.load(path, mmap_mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy's parser raise errors of many kinds
        raise ValueError(
            f"{name}={path} is no whole .npy file ({error}). "
            "It was cut off, or never one; write it again with numpy.save"
        ) from error
    return array


def create(path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic], name: str) -> None:
    """Create a .npy file of zeros, allocated at full size.

    Raises OSError if the disk has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    try:
        with files.created_whole(path) as file:
            np.lib.format.write_array_header_2_0(file, header)
            if size > _LARGEST_FILE_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            if size:
                os.posix_fallocate(file.fileno(), file.tell(), size)
    except OSError as error:
        message = f"cannot create {name}={path}: {error.strerror}. Pass another path"
        if error.errno in files.NO_ROOM:
            message = f"no room for {path}, {size / 2**30:.2f} GiB: {error.strerror}. Make room"
        raise OSError(error.errno, message) from error
