"""Out of core: the numbers of the whole, from files or a generator; any stop is gone on from with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.heads import HeadRange
from compiled_dilated.programs import as_program
from compiled_dilated.ring import sources
from compiled_dilated.ring.checking import exact_row
from compiled_dilated.ring.journals import Journal
from compiled_dilated.ring.sources import FileSink, FileSource, GeneratedSource, SampleSink
from compiled_dilated.ring.streamed import Progress

LONGNET = cd.longnet((64, 128, 256), (1, 2, 4), causal=True)
PROGRAMS = {
    "longnet": LONGNET,
    "window or sinks": masks.causal() & (masks.window(50) | masks.sinks(3)),
    "global tokens": masks.window(9) | masks.global_tokens(4),
    "documents": masks.documents(lengths=(100, 3, 500, 200)) & masks.causal(),
    "causal": masks.causal(),
}


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """q.npy, k.npy and v.npy of some tokens, and where out and the journal go."""

    def make(tokens: int, dtype: Any = np.float64) -> dict[str, Path]:
        random = np.random.default_rng(0)
        for name, shape in (
            ("q", (2, 4, tokens, 8)),
            ("k", (2, 2, tokens, 8)),
            ("v", (2, 2, tokens, 6)),
        ):
            np.save(tmp_path / f"{name}.npy", random.standard_normal(shape).astype(dtype))
        return {name: tmp_path / f"{name}.npy" for name in ("q", "k", "v", "out")} | {
            "journal": tmp_path / "journal"
        }

    return make


def tensors(paths: dict[str, Path]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.load(paths[name])) for name in ("q", "k", "v"))


def stream(paths: dict[str, Path], program: Any = LONGNET, ranks: int = 8, **settings: Any) -> Any:
    run = cd.compile(program, ranks=ranks, transport="streamed")
    return run(
        paths["q"], paths["k"], paths["v"], paths["out"], journal=paths["journal"], **settings
    )


@pytest.mark.parametrize("tokens", [1, 331, 1000])
@pytest.mark.parametrize("name", PROGRAMS)
def test_is_the_reference(files: Any, name: str, tokens: int) -> None:
    paths = files(tokens)
    report = stream(paths, PROGRAMS[name])
    assert (report.complete, report.tokens) == (True, tokens)
    wanted = cd.reference(PROGRAMS[name], *tensors(paths))
    torch.testing.assert_close(
        torch.from_numpy(np.load(paths["out"])), wanted, rtol=1e-10, atol=1e-10
    )


def test_float16_and_scale(files: Any) -> None:
    paths = files(300, np.float16)
    stream(paths, scale=0.5)
    q, k, v = tensors(paths)
    found, dense = (
        torch.from_numpy(np.load(paths["out"])).double(),
        cd.reference(LONGNET, q, k, v, scale=0.5),
    )
    alone = cd.compile(LONGNET)(q, k, v, scale=0.5).double()
    assert found.dtype == torch.float64
    # Merged more often than in one piece, and rounded as often: twice the error of one device, and a rounding.
    assert (found - dense).abs().max() <= 2 * (alone - dense).abs().max() + torch.finfo(
        torch.float16
    ).eps


def test_a_second_call_has_nothing_to_do(files: Any) -> None:
    paths = files(500)
    stream(paths)
    before = paths["out"].read_bytes()
    report = stream(paths)
    assert (report.complete, report.resumed_ranks, report.ledger.steps) == (True, 8, 0)
    assert paths["out"].read_bytes() == before


def test_stops_in_time_and_goes_on(files: Any) -> None:
    paths = files(500)
    seen: list[Progress] = []
    first = stream(paths, limit_seconds=0.0, on_progress=seen.append)
    assert not first.complete
    assert [each.ranks for each in seen] == list(range(1, len(first.finished) + 1))
    second = stream(paths)
    assert second.complete
    assert second.resumed_ranks == len(first.finished)
    torch.testing.assert_close(
        torch.from_numpy(np.load(paths["out"])), cd.reference(LONGNET, *tensors(paths))
    )


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_journal_is_believed_up_to_where_it_is_whole(files: Any, cut: int) -> None:
    paths = files(500)
    stream(paths)
    before = paths["out"].read_bytes()
    paths["journal"].write_bytes(paths["journal"].read_bytes()[:-cut])
    report = stream(paths)
    assert report.complete
    assert report.resumed_ranks in (6, 7)
    assert paths["out"].read_bytes() == before
    assert stream(paths).ledger.steps == 0


def test_a_torn_output_is_found_and_computed_again(files: Any) -> None:
    paths = files(500)
    stream(paths)
    before = paths["out"].read_bytes()
    with paths["out"].open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\0" * 50)
    report = stream(paths)
    assert (report.torn, report.resumed_ranks) == ((7,), 7)
    assert paths["out"].read_bytes() == before


def test_a_journal_of_another_run_is_refused(files: Any) -> None:
    paths = files(500)
    stream(paths)
    with pytest.raises(
        ValueError,
        match=r"is of another run: ranks is 8 there and 4 here\. Name another journal, or remove",
    ):
        stream(paths, ranks=4)
    np.save(paths["q"], np.load(paths["q"]) + 1)
    with pytest.raises(ValueError, match="is of another run: sources is"):
        stream(paths)


KILLED = """
import sys
from pathlib import Path
import torch
import compiled_dilated as cd
from compiled_dilated.ring import streamed
streamed._SYNC_SECONDS = 0.0
home = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))  # by which kernels cut their sums
run = cd.compile(cd.longnet((64, 128, 256), (1, 2, 4), causal=True), ranks=40, transport="streamed")
run(*(home / f"{name}.npy" for name in ("q", "k", "v", "out")), journal=home / "journal",
    on_progress=lambda progress: print(progress.ranks, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_anywhere_it_goes_on_with_the_same_bits(files: Any, how: signal.Signals) -> None:
    paths = files(2000)
    home = paths["q"].parent
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", KILLED, str(home), str(torch.get_num_threads())]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 11:
            pass
        process.send_signal(how)
        process.communicate(timeout=60)
    assert process.returncode != 0
    report = stream(paths, ranks=40)
    assert report.complete
    assert 5 <= report.resumed_ranks < 40
    assert report.torn == ()
    resumed = np.load(paths["out"])
    for each in ("out", "journal"):
        paths[each].unlink()
    stream(paths, ranks=40)
    assert np.array_equal(np.load(paths["out"]), resumed)


FULL = """
import resource, signal, sys
from pathlib import Path
import compiled_dilated as cd
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
home, size = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
run = cd.compile(cd.masks.window(9), ranks=4, transport="streamed")
run(*(home / f"{name}.npy" for name in ("q", "k", "v", "out")), journal=home / "journal")
"""


def test_no_room_is_said_before_anything_is_computed(files: Any, fresh_python: Any) -> None:
    paths = files(2000)
    run = fresh_python("-c", FULL, str(paths["q"].parent), "10000")
    assert run.returncode == 1
    assert f"no room for {paths['out']}, 0.00 GiB: File too large. Make room" in run.stderr
    assert not paths["out"].exists()


def test_no_room_on_the_way_keeps_what_is_finished(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = files(500)
    write, written = FileSink.write, []

    def full(self: FileSink, rows: range, part: Tensor) -> bytes:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(rows)
        return write(self, rows, part)

    with monkeypatch.context() as patch:
        patch.setattr(FileSink, "write", full)
        with pytest.raises(
            OSError,
            match=r"cannot write the output of rank 3: No space left.* 3 of 8 ranks are finished",
        ):
            stream(paths)
    report = stream(paths)
    assert (report.complete, report.resumed_ranks) == (True, 3)


def test_a_truncated_source_is_refused(files: Any) -> None:
    paths = files(500)
    with paths["k"].open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(ValueError, match=r"k\.npy is no whole \.npy file .* It was cut off"):
        stream(paths)


def test_a_source_cut_off_meanwhile_is_an_error(files: Any) -> None:
    paths = files(500)
    source = FileSource(paths["k"])
    with paths["k"].open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(
        OSError, match=r"k\.npy ends within rows 0 to 499 of head 1: it was cut off meanwhile"
    ):
        sources.read(source, HeadRange(1, 1, 1), range(500))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "ranks must be at least 1"),
        ({"ranks": 4, "layout": "zigzag"}, "a streamed ring is contiguous"),
        (
            {"ranks": 4, "lowering": "dense"},
            "a streamed ring is contiguous and lowers each block as it is best",
        ),
        ({}, "transport='streamed' needs ranks"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cd.compile(LONGNET, transport="streamed", **settings)


def test_a_device_is_for_streams_alone() -> None:
    with pytest.raises(ValueError, match=r"device='cpu' is for transport='streamed'"):
        cd.compile(LONGNET, device="cpu")
    assert repr(cd.compile(masks.causal(), ranks=2, transport="streamed", device="meta")).endswith(
        "device='meta')"
    )


def test_data_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes no data tensors; this one reads \['ids'\]"):
        cd.compile(masks.documents(ids="ids"), ranks=2, transport="streamed")


def test_generated_rows_can_be_made_again() -> None:
    source = GeneratedSource((2, 3, 5000, 4), seed=1, stream=0, block=64)
    heads = HeadRange(0, 2, 2)
    whole = sources.read(source, heads, range(5000))
    assert torch.equal(sources.read(source, heads, range(3, 4999, 7)), whole[:, :, 3:4999:7])
    assert torch.equal(
        sources.read(source, HeadRange(2, 1, 1), range(130, 131)), whole[:, 1:, 130:131]
    )
    assert abs(whole.mean()) < 0.02
    assert abs(whole.std() - 1) < 0.02
    other = sources.read(
        GeneratedSource((2, 3, 5000, 4), seed=1, stream=1, block=64), heads, range(5000)
    )
    assert abs((whole * other).mean()) < 0.02


def test_generated_rows_of_batch_entries_heads_and_blocks_all_differ() -> None:
    source = GeneratedSource((3, 2, 40, 4), seed=1, stream=0, block=8)
    whole = sources.read(source, HeadRange(0, 1, 2), range(40))
    assert len(torch.unique(whole.flatten(0, 2), dim=0)) == 3 * 2 * 40


def test_sampled_rows_are_those_of_the_reference(tmp_path: Path) -> None:
    shape = (1, 2, 3000, 8)
    q, k, v = (GeneratedSource(shape, 0, stream, torch.float64) for stream in range(3))
    sink = SampleSink(tmp_path / "rows.npy", shape, [0, 17, 1024, 2999], torch.float64)
    report = cd.compile(LONGNET, ranks=7, transport="streamed")(
        q, k, v, sink, journal=tmp_path / "journal"
    )
    assert report.complete
    everything = [sources.read(x, HeadRange(0, 1, 2), range(3000)) for x in (q, k, v)]
    wanted = cd.reference(LONGNET, *everything)
    torch.testing.assert_close(
        sink.read(), wanted[:, :, [0, 17, 1024, 2999]], rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        exact_row(LONGNET, q, k, v, 1024, 8**-0.5), wanted[:, :, 1024], rtol=1e-10, atol=1e-10
    )


def test_an_exact_row_follows_a_mask_that_reads_the_batch_index() -> None:
    def by_batch(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q + kv) % 3 == (b + h) % 3

    program = as_program(masks.from_mod(by_batch))
    q, k, v = (GeneratedSource((3, 2, 40, 4), 0, stream, torch.float64) for stream in range(3))
    wanted = cd.reference(
        program, *(sources.read(x, HeadRange(0, 1, 2), range(40)) for x in (q, k, v))
    )
    torch.testing.assert_close(
        exact_row(program, q, k, v, 7, 0.5), wanted[:, :, 7], rtol=1e-10, atol=1e-10
    )


def test_a_journal_without_a_path_remembers_nothing() -> None:
    journal = Journal(None, {"a": 1}, range(4))
    journal.add(3, "x")
    journal.sync()
    assert journal.done == {3: "x"}


def test_a_rank_holds_as_little_however_long_the_sequence(tmp_path: Path) -> None:
    held = []
    for ranks in (8, 64):
        shape = (1, 1, 512 * ranks, 8)
        q, k, v = (GeneratedSource(shape, 0, stream) for stream in range(3))
        sink = SampleSink(tmp_path / f"{ranks}.npy", shape, [0], torch.float32)
        held.append(
            cd.compile(cd.longnet((256, 1024), (1, 2)), ranks=ranks, transport="streamed")(
                q, k, v, sink
            )
        )
    assert held[0].ledger.most_held_bytes == held[1].ledger.most_held_bytes
    assert held[1].ledger.steps == 8 * held[0].ledger.steps


@pytest.mark.parametrize("late", [False, True])
def test_the_memory_of_a_rank_is_used_again(tmp_path: Path, late: bool) -> None:
    """The rank that computes, the one that is read and the one that is written share no memory, and need no more."""
    shape = (1, 2, 256 * 16, 8)
    whole = [torch.randn(shape) for _ in range(3)]
    buffers: dict[int, Tensor] = {}  # kept, so that no address comes back from the allocator
    reads: list[range] = []

    class Source:
        dtype = torch.float32

        def __init__(self, x: Tensor) -> None:
            self.x, self.shape = x, shape

        def read_into(self, out: Tensor, heads: HeadRange, rows: range) -> None:
            if late and len(reads) % 7 == 0:
                time.sleep(0.02)
            reads.append(rows)
            buffers[out.data_ptr()] = out
            out.copy_(heads.of(self.x)[:, :, rows.start : rows.stop : rows.step])

    cd.compile(LONGNET, ranks=16, transport="streamed")(*map(Source, whole), tmp_path / "out.npy")
    assert len(reads) == 48
    assert len(buffers) <= 12  # q, k, v and out, three times
    out = torch.from_numpy(np.load(tmp_path / "out.npy"))
    torch.testing.assert_close(out, cd.compile(LONGNET)(*whole), rtol=1e-5, atol=1e-5)


def test_the_journal_says_what_it_is_of(files: Any) -> None:
    paths = files(100)
    began = time.time()
    stream(paths)
    header, *lines = [json.loads(line) for line in paths["journal"].read_text().splitlines()]
    assert header["ranks"] == 8
    assert header["program"] == [repr(LONGNET)]
    assert sorted(line["rank"] for line in lines) == list(range(8))
    assert paths["journal"].stat().st_mtime >= began - 1


# Functions


def test_a_run_with_a_function_that_captures_a_tensor(files: Any) -> None:
    paths = files(100)
    reach = torch.tensor(7)
    program = masks.from_mod(lambda b, h, i, j: (i - j).abs() < reach, within=masks.window(9))
    stream(paths, program=program)
    q, k, v = (torch.from_numpy(np.load(paths[name])) for name in "qkv")
    expected = cd.reference(program, q, k, v)
    torch.testing.assert_close(
        torch.from_numpy(np.load(paths["out"])).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("changed", ["function", "number", "tensor"])
def test_a_journal_of_another_function_of_the_same_name_is_refused(
    files: Any, changed: str
) -> None:
    paths = files(100)
    reach, table = 5, torch.ones(100, dtype=torch.bool)

    def program() -> masks.Mask:
        if changed == "function" and reach != 5:
            return masks.from_mod(lambda b, h, i, j: (j - i).abs() <= 5, within=masks.window(9))
        return masks.from_mod(
            lambda b, h, i, j: ((i - j).abs() < reach) & table[j], within=masks.window(9)
        )

    stream(paths, program=program())
    again = stream(paths, program=program())
    assert again.resumed_ranks == again.ranks
    if changed == "tensor":
        table[50] = False
    else:
        reach = 4
    with pytest.raises(ValueError, match="is of another run: program is"):
        stream(paths, program=program())
