"""The pairs in the lists of lanes, against masks.

tools/gpu_emulated runs the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.lowerings import lanes
from compiled_dilated.lowerings.lanes import lists
from compiled_dilated.lowerings.lanes.blocks import Blocks
from compiled_dilated.plans import Problem, Proposal, Refusal
from compiled_dilated.programs import as_program
from compiled_dilated.reference import multiplicity

BLOCKS = Blocks(rows=4, columns=3, warps=1, stages=1)
PROGRAMS = {
    "full": masks.full(),
    "causal": masks.causal(),
    "window": masks.window(7, 3),
    "dilated window": masks.window(9, 6, dilation=3),
    "segments": masks.segments(10),
    "documents": masks.documents(lengths=(13, 1, 20, 30)) & masks.causal(),
    "sinks": masks.causal() & (masks.window(5) | masks.sinks(3)),
    "prefix": masks.causal() | masks.prefix(11),
    "global tokens": masks.window(4) | masks.global_tokens(5),
    "no window": masks.causal() & ~masks.window(6) & ~masks.sinks(2),
    "other segments": masks.window(3) | ~masks.segments(16),
    "two negations": ~(masks.causal() & masks.window(8)),
    "longnet": cd.longnet((8, 32), (1, 4), causal=True),
    "longnet, rates that divide nothing": cd.longnet((10, 25), (1, 3)),
    "longnet, heads split": cd.longnet((8, 24), (1, 2), heads="split"),
    "longnet, grouped": cd.longnet((16, 32), (2, 4), offsets="grouped"),
}


@pytest.fixture(autouse=True)
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals alone, which need no Triton."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def problem(
    program: Any,
    queries: int = 70,
    keys: int = 70,
    q_offset: int = 0,
    heads: int = 4,
    **settings: Any,
) -> Problem:
    numbers: dict[str, Any] = {
        "head_dim": 16,
        "value_dim": 16,
        "dtype": "bfloat16",
        "device": "cuda",
    }
    numbers |= settings
    return Problem(
        as_program(program), 1, heads, heads, queries, keys, q_offset=q_offset, **numbers
    )


def counted(work: lanes.Work, of: Problem, transposed: bool) -> np.ndarray[Any, Any]:
    """Counts of pairs in lists of small tiles, (heads, queries, keys)."""
    tiles, runs, classes = (
        x.numpy() for x in work.lists(of, BLOCKS, transposed, torch.device("cpu"))
    )
    rows, columns = (of.kv_len, of.q_len) if transposed else (of.q_len, of.kv_len)
    first_row, first_column = (0, of.q_offset) if transposed else (of.q_offset, 0)
    out = np.zeros((of.heads, rows, columns), dtype=np.int64)
    for head, number in enumerate(classes):
        for first, step, count, start, middle, stop in tiles[number]:
            for place in range(start, stop):
                k_first, k_step, k_count, least, most, low, high = runs[place]
                i = np.arange(count)
                row, column = first + step * i[:, None], k_first + k_step * np.arange(k_count)[None]
                seen = (
                    (row - column >= least)
                    & (row - column <= most)
                    & (i >= low)[:, None]
                    & (i < high)[:, None]
                )
                if place < middle:
                    assert seen.all(), "a FULL run holds pairs that are hidden"
                    assert k_count % 3 == 0
                at = np.broadcast_arrays(row - first_row, column - first_column)
                np.add.at(out[head], tuple(at), seen)
    return out.transpose(0, 2, 1) if transposed else out


@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("shape", [(70, 70, 0), (9, 60, 51), (70, 33, 0), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_lists_hold_every_pair_as_often_as_branches_link_it(
    name: str, shape: tuple[int, int, int], transposed: bool
) -> None:
    of = problem(PROGRAMS[name], *shape)
    proposal = lanes.propose(of)
    assert isinstance(proposal, Proposal)
    q, k = torch.zeros(1, 4, shape[0], 1), torch.zeros(1, 4, shape[1], 1)
    expected = multiplicity(of.program, q, k, q_offset=shape[2])[0].numpy()
    np.testing.assert_array_equal(
        counted(proposal.work[0], of, transposed), np.broadcast_to(expected, (4, *shape[:2]))
    )


def counted_up_to(work: lanes.Work, most: Problem, call: Problem) -> np.ndarray[Any, Any]:
    """Counts of pairs of a call in lists for all calls within `most`, as the kernel cuts them."""
    tables = work.lists(most, BLOCKS, False, torch.device("cpu"), up_to=True)
    tiles, runs, classes = (x.numpy() for x in tables)
    tiling = lists.Tiling(BLOCKS.rows, BLOCKS.columns, work.step)
    first_tile, count = tiling.span(call.q_offset, call.q_len)
    out = np.zeros((call.heads, call.q_len, call.kv_len), dtype=np.int64)
    for head, number in enumerate(classes):
        for first, step, rows, start, middle, stop in tiles[number][first_tile:][:count]:
            row = first + step * np.arange(rows) - call.q_offset
            alive = (row >= 0) & (row < call.q_len)
            for place in range(start, stop):
                k_first, k_step, k_count, least, most_distance, low, high = runs[place]
                column = k_first + k_step * np.arange(k_count)
                column = column[column < call.kv_len]
                distance = row[:, None] + call.q_offset - column[None]
                i = np.arange(rows)[:, None]
                seen = (distance >= least) & (distance <= most_distance) & (i >= low) & (i < high)
                assert place >= middle or seen.all(), "a FULL run holds pairs that are hidden"
                np.add.at(out[head], np.ix_(row[alive], column), seen[alive])
    return out


@pytest.mark.parametrize("call", [(70, 70, 0), (1, 60, 59), (9, 60, 51), (33, 33, 0)], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_lists_up_to_a_length_are_those_of_every_call_within(
    name: str, call: tuple[int, int, int]
) -> None:
    most, of = problem(PROGRAMS[name], 90, 100), problem(PROGRAMS[name], *call)
    work = lanes.propose(most).work[0]  # type: ignore[union-attr]
    q, k = torch.zeros(1, 4, call[0], 1), torch.zeros(1, 4, call[1], 1)
    expected = multiplicity(of.program, q, k, q_offset=call[2])[0].numpy()
    np.testing.assert_array_equal(
        counted_up_to(work, most, of), np.broadcast_to(expected, (4, *call[:2]))
    )


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (masks.causal(), {"device": "cpu"}, "a Triton kernel for a GPU; the tensors are on cpu"),
    (masks.causal(), {"dtype": "float64"}, "computes in float32, not in float64"),
    (masks.causal(), {"scores": object()}, "it computes no score_mod"),
    (masks.causal(), {"head_dim": 320}, "heads of at most 256 numbers fit; got 320"),
    (masks.causal(), {"value_dim": 257}, "heads of at most 256 numbers fit; got 257"),
    (
        masks.causal(),
        {"queries": 1, "keys": 2**31, "q_offset": 2**31 - 1},
        "positions are counted in 32 bits; got 2147483648 and 2147483648 tokens",
    ),
    (masks.padding(), {}, "padding() is not made of runs of keys"),
    (masks.neighborhood((8, 8), 1), {}, "is not made of runs of keys"),
    (
        masks.full() & ~masks.window(4, dilation=2),
        {},
        "what window(4, dilation=2) hides is not made of runs",
    ),
    (cd.longnet((64, 64), (13, 11)), {}, "see alike every 143 tokens, which is more than 128"),
]


@pytest.mark.parametrize(("program", "settings", "reason"), REFUSED)
def test_what_it_cannot_express_is_refused_with_the_reason(
    program: Any, settings: dict[str, Any], reason: str
) -> None:
    refusal = lanes.propose(problem(program, **settings))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_without_triton_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"lowering 'lanes' refuses: Triton is not installed here \(pip install triton\)",
    ):
        cd.plan(
            masks.causal(), (1, 2, 64, 16), dtype=torch.bfloat16, device="cuda", lowering="lanes"
        )


def test_the_estimate_of_pairs_is_near_the_count_of_all_tiles() -> None:
    (group,) = set(lanes.propose(problem(masks.window(100, 20))).work[0].classes)  # type: ignore[union-attr]
    tiling = lists.Tiling(16, 8, 1)
    exact = lists.computed_pairs(group, range(5000), range(5000), tiling, most=10**6)
    sampled = lists.computed_pairs(group, range(5000), range(5000), tiling, most=32)
    assert sum(sampled) == pytest.approx(sum(exact), rel=0.05)


def test_the_planner_weighs_it_on_a_gpu_and_calls_its_costs_estimates() -> None:
    plan = cd.plan(
        cd.longnet((2048, 4096), (1, 2)), (1, 4, 8192, 64), dtype=torch.bfloat16, device="cuda"
    )
    assert plan.lowering == "lanes"
    assert "estimates, not measured on a GPU" in plan.explain()
    assert "estimates" not in cd.plan(masks.causal(), (1, 4, 512, 64)).explain()
