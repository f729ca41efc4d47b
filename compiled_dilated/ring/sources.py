"""Sources of q, k, v and sinks of out, larger than memory.

All are (B, H, N, D), read and written by runs of tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import arguments, checks
from ..heads import HeadRange
from . import files, npy
from .npy import NpyFile, Numbers


class Source(Protocol):
    """Rows that can be read repeatedly, in any order, from several threads.

    A journal compares sources by `repr`, which therefore must identify the content.
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
    batch, _, _, width = source.shape
    out = torch.empty((batch, heads.count, len(rows), width), dtype=source.dtype)
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


class FileSource:
    """A .npy file (B, H, N, D), read on demand.

    Of float16, float32 or float64.
    """

    def __init__(self, path: str | os.PathLike[str], name: str = "path") -> None:
        """Open the file.

        name: the argument's name, for errors.
        """
        self.path = files.input_file(name, path)
        self._npy = NpyFile(self.path, name)
        self.shape = self._npy.shape
        self.dtype = torch.from_numpy(np.empty(0, self._npy.dtype)).dtype

    def read_into(self, out: Tensor, heads: HeadRange, rows: range) -> None:
        """Read rows from the file."""
        self._npy.read_into(out.numpy(), heads.indices(), rows)

    def __repr__(self) -> str:
        # Size and time identify the content: a run does not continue with another file of the same
        # name.
        state = self.path.stat()
        stamp = f"of {state.st_size} bytes, modified {state.st_mtime_ns}"
        return f"FileSource({str(self.path)!r}) {stamp}"


@dataclass(frozen=True)
class GeneratedSource:
    """Random numbers of mean 0 and variance 1, generated on demand (Philox).

    shape: (B, H, N, D).
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
        """Generate rows of some heads."""
        for b in range(self.shape[0]):
            for i, head in enumerate(heads.indices()):
                self._read(b, head, rows, out[b, i])

    def _read(self, b: int, head: int, rows: range, out: Tensor) -> None:
        """Fill out, (len(rows), D), block by block."""
        filled = 0
        for number in range(rows.start // self.block, rows[-1] // self.block + 1):
            first = number * self.block
            part = range(rows[filled], min(rows.stop, first + self.block), rows.step)
            numbers = torch.from_numpy(self._block(b, head, number))
            within = slice(part.start - first, part.stop - first, part.step)
            out[filled : filled + len(part)] = numbers[within]
            filled += len(part)

    def _block(self, b: int, head: int, number: int) -> Numbers:
        """All rows of a block, (block, D)."""
        key = np.array([self.seed, self.stream], dtype=np.uint64)
        counter = np.array([0, number, head, b], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        numbers = generator.random((self.block, self.shape[3]), dtype=np.float32)
        # Uniform in [0, 1), of variance 1 / 12: shift and scale.
        numbers -= 0.5
        numbers *= math.sqrt(12)
        return numbers


def sizes(name: str, shape: object) -> tuple[int, int, int, int]:
    """Check that a shape is (batch, heads, tokens, head_dim)."""
    out = arguments.integers(name, shape, 0)
    if len(out) != 4:
        raise ValueError(
            f"{name} must be (batch, heads, tokens, head_dim); got {out}. "
            "Add the missing dimensions"
        )
    return out[0], out[1], out[2], out[3]


def check_dtype(name: str, dtype: object) -> None:
    """Raise unless the dtype is supported."""
    if not isinstance(dtype, torch.dtype) or dtype not in checks.DTYPES:
        raise TypeError(
            f"{name} must be torch.float16, bfloat16, float32 or float64; "
            f"got {arguments.kind_and_text(dtype)}"
        )


def _npy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    """The dtype of a .npy file that stores tensors of a dtype."""
    check_dtype("dtype", dtype)
    if dtype == torch.bfloat16:
        raise TypeError(
            f"a .npy file holds float16, float32 or float64; got {dtype}. Convert the sources"
        )
    return torch.empty(0, dtype=dtype).numpy().dtype


class FileSink:
    """A .npy file (B, H, N, D), allocated at full size."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        dtype: torch.dtype,
        name: str = "path",
    ) -> None:
        """Open or create the file.

        name: the argument's name, for errors.
        """
        self.path = files.output_file(name, path)
        self.shape, self.dtype = sizes("shape", shape), dtype
        stored = _npy_dtype(dtype)
        if not self.path.exists():
            npy.create(self.path, self.shape, stored, name)
        self._npy = NpyFile(self.path, name)
        if self._npy.shape != self.shape or self._npy.dtype != stored:
            raise ValueError(
                f"{name}={self.path} holds {self._npy.shape} of {self._npy.dtype}, "
                f"the output is {self.shape} of {stored}. Choose another file, or remove this one"
            )
        # A file without write permission fails here, not after the first rank.
        with files.opening(name, self.path):
            self.path.open("r+b").close()

    def write(self, rows: range, part: Tensor) -> memoryview:
        """Write rows to the file; on disk after `sync`."""
        for b in range(part.shape[0]):
            for head in range(part.shape[1]):
                self._npy.write(b, head, rows, part[b, head].numpy())
        return npy.as_bytes(part.numpy())

    def held(self, rows: range) -> bytes:
        """Rows read back from the file."""
        batch, heads, _, width = self._npy.shape
        out = np.empty((batch, heads, len(rows), width), self._npy.dtype)
        self._npy.read_into(out, range(heads), rows)
        return out.tobytes()

    def sync(self) -> None:
        """fsync, and drop the file's pages, which would fill the cache."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class SampleSink:
    """Samples of an output's rows: a .npy file (B, H, samples, D)."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        samples: Sequence[int],
        dtype: torch.dtype,
        name: str = "path",
    ) -> None:
        """Open or create the file.

        shape: shape of the complete output, (B, H, N, D).
        samples: rows to store.
        name: the argument's name, for errors.
        """
        batch, heads, tokens, width = self.shape = sizes("shape", shape)
        rows = sorted(set(arguments.integers("samples", samples, 0)))
        if rows[-1] >= tokens:
            raise ValueError(f"samples must be rows of the {tokens} of the output; got {rows[-1]}")
        self.samples, self.dtype = np.array(rows, dtype=np.int64), dtype
        self._file = FileSink(path, (batch, heads, len(rows), width), dtype, name)
        self.path = self._file.path

    def _samples_in(self, rows: range) -> tuple[range, list[int]]:
        """The samples among some rows.

        Returns their indices among all samples, and within the rows.
        """
        first, last = np.searchsorted(self.samples, [rows.start, rows[-1] + 1])
        indices = [rows.index(int(sample)) for sample in self.samples[first:last]]
        return range(int(first), int(last)), indices

    def write(self, rows: range, part: Tensor) -> bytes | memoryview:
        """Write the samples among the rows."""
        samples, indices = self._samples_in(rows)
        if samples:
            return self._file.write(samples, part[:, :, indices])
        return b""

    def held(self, rows: range) -> bytes:
        """Stored samples among the rows."""
        samples, _ = self._samples_in(rows)
        if samples:
            return self._file.held(samples)
        return b""

    def sync(self) -> None:
        """fsync."""
        self._file.sync()

    def read(self) -> Tensor:
        """All samples, (B, H, samples, D), in the order of `samples`."""
        return torch.from_numpy(np.load(self.path))
