"""Sources and sinks of streamed runs.

Files, generated rows, samples, and exact rows of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.heads import HeadRange
from compiled_dilated.programs import as_program
from compiled_dilated.ring import sources
from compiled_dilated.ring.checking import exact_row
from compiled_dilated.ring.sources import FileSource, GeneratedSource, SampleSink
from tests.support.streams import LONGNET, stream, write_files


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 500)
    with paths["k"].open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(ValueError, match=r"k\.npy is no whole \.npy file .* It was cut off"):
        stream(paths)


def test_a_file_truncated_during_the_run_is_an_error(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 500)
    source = FileSource(paths["k"])
    with paths["k"].open("r+b") as file:
        file.truncate(10_000)
    message = r"k\.npy ends within rows 0 to 499 of head 1: it was cut off meanwhile"
    with pytest.raises(OSError, match=message):
        sources.read(source, HeadRange(1, 1, 1), range(500))


# Generated rows


def test_parts_of_generated_rows_equal_all_rows() -> None:
    source = GeneratedSource((2, 3, 5000, 4), seed=1, stream=0, block=64)
    heads, last_head = HeadRange(0, 2, 2), HeadRange(2, 1, 1)
    rows = sources.read(source, heads, range(5000))
    assert torch.equal(sources.read(source, heads, range(3, 4999, 7)), rows[:, :, 3:4999:7])
    assert torch.equal(sources.read(source, last_head, range(130, 131)), rows[:, 1:, 130:131])


def test_generated_rows_are_normalized_and_independent() -> None:
    shape, heads = (2, 3, 5000, 4), HeadRange(0, 2, 2)
    first, second = (
        sources.read(GeneratedSource(shape, seed=1, stream=stream), heads, range(5000))
        for stream in range(2)
    )
    assert abs(first.mean()) < 0.02
    assert abs(first.std() - 1) < 0.02
    assert abs((first * second).mean()) < 0.02


def test_generated_rows_of_batch_entries_heads_and_blocks_all_differ() -> None:
    source = GeneratedSource((3, 2, 40, 4), seed=1, stream=0, block=8)
    rows = sources.read(source, HeadRange(0, 1, 2), range(40))
    assert len(torch.unique(rows.flatten(0, 2), dim=0)) == 3 * 2 * 40


# Samples and exact rows


def generated(shape: tuple[int, int, int, int]) -> list[GeneratedSource]:
    """Sources of q, k and v."""
    return [GeneratedSource(shape, 0, stream, torch.float64) for stream in range(3)]


def test_sampled_and_exact_rows_equal_the_reference(tmp_path: Path) -> None:
    shape, samples = (1, 2, 3000, 8), [0, 17, 1024, 2999]
    inputs = generated(shape)
    sink = SampleSink(tmp_path / "rows.npy", shape, samples, torch.float64)
    run = cd.compile(LONGNET, ranks=7, transport="streamed")
    assert run(inputs[0], inputs[1], inputs[2], sink, journal=tmp_path / "journal").complete
    q, k, v = (sources.read(x, HeadRange(0, 1, 2), range(3000)) for x in inputs)
    expected = cd.reference(LONGNET, q, k, v)
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(sink.read(), expected[:, :, samples], rtol=1e-10, atol=1e-10)
    row = exact_row(LONGNET, inputs[0], inputs[1], inputs[2], 1024, 8**-0.5)
    torch.testing.assert_close(row, expected[:, :, 1024], rtol=1e-10, atol=1e-10)


def test_an_exact_row_follows_a_mask_that_reads_the_batch_index() -> None:
    def by_batch(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q + kv) % 3 == (b + h) % 3

    program = as_program(masks.from_mod(by_batch))
    inputs = generated((3, 2, 40, 4))
    q, k, v = (sources.read(x, HeadRange(0, 1, 2), range(40)) for x in inputs)
    expected = cd.reference(program, q, k, v)
    assert isinstance(expected, torch.Tensor)
    row = exact_row(program, inputs[0], inputs[1], inputs[2], 7, 0.5)
    torch.testing.assert_close(row, expected[:, :, 7], rtol=1e-10, atol=1e-10)
