"""Bad arguments of a streamed run.

One error names the argument, before a file is written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.heads import HeadRange
from compiled_dilated.ring import sources
from compiled_dilated.ring.sources import FileSink, FileSource, GeneratedSource, SampleSink
from tests.streaming import SHAPE, enter, error_of, reference, snapshot, stream, write_inputs
from tests.support.errors_of_streams import BY_ARGUMENT, Row, Rows

# Subclasses of ValueError that other libraries raise.
FOREIGN_ERRORS = (UnicodeError, json.JSONDecodeError)
SIZES = "(batch, heads, tokens, head_dim)"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


class Writer:
    """A sink that must not be written."""

    def write(self, rows: range, part: torch.Tensor) -> bytes:
        raise AssertionError("no row is written before all arguments are checked")

    held = write

    def sync(self) -> None:
        raise AssertionError("no row is written before all arguments are checked")


def rows() -> Iterator[Any]:
    """(argument, function that makes a value, error, part of its message)."""
    for argument, table in BY_ARGUMENT.items():
        for name, row in table.items():
            yield pytest.param(argument, *row, id=f"{argument}: {name}")


@pytest.mark.parametrize(("argument", "make", "kind", "message"), list(rows()))
def test_a_wrong_argument_is_named_before_a_file_is_written(
    home: Path, argument: str, make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    options = {"journal": "journal", argument: make()}
    before = snapshot(home)
    with pytest.raises(kind) as raised:
        stream(**options)
    assert message in str(raised.value)
    assert argument in str(raised.value)
    assert not isinstance(raised.value, FOREIGN_ERRORS)
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
    paths = ("q.npy", "k.npy", "v.npy", "out.npy")
    with pytest.raises(ValueError, match=message):
        cd.compile(masks.causal(), ranks=2, transport="streamed", device=device)(*paths)
    assert snapshot(home) == before


def test_a_sink_that_returns_no_bytes_is_named(home: Path) -> None:
    class WithoutBytes(Writer):
        def write(self, rows: range, part: torch.Tensor) -> Any:
            return None

        def sync(self) -> None:
            pass

    message = r"the methods write and held of a sink must return bytes.*; got NoneType"
    with pytest.raises(TypeError, match=message):
        stream(WithoutBytes())


float32 = torch.float32
WRONG_SINKS_AND_SOURCES: list[Row] = [
    (
        lambda: GeneratedSource((1, 2, 3), 0, 0),  # type: ignore[arg-type]
        ValueError,
        f"shape must be {SIZES}; got (1, 2, 3)",
    ),
    (lambda: GeneratedSource(SHAPE, -1, 0), ValueError, "seed must be at least 0; got -1"),
    (lambda: GeneratedSource(SHAPE, 2**64, 0), ValueError, "seed must be at most 2**60"),
    (
        lambda: GeneratedSource(SHAPE, 0, 1.5),  # type: ignore[arg-type]
        TypeError,
        "stream must be an integer; got float 1.5",
    ),
    (lambda: GeneratedSource(SHAPE, 0, 0, torch.int8), TypeError, "dtype must be torch.float16"),
    (lambda: GeneratedSource(SHAPE, 0, 0, block=0), ValueError, "block must be at least 1; got 0"),
    (lambda: SampleSink("s.npy", SHAPE, [], float32), ValueError, "samples is empty"),
    (lambda: SampleSink("s.npy", SHAPE, [3, -1], float32), ValueError, "samples[1] must be at"),
    (lambda: SampleSink("s.npy", SHAPE, [16], float32), ValueError, "samples must be rows of"),
    (lambda: FileSink("s.npy", (1, 2), float32), ValueError, f"shape must be {SIZES}"),
    (
        lambda: FileSink("s.npy", SHAPE, "float32"),  # type: ignore[arg-type]
        TypeError,
        "dtype must be torch.float16",
    ),
    (lambda: FileSink("s.npy", SHAPE, torch.bfloat16), TypeError, "a .npy file holds"),
    (lambda: FileSink("s.npy", (1, 2, 2**58, 8), float32), OSError, "no room for s.npy"),
    (
        lambda: FileSource(None),  # type: ignore[arg-type]
        TypeError,
        "path must be a path, a str or pathlib.Path",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "message"), WRONG_SINKS_AND_SOURCES)
def test_wrong_arguments_of_sources_and_sinks(
    home: Path, make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    before = snapshot(home)
    with pytest.raises(kind) as raised:
        make()
    assert message in str(raised.value)
    assert snapshot(home) == before


def test_the_block_of_a_generated_source_is_in_its_repr() -> None:
    """A journal compares sources by their repr.

    Another block gives other numbers.
    """
    assert "block=8" in repr(GeneratedSource(SHAPE, 0, 0, block=8))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rank", "checksum", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
ARRAYS = [torch.zeros(()), torch.zeros(SHAPE), np.zeros(SHAPE), np.float64(1)]
TYPES = [torch.float64, FileSource, Rows, Path]
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
    st.sampled_from([*ARRAYS, *TYPES]),
    st.builds(Rows, st.lists(st.integers(0, 3), max_size=5).map(tuple) | JSON, JSON),
)
ARGUMENTS = ("q", "k", "v", "out", "scale", "journal", "limit_seconds", "on_progress")


@given(name=st.sampled_from(ARGUMENTS), value=ODD)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_any_argument_is_refused_by_name_or_used(home: Path, name: str, value: Any) -> None:
    for path in home.iterdir():
        path.unlink()
    write_inputs(home)
    before = snapshot(home)
    error = error_of(lambda: stream(**{name: value}))
    if error is None:
        assert before.items() <= snapshot(home).items()
    else:
        assert not isinstance(error, FOREIGN_ERRORS)
        assert name in str(error)
        assert snapshot(home) == before


@given(raw=st.binary(max_size=150))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_after_the_magic_of_a_file_are_refused(home: Path, raw: bytes) -> None:
    Path("odd.npy").write_bytes(b"\x93NUMPY\1\0\x76\0" + raw)
    with pytest.raises(ValueError, match=r"q=odd\.npy"):
        stream(q="odd.npy")


@given(at=st.integers(6, 127), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_any_changed_byte_of_a_header_is_refused_or_read(home: Path, at: int, byte: int) -> None:
    raw = bytearray(Path("q.npy").read_bytes())
    raw[at] = byte
    Path("odd.npy").write_bytes(raw)
    first_head = HeadRange(0, 1, 1)
    error = error_of(lambda: sources.read(FileSource("odd.npy", "q"), first_head, range(1)))
    assert not isinstance(error, FOREIGN_ERRORS)
    assert error is None or "q=odd.npy" in str(error)
