"""The search for an order against all orders there are."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.rewrites.order_search import Steps, search


def random_steps(seed: int, count: int) -> Steps:
    """A random DAG: each step makes up to two storages and uses some of earlier steps, or of two that were there before."""
    draw = random.Random(seed)
    sizes, made, used, before = [4, 4], [], [], []
    maker: dict[int, int] = {}
    for step in range(count):
        taken = [storage for storage in range(len(sizes)) if draw.random() < 0.4][-3:]
        mine = tuple(range(len(sizes), len(sizes) + draw.choice((0, 1, 1, 2))))
        sizes += [draw.choice((0, 1, 2, 8)) for _ in mine]
        maker |= dict.fromkeys(mine, step)
        chained = {draw.randrange(step)} if step and draw.random() < 0.2 else set()
        before.append(tuple(sorted({maker[each] for each in taken if each in maker} | chained)))
        made.append(mine)
        used.append((*taken, *mine))
    kept = frozenset(storage for storage in range(len(sizes)) if draw.random() < 0.1)
    workspace = tuple(draw.choice((0, 0, 3)) for _ in range(count))
    return Steps(tuple(sizes), tuple(made), tuple(used), tuple(before), kept, workspace)


def orders(steps: Steps, done: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if len(done) == len(steps.before):
        yield done
    for step, before in enumerate(steps.before):
        if step not in done and set(before) <= set(done):
            yield from orders(steps, (*done, step))


def held_by(steps: Steps, order: tuple[int, ...]) -> int:
    """The definition, from scratch: at each step, what was made before or in it and is used in it or later."""
    place = {step: at for at, step in enumerate(order)}
    lower = {storage: place[step] for step, made in enumerate(steps.allocated) for storage in made}
    upper = {storage: place[step] for step in order for storage in steps.used[step]}
    there = [storage for storage in upper if storage not in lower]
    peak = 0
    for at, step in enumerate(order):
        live = [
            s for s in upper if lower.get(s, 0) <= at and (at <= upper[s] or s in steps.permanent)
        ]
        peak = max(
            peak,
            sum(steps.sizes[s] for s in live)
            + steps.workspace[step]
            - sum(steps.sizes[s] for s in there),
        )
    return max(peak, 0)


@given(st.integers(0, 10**9), st.integers(1, 7))
def test_the_peak_of_an_order_is_its_definition(seed: int, count: int) -> None:
    steps = random_steps(seed, count)
    order = next(orders(steps))
    assert steps.peak(order) == held_by(steps, order)


@given(st.integers(0, 10**9), st.integers(1, 7))
def test_no_order_is_better(seed: int, count: int) -> None:
    steps = random_steps(seed, count)
    found = search(steps)
    assert tuple(found) in set(orders(steps))
    assert steps.peak(found) == min(steps.peak(order) for order in orders(steps))


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 9])
def test_no_order_of_more_steps_is_better(count: int) -> None:
    for seed in range(200):
        steps = random_steps(seed, count)
        assert steps.peak(search(steps)) == min(map(steps.peak, orders(steps)))


@given(st.integers(0, 10**9))
def test_many_steps_are_never_worse_and_legal(seed: int) -> None:
    steps = random_steps(seed, 60)
    found = search(steps, width=4)
    assert steps.peak(found) <= steps.peak(range(60))
    assert sorted(found) == list(range(60))
    assert all(
        found.index(each) < found.index(step) for step in range(60) for each in steps.before[step]
    )


def test_branches_are_finished_one_after_the_other() -> None:
    """Two wide steps first, then what narrows them, is what a breadth-first trace gives."""
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
