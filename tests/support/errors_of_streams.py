"""Rows of bad arguments of a streamed run, by argument.

Inputs, outputs and options are among them.

The functions write odd files into the working directory and return their names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compiled_dilated.ring.sources import FileSink, FileSource, SampleSink
from tests.streaming import SHAPE


def closed_file() -> Any:
    file = open("q.npy", "rb")  # noqa: SIM115  closed at once
    file.close()
    return file


def directory() -> str:
    os.mkdir("directory")
    return "directory"


def pipe() -> str:
    os.mkfifo("pipe")
    return "pipe"


def archive() -> str:
    np.savez("several.npz", np.zeros(SHAPE))
    return "several.npz"


def content(*parts: bytes) -> Callable[[], str]:
    """A file of these bytes."""

    def write() -> str:
        Path("odd.npy").write_bytes(b"".join(parts))
        return "odd.npy"

    return write


def array(numbers: Any) -> Callable[[], str]:
    """A .npy file of an array."""

    def write() -> str:
        np.save("odd.npy", numbers, allow_pickle=True)
        return "odd.npy"

    return write


def header(text: str) -> Callable[[], str]:
    """A .npy file with this header, and no numbers."""
    raw = text.encode().ljust(117) + b"\n"
    return content(b"\x93NUMPY\1\0", len(raw).to_bytes(2, "little"), raw)


def fields(descr: str, shape: tuple[int, ...]) -> Callable[[], str]:
    """A .npy file with a header of this dtype and shape."""
    return header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}")


class WithoutRows:
    """A source that lacks `read_into`."""

    shape, dtype = SHAPE, torch.float64


class Rows:
    """A source that must not be read."""

    dtype: Any = torch.float64

    def __init__(self, shape: Any = SHAPE, dtype: Any = torch.float64) -> None:
        self.shape, self.dtype = shape, dtype

    def read_into(self, *arguments: object) -> None:
        raise AssertionError("no row is read before all arguments are checked")


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"q.npy"


def short_sink() -> FileSink:
    return FileSink("sink.npy", (1, 2, 3, 2), torch.float64)


def float32_samples() -> SampleSink:
    return SampleSink("sink.npy", SHAPE, [3], torch.float32)


# Made value, error, part of its message.
Row = tuple[Callable[[], Any], type[Exception], str]

NO_PATH = "{} must be a path, a str or pathlib.Path; got "
NO_SOURCE = "q must be the path of a .npy file, or a source with shape, dtype and read_into; got "
NO_SINK = "out must be the path of a .npy file, or a sink with write, held and sync; got "
NO_FILE = "{} is a {}; it must be a regular file"
NO_NPY = "q=odd.npy is no .npy file: "
NOT_WHOLE = "q=odd.npy is no whole .npy file"
NUMBERS = "q=odd.npy must hold (B, H, N, D) of float16, float32 or float64; got "
DTYPES = "q.dtype must be torch.float16, bfloat16, float32"
SIZES = "q.shape must be (batch, heads, tokens, head_dim)"
DEVICE = "device, pipe or socket"
WRONG_HEADER = "{'descr': [], 'fortran_order': 3, 'shape': -1}"
MISSING = FileNotFoundError
OTHER_SINK = "for (1, 2, 3, 2) of torch.float64; the output is (1, 2, 16, 2) of torch.float64"

INPUTS: dict[str, Row] = {
    # No path, no source.
    "None": (lambda: None, TypeError, NO_SOURCE + "NoneType"),
    "a number": (lambda: 3, TypeError, NO_SOURCE + "int"),
    "bytes": (lambda: b"q.npy", TypeError, NO_SOURCE + "bytes"),
    "a closed file": (closed_file, TypeError, "BufferedReader. Pass the path of an open file"),
    "a tensor": (lambda: torch.zeros(SHAPE), TypeError, "got Tensor. Pass the path of an open"),
    "an array": (lambda: np.zeros(SHAPE), TypeError, NO_SOURCE + "ndarray"),
    # Paths.
    "a path of bytes": (BytesPath, TypeError, NO_PATH.format("q") + "BytesPath"),
    "an empty str": (lambda: "", ValueError, "q must be a path; got an empty str"),
    "a NUL": (lambda: "q\0.npy", ValueError, r"got 'q\x00.npy', which no file can be called"),
    "a surrogate": (lambda: "\ud800", ValueError, r"got '\ud800', which no file can be called"),
    "a long name": (lambda: "q" * 5000, OSError, "cannot be used: File name too long"),
    "no file": (lambda: "no.npy", MISSING, "q must be a file; there is none at 'no.npy'. Write"),
    "below a file": (lambda: "k.npy/q.npy", MISSING, "there is none at 'k.npy/q.npy'"),
    "a directory": (directory, ValueError, NO_FILE.format("q='directory'", "directory")),
    "a device": (lambda: "/dev/null", ValueError, NO_FILE.format("q='/dev/null'", DEVICE)),
    "a pipe": (pipe, ValueError, NO_FILE.format("q='pipe'", DEVICE)),
    # Files of other kinds, and damaged ones.
    "an archive": (archive, ValueError, "q=several.npz is an .npz archive of several arrays; save"),
    "an empty file": (content(), ValueError, NO_NPY + "it is empty. Write it with numpy.save"),
    "text": (content(b"a thesis"), ValueError, NO_NPY + "it begins with b'a thes'"),
    "magic without a header": (content(b"\x93NUMPY"), ValueError, NOT_WHOLE),
    "another version": (content(b"\x93NUMPY\7\0", bytes(200)), ValueError, NOT_WHOLE),
    "an open header": (header("{'descr': '<f8', ("), ValueError, NOT_WHOLE),
    "a deep header": (header("(" * 110), ValueError, NOT_WHOLE),
    "a wrong header": (header(WRONG_HEADER), ValueError, NOT_WHOLE),
    "no such dtype": (fields("xx", SHAPE), ValueError, "q=odd.npy is no"),
    "negative sizes": (fields("<f8", (1, -2, 16, 2)), ValueError, "q=odd.npy "),
    "huge sizes": (fields("<f8", (1, 2**70, 1, 2)), ValueError, "q=odd.npy is no"),
    # Arrays of other kinds.
    "objects": (array(np.array([[[[None]]]])), ValueError, NOT_WHOLE),
    "one number": (array(3.0), ValueError, NUMBERS + "() of float64"),
    "three sizes": (array(np.zeros((2, 16, 2))), ValueError, NUMBERS + "(2, 16, 2) of float64"),
    "integers": (array(np.zeros(SHAPE, int)), ValueError, NUMBERS + "(1, 2, 16, 2) of int64"),
    "complex": (array(np.zeros(SHAPE, complex)), ValueError, "(1, 2, 16, 2) of complex128"),
    "the other byte order": (array(np.zeros(SHAPE, ">f8")), ValueError, "(1, 2, 16, 2) of >f8"),
    "Fortran order": (array(np.zeros(SHAPE, order="F")), ValueError, "is in Fortran order"),
    "no columns": (array(np.zeros((1, 2, 16, 0))), ValueError, "q and k must have one head_dim"),
    # Sources.
    "a source without rows": (WithoutRows, TypeError, NO_SOURCE + "WithoutRows"),
    "a source of three sizes": (lambda: Rows((2, 16, 2)), ValueError, SIZES),
    "a source of a list": (lambda: Rows(list(SHAPE)), TypeError, "q.shape must be a tuple (batch"),
    "a source of floats": (lambda: Rows((1, 2, 16.0, 2)), TypeError, "must be an integer; got"),
    "a negative size": (lambda: Rows((1, 2, -16, 2)), ValueError, "q.shape[2] must be at least 0"),
    "a numpy dtype": (lambda: Rows(SHAPE, np.float64), TypeError, DTYPES),
    "a source of integers": (lambda: Rows(SHAPE, torch.int64), TypeError, DTYPES),
    "other sizes": (lambda: Rows((1, 2, 17, 2)), ValueError, "got 17 queries and 16 keys"),
    "another dtype": (lambda: Rows(SHAPE, torch.float32), TypeError, "must have one dtype"),
}  # fmt: skip

OUTPUTS: dict[str, Row] = {
    "None": (lambda: None, TypeError, NO_SINK + "NoneType"),
    "a tensor": (lambda: torch.zeros(SHAPE), TypeError, "got Tensor without write, held, sync"),
    "a closed file": (closed_file, TypeError, "got BufferedReader without held, sync"),
    "a source": (lambda: FileSource("q.npy"), TypeError, "FileSource without write, held, sync"),
    "an empty str": (lambda: "", ValueError, "out must be a path; got an empty str"),
    "a NUL": (lambda: "\0", ValueError, "out must be a path"),
    "a long name": (lambda: "o" * 300, OSError, "cannot be used: File name too long"),
    "a directory": (directory, ValueError, NO_FILE.format("out='directory'", "directory")),
    "in no directory": (lambda: "no/out", MISSING, "does not exist. Create 'no' first"),
    "below a file": (lambda: "q.npy/out", MISSING, "in a directory that does not exist"),
    "a device": (lambda: "/dev/null", ValueError, NO_FILE.format("out='/dev/null'", DEVICE)),
    "an empty file": (content(), ValueError, "out=odd.npy is no .npy file: it is empty"),
    "other sizes": (array(np.zeros((1, 2, 3, 2))), ValueError, "holds (1, 2, 3, 2) of float64"),
    "another dtype": (array(np.zeros(SHAPE, np.float32)), ValueError, "(1, 2, 16, 2) of float32"),
    "a sink of other sizes": (short_sink, ValueError, OTHER_SINK),
    "samples of another dtype": (float32_samples, ValueError, "out is a SampleSink for (1, 2, 16"),
}  # fmt: skip

NO_SCALE = "scale must be a finite number; got "
NO_LIMIT = "limit_seconds must be a number"

OPTIONS: dict[str, dict[str, Row]] = {
    "scale": {
        "a str": (lambda: "inf", TypeError, NO_SCALE + "str 'inf'. Leave it out for 1 / sqrt"),
        "a bool": (lambda: True, TypeError, NO_SCALE + "bool True"),
        "a tensor": (lambda: torch.ones(()), TypeError, NO_SCALE + "Tensor"),
        "complex": (lambda: 1j, TypeError, NO_SCALE + "complex 1j"),
        "infinite": (lambda: float("inf"), ValueError, NO_SCALE + "inf"),
        "nan": (lambda: float("nan"), ValueError, NO_SCALE + "nan"),
        "beyond a float": (lambda: 10**400, ValueError, NO_SCALE + "1000"),
    },
    "limit_seconds": {
        "a str": (lambda: "3", TypeError, NO_LIMIT + "; got str '3'. Leave it out for no limit"),
        "a bool": (lambda: False, TypeError, NO_LIMIT + "; got bool False"),
        "nan": (lambda: float("nan"), ValueError, NO_LIMIT + " of at least 0; got nan"),
        "negative": (lambda: -1, ValueError, NO_LIMIT + " of at least 0; got -1"),
    },
    "on_progress": {
        "a str": (lambda: "print", TypeError, "a function of one Progress, or None; got str"),
    },
    "journal": {
        "a number": (lambda: 3, TypeError, NO_PATH.format("journal") + "int"),
        "a bool": (lambda: True, TypeError, NO_PATH.format("journal") + "bool"),
        "a closed file": (closed_file, TypeError, NO_PATH.format("journal") + "BufferedReader"),
        "a directory": (directory, ValueError, NO_FILE.format("journal='directory'", "directory")),
        "a device": (lambda: "/dev/null", ValueError, "journal='/dev/null' is a " + DEVICE),
        "a pipe": (pipe, ValueError, NO_FILE.format("journal='pipe'", DEVICE)),
        "in no directory": (lambda: "no/journal", MISSING, "Create 'no' first"),
    },
}  # fmt: skip

BY_ARGUMENT = {"q": INPUTS, "out": OUTPUTS, **OPTIONS}
