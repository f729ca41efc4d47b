"""Stores of tensors: files without names, or host memory for GPUs.

A file never has a name (O_TMPFILE, or unlinked at once): no other process can open it, and the
kernel frees it however the process ends. A thread writes it, with numpy: torch would start a second
team of OpenMP threads there.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# numpy has no bfloat16 and no float8: elements are viewed as integers of the same width.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE_ELEMENTS = 2**18


@dataclass(frozen=True)
class Usage:
    """The files of this process.

    files, file_bytes: now
    most_file_bytes: the most at one time
    written_bytes: all that was ever written
    """

    files: int = 0
    file_bytes: int = 0
    most_file_bytes: int = 0
    written_bytes: int = 0

    def changed(self, files: int, size: int) -> Usage:
        """The usage with files and bytes added, or removed if negative."""
        file_bytes = self.file_bytes + size
        return Usage(
            files=self.files + files,
            file_bytes=file_bytes,
            most_file_bytes=max(file_bytes, self.most_file_bytes),
            written_bytes=self.written_bytes + max(size, 0),
        )


_usage = Usage()


def usage() -> Usage:
    """The files of spilled activations.

    Bytes count on the disk and in the kernel's cache alike.
    """
    return _usage


class Store(Protocol):
    """Storage for one tensor, which is read once."""

    def finish(self) -> None:
        """Wait until the tensor is written and its memory reusable."""

    def prefetch(self) -> None:
        """Prepare for a `take` soon."""

    def take(self, into: Tensor) -> None:
        """Read into a contiguous tensor, and free the storage."""


class HostStore:
    """A GPU's tensor in pinned host memory, copied on its current stream."""

    def __init__(self, x: Tensor) -> None:
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._pinned: Tensor | None = pinned.copy_(x, non_blocking=True)

    def finish(self) -> None:
        """Return at once: later uses of the memory are stream-ordered."""

    def prefetch(self) -> None:
        """Return at once: host memory needs no preparation."""

    def take(self, into: Tensor) -> None:
        assert self._pinned is not None
        into.copy_(self._pinned, non_blocking=True)
        self._pinned = None


class FileStore:
    """A tensor in a file in `directory`, in row-major order.

    Raises OSError if the file cannot be created, written or read.
    """

    def __init__(self, x: Tensor, directory: str) -> None:
        self._directory, self._size = directory, x.numel() * x.element_size()
        try:
            # Closed by _release, with the store.
            file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._explained(error) from error
        self._file = file.fileno()
        _count(1, self._size)
        self._release = weakref.finalize(self, _release, file, self._size)
        # The store refers to it, not the thread's queue, so that finish() frees it at once.
        integers = x.detach().cpu().view(INTEGERS[x.element_size()])
        self._array: Array | None = integers.numpy()
        self._written: Future[None] | None = _thread(os.getpid()).submit(self._write)

    def finish(self) -> None:
        # An error raised here must not refer to the store: a cycle would keep the file open until
        # a garbage collection.
        error: BaseException | None = None
        if self._written is not None:
            error = self._written.exception()
        self._written = self._array = None
        if isinstance(error, OSError):
            raise self._explained(error)
        if error is not None:
            raise error

    def prefetch(self) -> None:
        """Advise the kernel to read the file into its page cache."""
        if self._release.alive and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_WILLNEED)

    def take(self, into: Tensor) -> None:
        host = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        # A read may return fewer bytes than requested.
        unread = _bytes(host.view(INTEGERS[into.element_size()]).numpy())
        offset = 0
        while unread:
            count = os.preadv(self._file, [unread], offset)
            if not count:
                raise OSError(
                    errno.EIO, f"a spilled activation of {self._size} bytes ended after {offset}"
                )
            unread, offset = unread[count:], offset + count
        if host is not into:
            into.copy_(host)
        self._release()

    def _write(self) -> None:
        assert self._array is not None
        offset = 0
        for piece in _pieces(self._array):
            # A write may take fewer bytes than requested.
            unwritten = _bytes(piece)
            while unwritten:
                count = os.pwrite(self._file, unwritten, offset)
                unwritten, offset = unwritten[count:], offset + count

    def _explained(self, error: OSError) -> OSError:
        """The error with what was stored where, and what to do."""
        free = 0
        if os.path.isdir(self._directory):
            free = shutil.disk_usage(self._directory).free
        return OSError(
            error.errno,
            f"an activation of {self._size:,} bytes cannot be spilled to {self._directory}, where "
            f"{free:,} bytes are free: {error.strerror}. Pass another place, "
            "passes.Spill(directory=...), or spill less, least_bytes=...",
        )


def _pieces(array: Array) -> Iterator[Array]:
    """Yield the elements in row-major order, in contiguous pieces.

    That takes no second copy of the tensor.
    """
    if array.flags.c_contiguous:
        yield array
        return
    yield from np.nditer(  # type: ignore[call-overload]
        array,
        ["external_loop", "buffered", "zerosize_ok"],
        [["readonly", "contig"]],
        order="C",
        buffersize=_PIECE_ELEMENTS,
    )


def _bytes(array: Array) -> memoryview:
    if not array.size:
        return memoryview(b"")
    return memoryview(array.reshape(-1).data).cast("B")


@functools.cache
def _thread(_process: int) -> ThreadPoolExecutor:
    """The thread that writes, one so that writes keep their order.

    A forked process has its own.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="spill")


def _release(file: IO[bytes], size: int) -> None:
    file.close()
    _count(-1, -size)


def _count(files: int, size: int) -> None:
    global _usage
    _usage = _usage.changed(files, size)
