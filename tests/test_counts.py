"""Counts of plans do not grow past their committed baseline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import counts


@pytest.fixture(scope="module")
def now() -> counts.Counts:
    return counts.count()


def test_no_count_has_grown(now: counts.Counts) -> None:
    lines = counts.grown(counts.read(), now)
    assert not lines, "\n".join(
        ["counts of plans have grown; mend the cause, or accept them:", counts.REWRITE, *lines]
    )


def test_the_baseline_has_no_other_counts(now: counts.Counts) -> None:
    """A smaller count is a new baseline.

    No count may grow back to the old one.
    """
    lines = counts.shrunk(counts.read(), now)
    assert not lines, "\n".join([f"counts are smaller or gone: {counts.REWRITE}", *lines])


def test_growth_is_named_with_its_numbers() -> None:
    before = {"window": {"tiled pairs": 1000, "ring messages": 3}}
    now = {"window": {"tiled pairs": 1001, "ring messages": 3}, "new": {"graphs": 2}}
    assert counts.grown(before, now) == [
        "window: tiled pairs: was 1,000, is 1,001",
        "new: graphs: 2, not in the baseline",
    ]
    assert counts.grown(before, before) == []
    assert counts.shrunk(now, before) == [
        "window: tiled pairs: was 1,001, is 1,000",
        "new: graphs: was 2, is gone",
    ]


def test_counts_of_other_instruction_sets_stay(tmp_path: Path) -> None:
    path, foreign = tmp_path / "counts.json", "native pairs, of another machine"
    counts.write({"window": {foreign: 7, "tiled pairs": 5}}, path)
    now = {"window": {f"native pairs, {counts.isa()}": 4, "tiled pairs": 5}}
    assert counts.shrunk(counts.read(path), now) == []
    # A machine that the baseline has no counts of has nothing to compare.
    assert counts.grown(counts.read(path), now) == []
    counts.write(now, path)
    assert counts.read(path) == {"window": {foreign: 7, **now["window"]}}


def test_more_graphs_are_seen() -> None:
    """A compiled call specialised to its lengths has one graph per length."""
    from functools import partial

    import torch

    program = counts.GRAPHS["window or sinks"]
    few = counts.graphs(program)
    with torch._dynamo.config.patch(recompile_limit=16):
        many = counts.graphs(program, partial(torch.compile, dynamic=False))
    assert few < many
