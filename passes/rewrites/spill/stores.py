"""Where a tensor waits outside of memory: a file that has no name, or the host's memory for a tensor of a GPU.

A file has no name from its first moment on (O_TMPFILE, else unlinked at once): nobody else sees it, and the kernel frees it
however the process ends. A thread of ours writes it, with numpy alone: torch would start a second team of OpenMP threads there.
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

# numpy has no bfloat16 and no float8: elements travel as integers of the same width.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE_ELEMENTS = 2**18


@dataclass(frozen=True)
class Usage:
    """What this process keeps in files now, the most it kept at once, and all that it ever wrote, in bytes."""

    files: int = 0
    file_bytes: int = 0
    most_file_bytes: int = 0
    written_bytes: int = 0

    def changed(self, files: int, size: int) -> Usage:
        held = self.file_bytes + size
        return Usage(self.files + files, held, max(held, self.most_file_bytes), self.written_bytes + max(size, 0))


_usage = Usage()


def usage() -> Usage:
    """The files of spilled activations. Bytes count whether they have reached the disk or are still in the kernel's cache."""
    return _usage


class Store(Protocol):
    """The place of one tensor, from which it is taken once."""

    def finish(self) -> None:
        """Waits until everything is there, so that the tensor's memory may be used for something else."""

    def prefetch(self) -> None:
        """It will be taken soon."""

    def take(self, into: Tensor) -> None:
        """Fills a contiguous tensor, and gives up the place."""


class HostStore:
    """A tensor of a GPU in pinned memory of the host, copied on the stream of the computation."""

    def __init__(self, x: Tensor) -> None:
        self._kept: Tensor | None = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def finish(self) -> None:
        """Nothing to wait for: what reuses the tensor's memory stands behind the copy on the same stream."""

    def prefetch(self) -> None:
        """Nothing to do: host memory is at hand."""

    def take(self, into: Tensor) -> None:
        assert self._kept is not None
        into.copy_(self._kept, non_blocking=True)
        self._kept = None


class FileStore:
    """A tensor in a file in `directory`, row by row whatever its strides are. Raises OSError where it cannot be."""

    def __init__(self, x: Tensor, directory: str) -> None:
        self._directory, self._size = directory, x.numel() * x.element_size()
        try:
            file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 closed when the activation is gone
        except OSError as error:
            raise self._explained(error) from error
        self._file = file.fileno()
        _count(1, self._size)
        self._release = weakref.finalize(self, _release, file, self._size)
        # Held here and not by the thread's queue, so that finish() frees it at once.
        self._array: Array | None = x.detach().cpu().view(INTEGERS[x.element_size()]).numpy()
        self._written: Future[None] | None = _thread(os.getpid()).submit(self._write)

    def finish(self) -> None:
        # What is raised from here must not refer back to this store, or the file would wait for a garbage collection.
        error = None if self._written is None else self._written.exception()
        self._written = self._array = None
        if error is not None:
            raise self._explained(error) if isinstance(error, OSError) else error

    def prefetch(self) -> None:
        """Has the kernel read the file into its cache meanwhile, which takes no memory of this process."""
        if self._release.alive and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_WILLNEED)

    def take(self, into: Tensor) -> None:
        host = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        rest, offset = _bytes(host.view(INTEGERS[into.element_size()]).numpy()), 0
        while rest:
            got = os.preadv(self._file, [rest], offset)
            if not got:
                raise OSError(errno.EIO, f"a spilled activation of {self._size} bytes ended after {offset}")
            rest, offset = rest[got:], offset + got
        if host is not into:
            into.copy_(host)
        self._release()

    def _write(self) -> None:
        assert self._array is not None
        offset = 0
        for piece in _pieces(self._array):
            rest = _bytes(piece)
            while rest:
                put = os.pwrite(self._file, rest, offset)
                rest, offset = rest[put:], offset + put

    def _explained(self, error: OSError) -> OSError:
        free = shutil.disk_usage(self._directory).free if os.path.isdir(self._directory) else 0
        return OSError(
            error.errno,
            f"an activation of {self._size:,} bytes cannot be spilled to {self._directory}, where {free:,} bytes are free: "
            f"{error.strerror}. Pass another place, passes.Spill(directory=...), or spill less, least_bytes=...",
        )


def _pieces(array: Array) -> Iterator[Array]:
    """The elements row by row in contiguous pieces, so that strides cost no second copy of the whole."""
    if array.flags.c_contiguous:
        yield array
        return
    flags = ["external_loop", "buffered", "zerosize_ok"]
    yield from np.nditer(array, flags, [["readonly", "contig"]], order="C", buffersize=_PIECE_ELEMENTS)  # type: ignore[call-overload]


def _bytes(array: Array) -> memoryview:
    return memoryview(array.reshape(-1).data).cast("B") if array.size else memoryview(b"")


@functools.cache
def _thread(_process: int) -> ThreadPoolExecutor:
    """One thread, so that writes keep their order; a forked process has none of its parent's and starts its own."""
    return ThreadPoolExecutor(1, thread_name_prefix="spill")


def _release(file: IO[bytes], size: int) -> None:
    file.close()
    _count(-1, -size)


def _count(files: int, size: int) -> None:
    global _usage
    _usage = _usage.changed(files, size)
