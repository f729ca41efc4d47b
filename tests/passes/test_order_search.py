"""The search for the order of lowest peak.

It is compared with all orders of small graphs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.rewrites.order_search import Steps, search


def random_steps(seed: int, count: int) -> Steps:
    """A random graph of steps.

    Each step allocates up to two storages and uses up to three of earlier steps or of two inputs.
    """
    draw = random.Random(seed)
    sizes = [4, 4]
    allocated: list[tuple[int, ...]] = []
    used: list[tuple[int, ...]] = []
    before: list[tuple[int, ...]] = []
    step_of: dict[int, int] = {}
    for step in range(count):
        operands = [storage for storage in range(len(sizes)) if draw.random() < 0.4][-3:]
        results = tuple(range(len(sizes), len(sizes) + draw.choice((0, 1, 1, 2))))
        sizes += [draw.choice((0, 1, 2, 8)) for _ in results]
        step_of |= dict.fromkeys(results, step)
        # Sometimes it must follow a step whose results it does not use.
        earlier = {draw.randrange(step)} if step and draw.random() < 0.2 else set[int]()
        earlier |= {step_of[storage] for storage in operands if storage in step_of}
        before.append(tuple(sorted(earlier)))
        allocated.append(results)
        used.append((*operands, *results))
    permanent = frozenset(storage for storage in range(len(sizes)) if draw.random() < 0.1)
    workspace = tuple(draw.choice((0, 0, 3)) for _ in range(count))
    return Steps(tuple(sizes), tuple(allocated), tuple(used), tuple(before), permanent, workspace)


def orders(steps: Steps, done: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Yield all legal orders that begin with `done`."""
    if len(done) == len(steps.before):
        yield done
    for step, before in enumerate(steps.before):
        if step not in done and set(before) <= set(done):
            yield from orders(steps, (*done, step))


def peak_by_definition(steps: Steps, order: tuple[int, ...]) -> int:
    """The most bytes live beyond the inputs.

    A storage lives from the step that allocates it to the last that uses it.
    """
    place = {step: at for at, step in enumerate(order)}
    lower: dict[int, int] = {}
    upper: dict[int, int] = {}
    for step in order:
        for storage in steps.allocated[step]:
            lower[storage] = place[step]
        for storage in steps.used[step]:
            upper[storage] = place[step]
    input_bytes = sum(steps.sizes[storage] for storage in upper if storage not in lower)
    peak = 0
    for at, step in enumerate(order):
        live_bytes = steps.workspace[step]
        for storage, last in upper.items():
            is_freed = last < at and storage not in steps.permanent
            if lower.get(storage, 0) <= at and not is_freed:
                live_bytes += steps.sizes[storage]
        peak = max(peak, live_bytes - input_bytes)
    return peak


@given(st.integers(0, 10**9), st.integers(1, 7))
def test_the_peak_of_an_order_is_that_of_the_definition(seed: int, count: int) -> None:
    steps = random_steps(seed, count)
    order = next(orders(steps))
    assert steps.peak(order) == peak_by_definition(steps, order)


@given(st.integers(0, 10**9), st.integers(1, 7))
def test_no_order_is_better(seed: int, count: int) -> None:
    steps = random_steps(seed, count)
    order = search(steps)
    assert tuple(order) in set(orders(steps))
    assert steps.peak(order) == min(steps.peak(order) for order in orders(steps))


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 9])
def test_no_order_of_more_steps_is_better(count: int) -> None:
    for seed in range(200):
        steps = random_steps(seed, count)
        assert steps.peak(search(steps)) == min(map(steps.peak, orders(steps)))


@given(st.integers(0, 10**9))
def test_orders_of_many_steps_are_legal_and_never_worse(seed: int) -> None:
    steps = random_steps(seed, 60)
    order = search(steps, width=4)
    assert steps.peak(order) <= steps.peak(range(60))
    assert sorted(order) == list(range(60))
    for step in range(60):
        assert all(order.index(earlier) < order.index(step) for earlier in steps.before[step])


def test_branches_are_finished_one_after_the_other() -> None:
    """A breadth-first trace has both wide steps before those that reduce them."""
    wide = Steps(
        (8, 8, 1, 1, 1),
        ((0,), (1,), (2,), (3,), (4,)),
        ((0,), (1,), (0, 2), (1, 3), (2, 3, 4)),
        ((), (), (0,), (1,), (2, 3)),
    )
    assert wide.peak(range(5)) == 17
    assert wide.peak(search(wide)) == 10
    assert search(wide)[-1] == 4


def test_a_width_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be at least 1; got 0"):
        search(random_steps(0, 3), width=0)
