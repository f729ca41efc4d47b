"""Sources of q, k and v, and sinks of the output, for tensors larger than memory.

All are (B, H, N, D), read and written by runs of tokens.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import arguments, checks
from ..heads import HeadRange
from . import files

Numbers = npt.NDArray[Any]
_NPY_MAGIC = b"\x93NUMPY"
# posix_fallocate takes no more, its header included.
_LARGEST_FILE_BYTES = 2**63 - 2**16


class Source(Protocol):
    """Rows that can be read repeatedly, in any order, from several threads.

    A journal compares sources by `repr`, which therefore has to identify the content.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, D)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        ...

    def read_into(self, out: Tensor, heads: HeadRange, rows: range) -> None:
        """Fill `out`, (B, heads, len(rows), D) and contiguous."""
        ...


def read(source: Source, heads: HeadRange, rows: range) -> Tensor:
    """Rows as a new tensor (B, heads, len(rows), D)."""
    out = torch.empty(
        (source.shape[0], heads.count, len(rows), source.shape[3]),
        dtype=source.dtype,
    )
    source.read_into(out, heads, rows)
    return out


class Sink(Protocol):
    """Stores the rows of an output."""

    def write(self, rows: range, part: Tensor) -> bytes | memoryview:
        """Store (B, H, len(rows), D); returns the bytes that `held` will return."""
        ...

    def held(self, rows: range) -> bytes:
        """Stored bytes of some rows, for a checksum."""
        ...

    def sync(self) -> None:
        """Return once everything written is on disk."""
        ...


def _mapped(path: Path, name: str) -> np.memmap[Any, np.dtype[Any]]:
    """Map a .npy file, to read its shape, dtype and offset."""
    with files.opening(name, path), path.open("rb") as file:
        magic = file.read(len(_NPY_MAGIC))
    if magic.startswith(b"PK"):
        raise ValueError(
            f"{name}={path} is an .npz archive of several arrays; save one array with numpy.save",
        )
    if magic != _NPY_MAGIC:
        begins = f"it begins with {magic!r}" if magic else "it is empty"
        raise ValueError(f"{name}={path} is no .npy file: {begins}. Write it with numpy.save")
    try:
        array: np.memmap[Any, np.dtype[Any]] = np.load(path, mmap_mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy's parser raise errors of many kinds
        raise ValueError(
            f"{name}={path} is no whole .npy file ({error}). It was cut off, or never one; write it again with numpy.save"
        ) from error
    return array


class _Npy:
    """A .npy file (B, H, N, D), read and written by plain calls.

    A memory-mapped file would kill the process on a full disk.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        array = _mapped(path, name)
        if array.ndim != 4 or array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(
                f"{name}={path} must hold (B, H, N, D) of float16, float32 or float64; got {array.shape} of {array.dtype}. "
                "Save it with numpy.save"
            )
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{name}={path} is in Fortran order; save it with numpy.save(path, numpy.ascontiguousarray(x))",
            )
        self.shape: tuple[int, int, int, int] = array.shape
        self.dtype, self.offset = array.dtype, int(array.offset)

    def _at(self, b: int, head: int, row: int) -> int:
        _, heads, tokens, width = self.shape
        return self.offset + int(((b * heads + head) * tokens + row) * width * self.dtype.itemsize)

    def read_into(self, out: Numbers, heads: range, rows: range) -> None:
        """`out` is (B, heads, len(rows), D)."""
        for b in range(self.shape[0]):
            for i, head in enumerate(heads):
                self._read(b, head, rows, out[b, i])

    def _read(self, b: int, head: int, rows: range, into: Numbers) -> None:
        """Read rows; rows skipped by the step are read too, and dropped."""
        span = (
            into
            if rows.step == 1
            else np.empty((rows[-1] + 1 - rows.start, self.shape[3]), self.dtype)
        )
        room = _bytes(span)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._at(b, head, rows.start))
            while room:
                got = file.readinto(room)
                if not got:
                    raise OSError(
                        f"{self.path} ends within rows {rows.start} to {rows[-1]} of head {head}: it was cut off meanwhile"
                    )
                room = room[got:]
        if span is not into:
            into[:] = span[:: rows.step]

    def write(self, b: int, head: int, rows: range, part: Numbers) -> None:
        """Write consecutive rows."""
        assert rows.step == 1
        with self.path.open("r+b") as file:
            file.seek(self._at(b, head, rows.start))
            file.write(_bytes(part))


def _bytes(numbers: Numbers) -> memoryview:
    """The bytes in C order, without a copy if possible."""
    return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data


class FileSource:
    """A .npy file (B, H, N, D) of float16, float32 or float64, read on demand."""

    def __init__(self, path: str | os.PathLike[str], name: str = "path") -> None:
        """name: the argument's name, for errors."""
        self.path = files.input_file(name, path)
        self._npy = _Npy(self.path, name)
        self.shape = self._npy.shape
        self.dtype = torch.from_numpy(np.empty(0, self._npy.dtype)).dtype

    def read_into(self, out: Tensor, heads: HeadRange, rows: range) -> None:
        """Read rows from the file."""
        self._npy.read_into(out.numpy(), heads.indices(), rows)

    def __repr__(self) -> str:
        # Names the content, as well as a journal can: a run does not go on with another file of the
        # same name.
        state = self.path.stat()
        return (
            f"FileSource({str(self.path)!r}) of {state.st_size} bytes, modified {state.st_mtime_ns}"
        )


@dataclass(frozen=True)
class GeneratedSource:
    """Random numbers of mean 0 and variance 1, generated on demand (Philox).

    seed, stream: sources with one seed and different streams are independent.
    block: rows per counter; another value gives other numbers.
    """

    shape: tuple[int, int, int, int]
    seed: int
    stream: int
    dtype: torch.dtype = torch.float32
    block: int = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", sizes("shape", self.shape))
        for name in ("seed", "stream"):
            arguments.integer(name, getattr(self, name), 0)
        check_dtype("dtype", self.dtype)
        arguments.integer("block", self.block, 1)

    def read_into(self, out: Tensor, heads: HeadRange, rows: range) -> None:
        """Generate rows, block by block."""
        for b in range(self.shape[0]):
            for i, head in enumerate(heads.indices()):
                done = 0
                for number in range(rows.start // self.block, rows[-1] // self.block + 1):
                    first = number * self.block
                    block_rows = range(rows[done], min(rows.stop, first + self.block), rows.step)
                    numbers = torch.from_numpy(self._block(b, head, number))
                    out[b, i, done : done + len(block_rows)] = numbers[
                        block_rows.start - first : block_rows.stop - first : block_rows.step
                    ]
                    done += len(block_rows)

    def _block(self, b: int, head: int, number: int) -> Numbers:
        key = np.array([self.seed, self.stream], dtype=np.uint64)
        counter = np.array([0, number, head, b], dtype=np.uint64)
        numbers = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(
            (self.block, self.shape[3]), dtype=np.float32
        )
        numbers -= 0.5
        numbers *= math.sqrt(12)
        return numbers


def sizes(name: str, shape: object) -> tuple[int, int, int, int]:
    """Check that a shape is (batch, heads, tokens, head_dim)."""
    out = arguments.integers(name, shape, 0)
    if len(out) != 4:
        raise ValueError(
            f"{name} must be (batch, heads, tokens, head_dim); got {out}. Add the missing dimensions",
        )
    return out[0], out[1], out[2], out[3]


def check_dtype(name: str, dtype: object) -> None:
    """Raise unless the dtype is supported."""
    if not isinstance(dtype, torch.dtype) or dtype not in checks.DTYPES:
        raise TypeError(
            f"{name} must be torch.float16, bfloat16, float32 or float64; got {type(dtype).__name__} {dtype!r}",
        )


def _kind(dtype: torch.dtype) -> np.dtype[np.generic]:
    check_dtype("dtype", dtype)
    if dtype == torch.bfloat16:
        raise TypeError(
            f"a .npy file holds float16, float32 or float64; got {dtype}. Convert the sources",
        )
    return torch.empty(0, dtype=dtype).numpy().dtype


class FileSink:
    """A .npy file (B, H, N, D), allocated at its full size if it does not exist."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        dtype: torch.dtype,
        name: str = "path",
    ) -> None:
        """name: the argument's name, for errors."""
        self.path, self.shape, self.dtype = (
            files.output_file(name, path),
            sizes("shape", shape),
            dtype,
        )
        kind = _kind(dtype)
        if not self.path.exists():
            _create(self.path, self.shape, kind, name)
        self._npy = _Npy(self.path, name)
        if self._npy.shape != self.shape or self._npy.dtype != kind:
            raise ValueError(
                f"{name}={self.path} holds {self._npy.shape} of {self._npy.dtype}, the output is {self.shape} of {kind}. "
                "Choose another file, or remove this one"
            )
        with files.opening(name, self.path):
            self.path.open(
                "r+b"
            ).close()  # a file that may not be written to fails here, not after the first rank

    def write(self, rows: range, part: Tensor) -> memoryview:
        """Write rows to the file; on disk after `sync`."""
        for b in range(part.shape[0]):
            for head in range(part.shape[1]):
                self._npy.write(b, head, rows, part[b, head].numpy())
        return _bytes(part.numpy())

    def held(self, rows: range) -> bytes:
        """Rows read back from the file."""
        batch, heads, _, width = self._npy.shape
        out = np.empty((batch, heads, len(rows), width), self._npy.dtype)
        self._npy.read_into(out, range(heads), rows)
        return out.tobytes()

    def sync(self) -> None:
        """fsync, then drop the file from the page cache, which it would fill."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _create(path: Path, shape: tuple[int, ...], kind: np.dtype[np.generic], name: str) -> None:
    """Create a .npy file of zeros; fails here if the disk has no room."""
    size = math.prod(shape) * kind.itemsize
    try:
        with files.created_whole(path) as file:
            np.lib.format.write_array_header_2_0(
                file,
                {
                    "descr": np.lib.format.dtype_to_descr(kind),
                    "fortran_order": False,
                    "shape": shape,
                },
            )
            if size > _LARGEST_FILE_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            if size:
                os.posix_fallocate(file.fileno(), file.tell(), size)
    except OSError as error:
        if error.errno in files.NO_ROOM:
            raise OSError(
                error.errno,
                f"no room for {path}, {size / 2**30:.2f} GiB: {error.strerror}. Make room",
            ) from error
        raise OSError(
            error.errno,
            f"cannot create {name}={path}: {error.strerror}. Pass another path",
        ) from error


class SampleSink:
    """Stores some rows of an output in a .npy file (B, H, samples, D)."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        samples: Sequence[int],
        dtype: torch.dtype,
        name: str = "path",
    ) -> None:
        """name: the argument's name, for errors."""
        batch, heads, tokens, width = self.shape = sizes("shape", shape)
        rows = sorted(set(arguments.integers("samples", samples, 0)))
        if rows[-1] >= tokens:
            raise ValueError(f"samples must be rows of the {tokens} of the output; got {rows[-1]}")
        self.samples, self.dtype = np.array(rows, dtype=np.int64), dtype
        self._file = FileSink(path, (batch, heads, len(rows), width), dtype, name)
        self.path = self._file.path

    def _kept(self, rows: range) -> tuple[range, list[int]]:
        """Indices of the samples among some rows, and their indices within these rows."""
        first, last = np.searchsorted(self.samples, [rows.start, rows[-1] + 1])
        return range(int(first), int(last)), [
            rows.index(int(sample)) for sample in self.samples[first:last]
        ]

    def write(self, rows: range, part: Tensor) -> bytes | memoryview:
        """Write the samples among the rows."""
        samples, at = self._kept(rows)
        if samples:
            return self._file.write(samples, part[:, :, at])
        return b""

    def held(self, rows: range) -> bytes:
        """Stored samples among the rows."""
        samples, _ = self._kept(rows)
        if samples:
            return self._file.held(samples)
        return b""

    def sync(self) -> None:
        """fsync."""
        self._file.sync()

    def read(self) -> Tensor:
        """All samples, (B, H, samples, D), in the order of `samples`."""
        return torch.from_numpy(np.load(self.path))
