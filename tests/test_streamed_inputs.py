"""Bad arguments of a streamed run: one error that names the argument, before any file is written."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.ring import sources
from compiled_dilated.ring.sources import FileSink, FileSource, GeneratedSource, SampleSink
from tests.streaming import SHAPE, enter, error_of, reference, snapshot, stream, write_inputs

# Subclasses of ValueError that speak for the library below.
NOT_OURS = (UnicodeError, json.JSONDecodeError)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


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


def npz() -> str:
    np.savez("several.npz", np.zeros(SHAPE))
    return "several.npz"


def content(*parts: bytes) -> Callable[[], str]:
    def write() -> str:
        Path("odd.npy").write_bytes(b"".join(parts))
        return "odd.npy"

    return write


def saved(array: Any) -> Callable[[], str]:
    def write() -> str:
        np.save("odd.npy", array, allow_pickle=True)
        return "odd.npy"

    return write


def header(text: str) -> Callable[[], str]:
    raw = text.encode().ljust(117) + b"\n"
    return content(b"\x93NUMPY\1\0", len(raw).to_bytes(2, "little"), raw)


class WithoutRows:
    shape, dtype = SHAPE, torch.float64


class Rows:
    dtype: Any = torch.float64

    def __init__(self, shape: Any = SHAPE, dtype: Any = torch.float64) -> None:
        self.shape, self.dtype = shape, dtype

    def read_into(self, *arguments: object) -> None:
        raise AssertionError("nothing is read before all arguments are checked")


class Writer:
    def write(self, rows: range, part: torch.Tensor) -> bytes:
        raise AssertionError("nothing is written before all arguments are checked")

    held = sync = write


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"q.npy"


Row = tuple[Callable[[], Any], type[Exception], str]

INPUTS: dict[str, Row] = {
    "None": (
        lambda: None,
        TypeError,
        "q must be the path of a .npy file, or a source with shape, dtype and read_into; got NoneType",
    ),
    "a number": (lambda: 3, TypeError, "got int"),
    "bytes": (lambda: b"q.npy", TypeError, "got bytes"),
    "a closed file": (closed_file, TypeError, "got BufferedReader. Pass the path of an open file"),
    "a tensor": (
        lambda: torch.zeros(SHAPE),
        TypeError,
        "got Tensor. Pass the path of an open file; save a tensor with",
    ),
    "an array": (lambda: np.zeros(SHAPE), TypeError, "got ndarray"),
    "a path of bytes": (
        BytesPath,
        TypeError,
        "q must be a path, a str or pathlib.Path; got BytesPath",
    ),
    "an empty str": (lambda: "", ValueError, "q must be a path; got an empty str"),
    "a NUL": (
        lambda: "q\0.npy",
        ValueError,
        r"q must be a path; got 'q\x00.npy', which no file can be called",
    ),
    "a lone surrogate": (
        lambda: "\ud800",
        ValueError,
        r"q must be a path; got '\ud800', which no file can be called",
    ),
    "a long name": (lambda: "q" * 5000, OSError, "cannot be used: File name too long"),
    "no file": (
        lambda: "no.npy",
        FileNotFoundError,
        "q must be a file; there is none at 'no.npy'. Write it with numpy.save",
    ),
    "below a file": (
        lambda: "k.npy/q.npy",
        FileNotFoundError,
        "q must be a file; there is none at 'k.npy/q.npy'",
    ),
    "a directory": (
        directory,
        ValueError,
        "q='directory' is a directory; it must be a regular file",
    ),
    "a device": (
        lambda: "/dev/null",
        ValueError,
        "q='/dev/null' is a device, pipe or socket; it must be a regular file",
    ),
    "a pipe": (pipe, ValueError, "q='pipe' is a device, pipe or socket"),
    "an archive": (
        npz,
        ValueError,
        "q=several.npz is an .npz archive of several arrays; save one array with numpy.save",
    ),
    "an empty file": (
        content(),
        ValueError,
        "q=odd.npy is no .npy file: it is empty. Write it with numpy.save",
    ),
    "text": (
        content(b"a thesis"),
        ValueError,
        "q=odd.npy is no .npy file: it begins with b'a thes'",
    ),
    "magic alone": (content(b"\x93NUMPY"), ValueError, "q=odd.npy is no whole .npy file"),
    "another version": (
        content(b"\x93NUMPY\7\0", bytes(200)),
        ValueError,
        "q=odd.npy is no whole .npy file",
    ),
    "an open header": (header("{'descr': '<f8', ("), ValueError, "q=odd.npy is no whole .npy file"),
    "a deep header": (header("(" * 110), ValueError, "q=odd.npy is no whole .npy file"),
    "a header of another kind": (
        header("{'descr': [], 'fortran_order': 3, 'shape': -1}"),
        ValueError,
        "q=odd.npy is no whole",
    ),
    "no such dtype": (
        header("{'descr': 'xx', 'fortran_order': False, 'shape': (1, 2, 16, 2)}"),
        ValueError,
        "q=odd.npy is no",
    ),
    "negative sizes": (
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (1, -2, 16, 2)}"),
        ValueError,
        "q=odd.npy ",
    ),
    "huge sizes": (
        header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': (1, {2**70}, 1, 2)}}"),
        ValueError,
        "q=odd.npy is no",
    ),
    "objects": (saved(np.array([[[[None]]]])), ValueError, "q=odd.npy is no whole .npy file"),
    "a number alone": (
        saved(3.0),
        ValueError,
        "q=odd.npy must hold (B, H, N, D) of float16, float32 or float64; got () of float64",
    ),
    "three sizes": (saved(np.zeros((2, 16, 2))), ValueError, "q=odd.npy must hold (B, H, N, D)"),
    "integers": (saved(np.zeros(SHAPE, int)), ValueError, "got (1, 2, 16, 2) of int64"),
    "complex": (saved(np.zeros(SHAPE, complex)), ValueError, "got (1, 2, 16, 2) of complex128"),
    "the other byte order": (saved(np.zeros(SHAPE, ">f8")), ValueError, "got (1, 2, 16, 2) of >f8"),
    "Fortran order": (
        saved(np.asfortranarray(np.zeros(SHAPE))),
        ValueError,
        "q=odd.npy is in Fortran order",
    ),
    "no columns": (
        saved(np.zeros((1, 2, 16, 0))),
        ValueError,
        "q and k must have one head_dim; got",
    ),
    "a source without rows": (
        WithoutRows,
        TypeError,
        "a source with shape, dtype and read_into; got WithoutRows",
    ),
    "a source of three sizes": (
        lambda: Rows((2, 16, 2)),
        ValueError,
        "q.shape must be (batch, heads, tokens, head_dim)",
    ),
    "a source of a list": (
        lambda: Rows(list(SHAPE)),
        TypeError,
        "q.shape must be a tuple (batch, heads, tokens, head_dim); got list",
    ),
    "a source of floats": (
        lambda: Rows((1, 2, 16.0, 2)),
        TypeError,
        "q.shape[2] must be an integer; got float 16.0",
    ),
    "a source of negative sizes": (
        lambda: Rows((1, 2, -16, 2)),
        ValueError,
        "q.shape[2] must be at least 0; got -16",
    ),
    "a source of a numpy dtype": (
        lambda: Rows(SHAPE, np.float64),
        TypeError,
        "q.dtype must be torch.float16, bfloat16, float32",
    ),
    "a source of integers": (
        lambda: Rows(SHAPE, torch.int64),
        TypeError,
        "q.dtype must be torch.float16, bfloat16, float32",
    ),
    "a source of other sizes": (
        lambda: Rows((1, 2, 17, 2)),
        ValueError,
        "a streamed run is over one sequence; got 17 queries and 16 keys",
    ),
    "a source of another dtype": (
        lambda: Rows(SHAPE, torch.float32),
        TypeError,
        "q, k and v must have one dtype",
    ),
}

OUTPUTS: dict[str, Row] = {
    "None": (
        lambda: None,
        TypeError,
        "out must be the path of a .npy file, or a sink with write, held and sync; got NoneType",
    ),
    "a tensor": (
        lambda: torch.zeros(SHAPE),
        TypeError,
        "got Tensor without write, held, sync. Pass the path of the file",
    ),
    "a closed file": (closed_file, TypeError, "got BufferedReader without held, sync"),
    "a source": (
        lambda: FileSource("q.npy"),
        TypeError,
        "got FileSource without write, held, sync",
    ),
    "an empty str": (lambda: "", ValueError, "out must be a path; got an empty str"),
    "a NUL": (lambda: "\0", ValueError, "out must be a path"),
    "a long name": (lambda: "o" * 300, OSError, "cannot be used: File name too long"),
    "a directory": (
        directory,
        ValueError,
        "out='directory' is a directory; it must be a regular file",
    ),
    "in no directory": (
        lambda: "no/out",
        FileNotFoundError,
        "out='no/out' is in a directory that does not exist. Create 'no' first",
    ),
    "below a file": (
        lambda: "q.npy/out",
        FileNotFoundError,
        "out='q.npy/out' is in a directory that does not exist",
    ),
    "a device": (lambda: "/dev/null", ValueError, "out='/dev/null' is a device, pipe or socket"),
    "an empty file": (content(), ValueError, "out=odd.npy is no .npy file: it is empty"),
    "other sizes": (
        saved(np.zeros((1, 2, 3, 2))),
        ValueError,
        "out=odd.npy holds (1, 2, 3, 2) of float64, the output is",
    ),
    "another dtype": (
        saved(np.zeros(SHAPE, np.float32)),
        ValueError,
        "out=odd.npy holds (1, 2, 16, 2) of float32, the",
    ),
    "a sink of other sizes": (
        lambda: FileSink("sink.npy", (1, 2, 3, 2), torch.float64),
        ValueError,
        "out is a FileSink for (1, 2, 3, 2) of torch.float64; the output is (1, 2, 16, 2) of torch.float64",
    ),
    "samples of another dtype": (
        lambda: SampleSink("sink.npy", SHAPE, [3], torch.float32),
        ValueError,
        "out is a SampleSink for",
    ),
}

OTHERS: dict[str, dict[str, Row]] = {
    "scale": {
        "a str": (
            lambda: "inf",
            TypeError,
            "scale must be a finite number; got str 'inf'. Leave it out for 1 / sqrt(head_dim)",
        ),
        "a bool": (lambda: True, TypeError, "scale must be a finite number; got bool True"),
        "a tensor": (
            lambda: torch.ones(()),
            TypeError,
            "scale must be a finite number; got Tensor",
        ),
        "complex": (lambda: 1j, TypeError, "scale must be a finite number; got complex 1j"),
        "infinite": (lambda: float("inf"), ValueError, "scale must be a finite number; got inf"),
        "nan": (lambda: float("nan"), ValueError, "scale must be a finite number; got nan"),
        "beyond a float": (lambda: 10**400, ValueError, "scale must be a finite number; got 1000"),
    },
    "limit_seconds": {
        "a str": (
            lambda: "3",
            TypeError,
            "limit_seconds must be a number; got str '3'. Leave it out for no limit",
        ),
        "a bool": (lambda: False, TypeError, "limit_seconds must be a number; got bool False"),
        "nan": (
            lambda: float("nan"),
            ValueError,
            "limit_seconds must be a number of at least 0; got nan",
        ),
        "negative": (
            lambda: -1,
            ValueError,
            "limit_seconds must be a number of at least 0; got -1",
        ),
    },
    "on_progress": {
        "a str": (
            lambda: "print",
            TypeError,
            "on_progress must be a function of one Progress, or None; got str",
        ),
    },
    "journal": {
        "a number": (
            lambda: 3,
            TypeError,
            "journal must be a path, a str or pathlib.Path; got int",
        ),
        "a bool": (
            lambda: True,
            TypeError,
            "journal must be a path, a str or pathlib.Path; got bool",
        ),
        "a closed file": (
            closed_file,
            TypeError,
            "journal must be a path, a str or pathlib.Path; got BufferedReader",
        ),
        "a directory": (
            directory,
            ValueError,
            "journal='directory' is a directory; it must be a regular file",
        ),
        "a device": (
            lambda: "/dev/null",
            ValueError,
            "journal='/dev/null' is a device, pipe or socket",
        ),
        "a pipe": (pipe, ValueError, "journal='pipe' is a device, pipe or socket"),
        "in no directory": (lambda: "no/journal", FileNotFoundError, "Create 'no' first"),
    },
}

BAD = [
    pytest.param(argument, *row, id=f"{argument}: {name}")
    for argument, rows in {"q": INPUTS, "out": OUTPUTS, **OTHERS}.items()
    for name, row in rows.items()
]


@pytest.mark.parametrize(("argument", "make", "kind", "message"), BAD)
def test_a_wrong_argument_is_named_before_a_file_is_written(
    home: Path, argument: str, make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    options = {"journal": "journal", argument: make()}
    before = snapshot(home)
    with pytest.raises(kind) as refused:
        stream(**options)
    assert message in str(refused.value)
    assert argument in str(refused.value)
    assert not isinstance(refused.value, NOT_OURS)
    assert snapshot(home) == before


def test_numbers_of_numpy_are_numbers(home: Path) -> None:
    assert stream(scale=np.float32(0.5), limit_seconds=np.int64(60)).complete
    torch.testing.assert_close(torch.from_numpy(np.load("out.npy")), reference(scale=0.5))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("xyz", "device must be the name of a torch device; got 'xyz'. Write 'cpu' or 'cuda'"),
        (["cpu"], "device must be the name of a torch device; got"),
        ("meta", "device 'meta' cannot compute here"),
    ],
)
def test_a_device_that_cannot_compute_is_refused_before_a_file_is_written(
    home: Path, device: Any, message: str
) -> None:
    before = snapshot(home)
    with pytest.raises(ValueError, match=message):
        cd.compile(masks.causal(), ranks=2, transport="streamed", device=device)(
            "q.npy", "k.npy", "v.npy", "out.npy"
        )
    assert snapshot(home) == before


def test_a_sink_that_keeps_no_bytes_is_named(home: Path) -> None:
    class Forgetful(Writer):
        def write(self, rows: range, part: torch.Tensor) -> Any:
            return None

        def sync(self) -> None:
            pass

    with pytest.raises(
        TypeError, match=r"the methods write and held of a sink must return bytes.*; got NoneType"
    ):
        stream(Forgetful())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: GeneratedSource((1, 2, 3), 0, 0),
            ValueError,
            "shape must be (batch, heads, tokens, head_dim); got (1, 2, 3)",
        ),
        (lambda: GeneratedSource(SHAPE, -1, 0), ValueError, "seed must be at least 0; got -1"),
        (lambda: GeneratedSource(SHAPE, 2**64, 0), ValueError, "seed must be at most 2**60"),
        (
            lambda: GeneratedSource(SHAPE, 0, 1.5),
            TypeError,
            "stream must be an integer; got float 1.5",
        ),
        (
            lambda: GeneratedSource(SHAPE, 0, 0, torch.int8),
            TypeError,
            "dtype must be torch.float16",
        ),
        (
            lambda: GeneratedSource(SHAPE, 0, 0, block=0),
            ValueError,
            "block must be at least 1; got 0",
        ),
        (lambda: SampleSink("rows.npy", SHAPE, [], torch.float32), ValueError, "samples is empty"),
        (
            lambda: SampleSink("rows.npy", SHAPE, [3, -1], torch.float32),
            ValueError,
            "samples[1] must be at least 0; got -1",
        ),
        (
            lambda: SampleSink("rows.npy", SHAPE, [16], torch.float32),
            ValueError,
            "samples must be rows of the 16 of the output",
        ),
        (
            lambda: FileSink("sink.npy", (1, 2), torch.float32),
            ValueError,
            "shape must be (batch, heads, tokens, head_dim)",
        ),
        (
            lambda: FileSink("sink.npy", SHAPE, "float32"),
            TypeError,
            "dtype must be torch.float16, bfloat16, float32 or float64",
        ),
        (
            lambda: FileSink("sink.npy", SHAPE, torch.bfloat16),
            TypeError,
            "a .npy file holds float16, float32 or float64",
        ),
        (
            lambda: FileSink("sink.npy", (1, 2, 2**58, 8), torch.float64),
            OSError,
            "no room for sink.npy",
        ),
        (
            lambda: FileSource(None),
            TypeError,
            "path must be a path, a str or pathlib.Path; got NoneType",
        ),
    ],
)
def test_wrong_arguments_of_sources_and_sinks(
    home: Path, make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    before = snapshot(home)
    with pytest.raises(kind) as refused:
        make()
    assert message in str(refused.value)
    assert snapshot(home) == before


def test_generated_sources_of_other_blocks_are_other_sources() -> None:
    one, other = GeneratedSource(SHAPE, 0, 0, block=4), GeneratedSource(SHAPE, 0, 0, block=8)
    assert repr(one) != repr(other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rank", "checksum", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(max_size=5),
    st.text(st.characters(exclude_characters="/."), max_size=5),
    st.lists(st.integers(), max_size=3),
    st.complex_numbers(),
    st.builds(object),
    st.builds(io.BytesIO),
    st.sampled_from(
        [
            torch.zeros(()),
            torch.zeros(SHAPE),
            np.zeros(SHAPE),
            np.float64(1),
            torch.float64,
            FileSource,
            Rows,
            Path,
        ]
    ),
    st.builds(Rows, st.lists(st.integers(0, 3), max_size=5).map(tuple) | JSON, JSON),
)
ARGUMENTS = ("q", "k", "v", "out", "scale", "journal", "limit_seconds", "on_progress")


@given(name=st.sampled_from(ARGUMENTS), value=ODD)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_argument_is_refused_by_name_or_used(home: Path, name: str, value: Any) -> None:
    for path in home.iterdir():
        path.unlink()
    write_inputs(home)
    before = snapshot(home)
    error = error_of(lambda: stream(**{name: value}))
    if error is None:
        assert before.items() <= snapshot(home).items()
    else:
        assert not isinstance(error, NOT_OURS)
        assert name in str(error)
        assert snapshot(home) == before


@given(raw=st.binary(max_size=150))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_after_the_magic_of_a_file_are_refused(home: Path, raw: bytes) -> None:
    Path("odd.npy").write_bytes(b"\x93NUMPY\1\0\x76\0" + raw)
    with pytest.raises(ValueError, match=r"q=odd\.npy"):
        stream(q="odd.npy")


@given(at=st.integers(6, 127), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_changed_byte_of_a_header_is_refused_or_read(home: Path, at: int, byte: int) -> None:
    raw = bytearray(Path("q.npy").read_bytes())
    raw[at] = byte
    Path("odd.npy").write_bytes(raw)
    error = error_of(
        lambda: sources.read(FileSource("odd.npy", "q"), sources.HeadRange(0, 1, 1), range(1))
    )
    assert not isinstance(error, NOT_OURS)
    assert error is None or "q=odd.npy" in str(error)
