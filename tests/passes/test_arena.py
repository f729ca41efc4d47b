"""Placements: valid, as low as can be, judged by a validator that finds every fault; and graphs that run in an arena."""

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

lifetimes = st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, 20)).map(
    lambda t: Buffer(t[0], t[0] + t[1], t[2])
)


def meet(a: Buffer, b: Buffer) -> bool:
    return a.lower < b.upper and b.lower < a.upper


def clash(buffers: Sequence[Buffer], offsets: Sequence[int]) -> bool:
    """Whether any two that live together overlap, by every pair."""
    return any(
        meet(a, b) and max(x, y) < min(x + a.size, y + b.size)
        for (a, x), (b, y) in itertools.combinations(zip(buffers, offsets, strict=True), 2)
    )


def lowest(buffers: Sequence[Buffer]) -> int:
    """The least height of all placements: some order of the buffers, each as low as those before it allow, gives it."""

    def dropped(order: Sequence[Buffer]) -> int:
        placed: list[tuple[Buffer, int]] = []
        for buffer in order:
            # Nothing below the highest of those it meets: a buffer in a gap comes earlier in another order.
            placed.append(
                (
                    buffer,
                    max(
                        (at + other.size for other, at in placed if meet(buffer, other)), default=0
                    ),
                )
            )
        return max((at + buffer.size for buffer, at in placed), default=0)

    return min(map(dropped, itertools.permutations(buffers)))


def problem(name: str) -> list[Buffer]:
    with (DATA / f"{name}.csv").open() as file:
        return [
            Buffer(int(row["lower"]), int(row["upper"]), int(row["size"]))
            for row in csv.DictReader(file)
        ]


@given(st.lists(lifetimes, max_size=30), st.sampled_from((1, 4, 64)))
def test_placements_are_valid(buffers: list[Buffer], alignment: int) -> None:
    placement = arena.solve(buffers, seconds=0.2, alignment=alignment)
    arena.validate(buffers, placement)
    assert not clash(buffers, placement.offsets)
    assert placement.height >= placement.lower_bound


@given(st.lists(lifetimes, max_size=6))
def test_tiny_problems_are_solved_to_the_optimum(buffers: list[Buffer]) -> None:
    assert arena.solve(buffers, seconds=10).height == lowest(buffers)


@given(st.lists(lifetimes, min_size=2, max_size=20), st.data())
def test_the_validator_finds_what_every_pair_finds(
    buffers: list[Buffer], data: st.DataObject
) -> None:
    placement = arena.solve(buffers, seconds=0.2)
    at = data.draw(st.integers(0, len(buffers) - 1))
    offset = data.draw(st.integers(0, placement.height))
    offsets = (*placement.offsets[:at], offset, *placement.offsets[at + 1 :])
    moved = replace(placement, offsets=offsets, height=placement.height + 20)
    if clash(buffers, offsets):
        with pytest.raises(ValueError, match=rf"overlap.*|buffers .*\b{at}\b") as raised:
            arena.validate(buffers, moved)
        assert str(at) in str(raised.value).partition(" live together")[0]
    else:
        arena.validate(buffers, moved)


def test_the_exact_search_solves_what_no_greedy_order_does() -> None:
    # Found among random problems: first fit ends at 21 in every order.
    sizes = [(3, 5, 7), (5, 6, 3), (0, 2, 2), (2, 3, 2), (5, 8, 1), (3, 6, 7), (5, 7, 5), (6, 7, 8)]
    buffers = [Buffer(*each) for each in sizes]
    assert arena.solve(buffers, seconds=0).height == 21
    for capacity in (None, 16):
        placement = arena.solve(buffers, capacity=capacity, seconds=30)
        arena.validate(buffers, placement)
        assert placement.height == placement.lower_bound == 16


def test_seconds_are_a_limit() -> None:
    started = time.monotonic()
    placement = arena.solve(problem("I"), seconds=2)
    arena.validate(problem("I"), placement)
    assert time.monotonic() - started < 6


FAULTS: list[tuple[Placement, str]] = [
    (Placement((0, 2, 0), 8, 6), "buffers 0 and 2 live together and overlap"),
    (
        Placement((0, 0, -2), 8, 6),
        "buffer 2, Buffer(lower=0, upper=2, size=4), is at the negative offset -2",
    ),
    (Placement((0, 0, 2), 5, 6), "at offset 2 ends at 6, beyond the height 5"),
    (
        Placement((0, 0, 2), 6, 6, alignment=4),
        "buffer 2, Buffer(lower=0, upper=2, size=4), is at offset 2, not a multiple of",
    ),
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
    return CASES[0].made


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Buffer(4, 4, 1), ValueError, "lower must be below upper, for lifetimes are half-open; got [4, 4)"),
    (lambda: Buffer(0, 4, -1), ValueError, "size must be at least 0 bytes; got -1"),
    (lambda: Buffer(0, 4.0, 1), TypeError, "upper must be an integer; got float 4.0"),  # type: ignore[arg-type]
    (lambda: arena.solve([(0, 4, 1)]), TypeError, "buffers[0] must be a Buffer; got tuple (0, 4, 1). Write Buffer("),  # type: ignore[list-item]
    (lambda: arena.solve([Buffer(0, 4, 8)], capacity=7), ValueError, "capacity must be at least 8, the bytes that live at once"),
    (lambda: arena.solve([], capacity=-1), ValueError, "capacity must be at least 0; got -1"),
    (lambda: arena.solve([], capacity="6GiB"), TypeError, "capacity must be a whole number; got str '6GiB'"),  # type: ignore[arg-type]
    (lambda: arena.solve([], alignment=0), ValueError, "alignment must be at least 1; got 0"),
    (lambda: arena.solve([], seconds=-1), ValueError, "seconds must be a finite number, at least 0; got -1"),
    (lambda: arena.solve(problem("A"), CAPACITY, seconds=0), ValueError, "1,048,576 was not reached in 0 seconds; the least"),
    (lambda: arena.Executor(nn.Linear(2, 2), []), TypeError, "graph_module must be an fx GraphModule; got Linear"),  # type: ignore[arg-type]
    (lambda: arena.Executor(data_dependent(torch.nonzero), [torch.ones(3, 3)]), ValueError, "nonzero.default) makes as much"),
    (lambda: arena.Executor(data_dependent(lambda x: x[x > 0]), [torch.ones(3, 3)]), ValueError, "index.Tensor) makes as much"),
    (lambda: arena.Executor(a_graph()[0], []), ValueError, "example_inputs must be the graph's 5 inputs; got 0"),
    (lambda: arena.Executor(*a_graph())(), ValueError, "the graph takes 5 inputs; got 0"),
    (
        lambda: arena.Executor(*a_graph())(*a_graph()[1][:4], torch.randn(3, 256, graphs.WIDTH)),
        ValueError,
        "input x must be as in the example, torch.float32 (2, 256, 64) with strides (16384, 64, 1) on cpu; got torch.float32 (3,",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "message"), BAD)
def test_bad_input_is_named(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        act()


def outputs(value: Any) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(value)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_executor_computes_what_the_graph_does(case: Traced) -> None:
    module, inputs = case.made
    executor = arena.Executor(module, inputs)
    arena.validate(executor.buffers, executor.placement)
    assert executor.height == executor.placement.lower_bound
    for run in range(2):  # the second on memory that the first has used
        other = [each * (1 + run) for each in inputs]
        expected = outputs(interpreted(module, other)())
        for ours, theirs in zip(outputs(executor(*other)), expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_of_models_are_placed_at_the_bound_in_a_second(case: Traced) -> None:
    storages = liveness.lifetimes(case.made[0]).storages
    buffers = [Buffer(each.lower, each.upper, each.size) for each in storages if not each.is_input]
    started = time.monotonic()
    placement = arena.solve(buffers, alignment=64)
    assert time.monotonic() - started < 1
    assert placement.height == placement.lower_bound


def test_nothing_but_copied_results_is_allocated_beside_the_arena() -> None:
    """Arena and temporaries are all: none where every node writes in place, one result at a time where nodes are copied."""
    for case in CASES:
        module, inputs = case.made
        executor = arena.Executor(module, inputs)
        beside = measured_peak(lambda run=executor, given=inputs: run(*given))
        made = [
            each
            for each in liveness.lifetimes(module).storages
            if each.name.partition("[")[0] in executor.copied
        ]
        largest = max(
            (sum(other.size for other in made if other.lower == each.lower) for each in made),
            default=0,
        )
        if case.exact:
            assert beside <= largest * 1.02, case
        if not executor.copied:
            assert beside == 0, case


def test_outputs_lie_in_the_arena() -> None:
    module, inputs = a_graph()
    executor = arena.Executor(module, inputs)
    first, second = (pytree.tree_leaves(executor(*inputs))[0] for _ in range(2))
    begin = executor.arena.data_ptr()
    assert begin <= first.data_ptr() < begin + executor.height
    assert first.data_ptr() == second.data_ptr()
    assert (
        repr(executor)
        == "Executor(3 buffers in 1,048,576 bytes, the lower bound, 0 of 9 nodes copied)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "C", "E", "G", "I"])
def test_hard_problems(name: str) -> None:
    placement = arena.solve(problem(name), capacity=CAPACITY, seconds=60)
    arena.validate(problem(name), placement)
    assert placement.height <= CAPACITY
