"""Lines of a journal.

The ranks of torn lines are computed again; lines that no run writes are refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.ring import pipeline
from compiled_dilated.ring.journals import Journal, JournalError
from tests.streaming import RANKS, enter, error_of, reference, snapshot, stream


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def lines_of_a_complete_run(home: Path) -> list[bytes]:
    """The lines of the journal of a complete run."""
    stream(journal="journal")
    return Path("journal").read_bytes().splitlines(keepends=True)


def line_of(entry: Any) -> bytes:
    """The line of a journal with this value."""
    return json.dumps(entry).encode() + b"\n"


@pytest.mark.parametrize("size", [0, 1, 10, -1])
def test_a_first_line_that_was_cut_off_is_written_anew(home: Path, size: int) -> None:
    header, *_ = lines_of_a_complete_run(home)
    Path("journal").write_bytes(header[:size])
    report = stream(journal="journal")
    assert (report.complete, report.resumed_ranks) == (True, 0)
    assert Path("journal").read_bytes().startswith(header)
    assert stream(journal="journal").resumed_ranks == RANKS


TORN = {
    "no JSON": b"{'rank': 0}\n",
    "an empty line": b"\n",
    "zeros": bytes(100) + b"\n",
    "no UTF-8": b'{"rank": 2, "checksum": "\xff\xff\xff"}\n',
    "UTF-16": '{"rank": 2}\n'.encode("utf-16"),
    "deeply nested": b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "an integer of many digits": b'{"rank": ' + b"1" * 10_000 + b"}\n",
    "no end of line": b'{"checksum": "00000000", "rank": 2}',
}


@pytest.mark.parametrize("kind", TORN)
def test_ranks_from_a_torn_line_on_are_computed_again(home: Path, kind: str) -> None:
    header, first, second, *_ = lines_of_a_complete_run(home)
    out = Path("out.npy").read_bytes()
    Path("journal").write_bytes(header + first + TORN[kind] + second)
    report = stream(journal="journal")
    assert (report.complete, report.resumed_ranks, report.torn) == (True, 1, ())
    assert Path("out.npy").read_bytes() == out
    assert stream(journal="journal").resumed_ranks == RANKS


NO_RANKS = (-1, RANKS, 10**30, True, 1.0, "1", None, [1])
NO_CHECKSUMS = (None, "0", "0000000g")
FOREIGN: list[Any] = [
    *({}, None, [], 7, "rank", {"rank": 1}, {"rank": 1, "checksum": "00000000", "more": 1}),
    *({"rank": rank, "checksum": "00000000"} for rank in NO_RANKS),
    *({"rank": 1, "checksum": checksum} for checksum in NO_CHECKSUMS),
]


@pytest.mark.parametrize("entry", FOREIGN, ids=json.dumps)
def test_a_line_of_a_journal_that_no_run_writes_is_refused(home: Path, entry: Any) -> None:
    lines = lines_of_a_complete_run(home)
    Path("journal").write_bytes(b"".join([*lines[:3], line_of(entry), *lines[3:]]))
    before = snapshot(home)
    message = r"line 4 of the journal journal is .* no run.* or remove journal to start again"
    with pytest.raises(ValueError, match=message):
        stream(journal="journal")
    assert snapshot(home) == before


def test_of_two_lines_on_a_rank_the_last_counts(home: Path) -> None:
    header, *lines = lines_of_a_complete_run(home)
    older = line_of({"rank": 2, "checksum": "00000000"})
    Path("journal").write_bytes(b"".join([header, older, *lines]))
    report = stream(journal="journal")
    assert (report.resumed_ranks, report.torn) == (RANKS, ())


def test_a_rank_without_tokens_is_no_rank_of_a_journal(home: Path) -> None:
    run = cd.compile(masks.causal(), ranks=20, transport="streamed")
    assert run("q.npy", "k.npy", "v.npy", "out.npy", journal="journal").complete
    with Path("journal").open("ab") as file:
        file.write(line_of({"checksum": "00000000", "rank": 17}))
    with pytest.raises(ValueError, match="line 18 of the journal journal"):
        run("q.npy", "k.npy", "v.npy", "out.npy", journal="journal")


@pytest.mark.parametrize(
    "content",
    [
        b"{}\n",
        b"null\n",
        b"[1]\n",
        b'{"name": "model"}\n',
        b"a thesis",
        b"a thesis\n",
        b"\0" * 64,
        b"[" * 10**6 + b"\n",
    ],
)
def test_a_file_that_is_no_journal_is_not_changed(home: Path, content: bytes) -> None:
    Path("journal").write_bytes(content)
    before = snapshot(home)
    message = r"is no journal of a streamed run: it begins with .* Name another journal$"
    with pytest.raises(ValueError, match=message):
        stream(journal="journal")
    assert snapshot(home) == before


def test_a_header_with_more_properties_is_of_another_run(home: Path) -> None:
    header, *lines = lines_of_a_complete_run(home)
    more = json.loads(header) | {"window": [[[[1]]]] * 100}
    Path("journal").write_bytes(b"".join([line_of(more), *lines]))
    message = r"another run: window is \[\[.* there and None here\. Name another journal, or remove"
    with pytest.raises(ValueError, match=message):
        stream(journal="journal")


def test_a_journal_of_another_run_stops_it_before_the_output_is_created(home: Path) -> None:
    lines_of_a_complete_run(home)
    os.unlink("out.npy")
    before = snapshot(home)
    message = r"scale is .* Name another journal, or remove journal to start again"
    with pytest.raises(ValueError, match=message):
        stream(journal="journal", scale=2)
    assert snapshot(home) == before


def test_a_journal_that_was_removed_meanwhile_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(progress: pipeline.Progress) -> None:
        Path("journal").unlink(missing_ok=True)

    monkeypatch.setattr(pipeline, "_SYNC_SECONDS", -1.0)
    message = r"the journal .*journal was removed meanwhile.*call again with the same journal"
    with pytest.raises(OSError, match=message):
        stream(journal="journal", on_progress=remove)
    assert not Path("journal").exists()


def test_a_line_of_a_journal_that_did_not_fit_is_removed(home: Path, fresh_python: Any) -> None:
    code = """
import resource, signal
from pathlib import Path
from compiled_dilated.ring.journals import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path("journal"), {"a": 1}, range(9))
journal.begin()
size = Path("journal").stat().st_size
for rank in range(9):
    journal.add(rank, "00000000")
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
try:
    journal.sync()
except OSError as error:
    print(error.strerror)
assert Path("journal").stat().st_size == size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.sync()
print(len(Journal(Path("journal"), {"a": 1}, range(9)).done))
"""
    run = fresh_python("-c", f"import os; os.chdir({str(home)!r}){code}")
    assert run.stdout.splitlines() == ["File too large", "9"], run.stderr


def test_a_journal_without_a_path_stores_nothing(home: Path) -> None:
    before = snapshot(home)
    journal = Journal(None, {"a": 1}, range(4))
    journal.begin()
    journal.add(3, "x")
    journal.sync()
    assert journal.done == {3: "x"}
    assert snapshot(home) == before


def test_an_integer_beyond_the_ranks_is_no_rank(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, {"a": 1}, range(3))
    journal.begin()
    journal.add(3, "00000000")
    journal.sync()
    with pytest.raises(ValueError, match="line 2 of the journal"):
        Journal(path, {"a": 1}, range(3))


def test_a_full_disk_names_the_journal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(journal: Journal, lines: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "_append", fail)
    message = r"journal='journal' cannot be used: No space left on device\. Make room"
    with pytest.raises(OSError, match=message):
        stream(journal="journal")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rank", "checksum", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
RANK = st.integers(0, RANKS - 1)
CHECKSUM = st.text("0123456789abcdef", min_size=8, max_size=8)
ENTRY = st.fixed_dictionaries({"rank": RANK, "checksum": CHECKSUM})
NEAR = st.fixed_dictionaries({"rank": RANK | st.integers() | JSON, "checksum": CHECKSUM | JSON})
LINE = st.one_of(
    st.binary(max_size=20).map(lambda raw: raw + b"\n"),
    (JSON | NEAR).map(line_of),
    ENTRY.map(line_of),
    RANK,  # the line that the run itself wrote
)


@given(lines=st.lists(LINE, max_size=8), tail=st.binary(max_size=20), has_header=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lines_of_a_journal_are_refused_or_give_the_right_output(
    home: Path, lines: list[bytes | int], tail: bytes, has_header: bool
) -> None:
    if not Path("complete").exists():
        lines_of_a_complete_run(home)
        Path("journal").rename("complete")
    header, *own = Path("complete").read_bytes().splitlines(keepends=True)
    content = [header] if has_header else []
    # A rank takes the line of that rank in the complete run.
    for line in lines:
        content.append(line if isinstance(line, bytes) else own[line])
    Path("journal").write_bytes(b"".join(content) + tail)
    before = snapshot(home)
    error = error_of(lambda: stream(journal="journal"))
    if error is None:
        assert stream(journal="journal").resumed_ranks == RANKS
    else:
        assert isinstance(error, JournalError)
        assert "Name another journal" in str(error)
        assert snapshot(home) == before
    np.testing.assert_allclose(np.load("out.npy"), reference().numpy(), rtol=1e-10, atol=1e-10)
    after = snapshot(home)
    for name in ("q.npy", "k.npy", "v.npy"):
        assert after[name] == before[name]
