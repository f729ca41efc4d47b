"""Placements of buffers: validity, optimality, the validator, and execution in an arena."""

from __future__ import annotations

import csv
import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from passes import arena
from passes.analysis import liveness
from passes.arena import Buffer, Placement
from tests import graphs
from tests.graphs import CASES, Traced, interpreted, measured_peak

DATA = Path(__file__).parents[1] / "data" / "arena"
CAPACITY = 2**20

# Lower, duration and size of a buffer.
any_buffer = st.builds(
    lambda lower, steps, size: Buffer(lower, lower + steps, size),
    st.integers(0, 12),
    st.integers(1, 6),
    st.integers(0, 20),
)


def live_together(first: Buffer, second: Buffer) -> bool:
    return first.lower < second.upper and second.lower < first.upper


def has_overlap(buffers: Sequence[Buffer], offsets: Sequence[int]) -> bool:
    """Whether two buffers that live together overlap, by every pair."""
    placed = zip(buffers, offsets, strict=True)
    for (first, start), (second, other_start) in itertools.combinations(placed, 2):
        bottom = max(start, other_start)
        top = min(start + first.size, other_start + second.size)
        if live_together(first, second) and bottom < top:
            return True
    return False


def least_height(buffers: Sequence[Buffer]) -> int:
    """The least height of all placements, by brute force.

    Some order of the buffers gives it, each placed as low as those before it allow.
    """
    return min(map(_height_in_order, itertools.permutations(buffers)))


def _height_in_order(order: Sequence[Buffer]) -> int:
    """The height of buffers stacked in an order.

    A buffer lies above all earlier buffers that are alive at the same time.

    Gaps need not be tried: a buffer that fits in one comes earlier in another order.
    """
    placed: list[tuple[Buffer, int]] = []
    for buffer in order:
        offset = 0
        for below, start in placed:
            if live_together(buffer, below):
                offset = max(offset, start + below.size)
        placed.append((buffer, offset))
    return max((start + buffer.size for buffer, start in placed), default=0)


def problem(name: str) -> list[Buffer]:
    with (DATA / f"{name}.csv").open() as file:
        return [
            Buffer(int(row["lower"]), int(row["upper"]), int(row["size"]))
            for row in csv.DictReader(file)
        ]


@given(st.lists(any_buffer, max_size=30), st.sampled_from((1, 4, 64)))
def test_placements_are_valid(buffers: list[Buffer], alignment: int) -> None:
    placement = arena.solve(buffers, seconds=0.2, alignment=alignment)
    arena.validate(buffers, placement)
    assert not has_overlap(buffers, placement.offsets)
    assert placement.height >= placement.lower_bound


@given(st.lists(any_buffer, max_size=6))
def test_tiny_problems_are_solved_to_the_optimum(buffers: list[Buffer]) -> None:
    assert arena.solve(buffers, seconds=10).height == least_height(buffers)


@given(st.lists(any_buffer, min_size=2, max_size=20), st.data())
def test_the_validator_finds_every_overlap(buffers: list[Buffer], data: st.DataObject) -> None:
    placement = arena.solve(buffers, seconds=0.2)
    at = data.draw(st.integers(0, len(buffers) - 1))
    offset = data.draw(st.integers(0, placement.height))
    offsets = (*placement.offsets[:at], offset, *placement.offsets[at + 1 :])
    moved = replace(placement, offsets=offsets, height=placement.height + 20)
    if has_overlap(buffers, offsets):
        with pytest.raises(ValueError, match=rf"overlap.*|buffers .*\b{at}\b") as raised:
            arena.validate(buffers, moved)
        assert str(at) in str(raised.value).partition(" live together")[0]
    else:
        arena.validate(buffers, moved)


def test_the_exact_search_beats_every_greedy_order() -> None:
    # From random problems: first fit reaches 21 in every order.
    sizes = [(3, 5, 7), (5, 6, 3), (0, 2, 2), (2, 3, 2), (5, 8, 1), (3, 6, 7), (5, 7, 5), (6, 7, 8)]
    buffers = [Buffer(*numbers) for numbers in sizes]
    assert arena.solve(buffers, seconds=0).height == 21
    for capacity in (None, 16):
        placement = arena.solve(buffers, capacity=capacity, seconds=30)
        arena.validate(buffers, placement)
        assert placement.height == placement.lower_bound == 16


def test_the_time_limit_is_met() -> None:
    started = time.monotonic()
    placement = arena.solve(problem("I"), seconds=2)
    arena.validate(problem("I"), placement)
    assert time.monotonic() - started < 6


FAULTS: list[tuple[Placement, str]] = [
    (Placement((0, 2, 0), 8, 6), "buffers 0 and 2 live together and overlap"),
    (Placement((0, 0, -2), 8, 6), "upper=2, size=4), is at the negative offset -2"),
    (Placement((0, 0, 2), 5, 6), "at offset 2 ends at 6, beyond the height 5"),
    (Placement((0, 0, 2), 6, 6, alignment=4), "size=4), is at offset 2, not a multiple of"),
    (Placement((0, 0), 6, 6), "one offset for each of 3 buffers; got 2"),
    (Placement((0, 0, 2), 6, 5), "lower_bound must be 6, the most bytes that live at once; got 5"),
]


@pytest.mark.parametrize(("placement", "message"), FAULTS)
def test_faults_are_named(placement: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        arena.validate([Buffer(0, 4, 2), Buffer(4, 8, 4), Buffer(0, 2, 4)], placement)


def data_dependent(select: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    class Selected(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return select(x) * 2

    return torch.export.export(Selected(), (torch.ones(3, 3),)).graph_module


def a_graph() -> Any:
    return CASES[0].example


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Buffer(4, 4, 1), ValueError,
     "lower must be below upper, for lifetimes are half-open; got [4, 4)"),
    (lambda: Buffer(0, 4, -1), ValueError, "size must be at least 0 bytes; got -1"),
    (lambda: Buffer(0, 4.0, 1), TypeError,  # type: ignore[arg-type]
     "upper must be an integer; got float 4.0"),
    (lambda: arena.solve([(0, 4, 1)]), TypeError,  # type: ignore[list-item]
     "buffers[0] must be a Buffer; got tuple (0, 4, 1). Write Buffer("),
    (lambda: arena.solve([Buffer(0, 4, 8)], capacity=7), ValueError,
     "capacity must be at least 8, the bytes that live at once"),
    (lambda: arena.solve([], capacity=-1), ValueError, "capacity must be at least 0; got -1"),
    (lambda: arena.solve([], capacity="6GiB"), TypeError,  # type: ignore[arg-type]
     "capacity must be a whole number; got str '6GiB'"),
    (lambda: arena.solve([], alignment=0), ValueError, "alignment must be at least 1; got 0"),
    (lambda: arena.solve([], seconds=-1), ValueError,
     "seconds must be a finite number, at least 0; got -1"),
    (lambda: arena.solve(problem("A"), CAPACITY, seconds=0), ValueError,
     "1,048,576 was not reached in 0 seconds; the least"),
    (lambda: arena.Executor(nn.Linear(2, 2), []), TypeError,  # type: ignore[arg-type]
     "graph_module must be an fx GraphModule; got Linear"),
    (lambda: arena.Executor(data_dependent(torch.nonzero), [torch.ones(3, 3)]), ValueError,
     "nonzero.default) makes as much"),
    (lambda: arena.Executor(data_dependent(lambda x: x[x > 0]), [torch.ones(3, 3)]), ValueError,
     "index.Tensor) makes as much"),
    (lambda: arena.Executor(a_graph()[0], []), ValueError,
     "example_inputs must be the graph's 5 inputs; got 0"),
    (lambda: arena.Executor(*a_graph())(), ValueError, "the graph takes 5 inputs; got 0"),
    (lambda: arena.Executor(*a_graph())(*a_graph()[1][:4], torch.randn(3, 256, graphs.WIDTH)),
     ValueError, "input x must be as in the example, torch.float32 (2, 256, 64) with strides ("),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "message"), BAD)
def test_bad_input_is_named(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        act()


def outputs(value: Any) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(value)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_executor_gives_the_bits_of_the_graph(case: Traced) -> None:
    module, inputs = case.example
    executor = arena.Executor(module, inputs)
    arena.validate(executor.buffers, executor.placement)
    assert executor.height == executor.placement.lower_bound
    for factor in (1, 2):  # the second run reuses the memory of the first
        scaled = [tensor * factor for tensor in inputs]
        expected = outputs(interpreted(module, scaled)())
        for result, expected_result in zip(outputs(executor(*scaled)), expected, strict=True):
            assert torch.equal(result, expected_result)
            assert result.stride() == expected_result.stride()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_of_models_are_placed_at_the_bound_in_a_second(case: Traced) -> None:
    module, _ = case.example
    buffers: list[Buffer] = []
    for storage in liveness.lifetimes(module).storages:
        if not storage.is_input:
            buffers.append(Buffer(storage.lower, storage.upper, storage.size))
    started = time.monotonic()
    placement = arena.solve(buffers, alignment=64)
    assert time.monotonic() - started < 1
    assert placement.height == placement.lower_bound


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_executor_allocates_only_results_that_it_copies(case: Traced) -> None:
    """Beside the arena, at most one node's results at a time.

    Nothing if every node writes into the arena.
    """
    module, inputs = case.example
    executor = arena.Executor(module, inputs)
    allocated_bytes = measured_peak(lambda: executor(*inputs))
    # Bytes by the step that computes results to be copied.
    copied_bytes: dict[int, int] = {}
    for storage in liveness.lifetimes(module).storages:
        if storage.name.partition("[")[0] in executor.copied:
            copied_bytes[storage.lower] = copied_bytes.get(storage.lower, 0) + storage.size
    if case.exact:
        assert allocated_bytes <= max(copied_bytes.values(), default=0) * 1.02
    if not executor.copied:
        assert allocated_bytes == 0


def test_results_are_in_the_arena() -> None:
    module, inputs = a_graph()
    executor = arena.Executor(module, inputs)
    first, second = (pytree.tree_leaves(executor(*inputs))[0] for _ in range(2))
    begin = executor.arena.data_ptr()
    assert begin <= first.data_ptr() < begin + executor.height
    assert first.data_ptr() == second.data_ptr()
    placement = "3 buffers in 1,048,576 bytes, the lower bound"
    assert repr(executor) == f"Executor({placement}, 0 of 9 nodes copied)"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "C", "E", "G", "I"])
def test_hard_problems_fit_the_capacity(name: str) -> None:
    placement = arena.solve(problem(name), capacity=CAPACITY, seconds=60)
    arena.validate(problem(name), placement)
    assert placement.height <= CAPACITY
