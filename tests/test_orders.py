"""Orders: exact round trips, regions of runs, and tracing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from compiled_dilated import orders
from compiled_dilated.orders import Order, curves, indices
from tests import strategies
from tests.support.orders import RoundTrip


def residue_positions(n: int, rate: int, period: int | None) -> list[int]:
    """Residue classes by their definition, in each period."""
    length = period or max(n, 1)
    positions: list[int] = []
    for start in range(0, n, length):
        for first in range(start, start + rate):
            positions += range(first, min(start + length, n), rate)
    return positions


def check_round_trip(order: Order, n: int) -> None:
    permutation = order.permutation(n)
    positions = np.arange(n) if permutation is None else permutation
    assert sorted(positions.tolist()) == list(range(n))
    x = torch.randn(2, n, 3, dtype=torch.float64)
    for dim in (-2, 1):
        assert torch.equal(order.permute(x, dim), x[:, torch.from_numpy(positions)])
        assert torch.equal(order.invert(order.permute(x, dim), dim), x)
        assert torch.equal(order.permute(order.invert(x, dim), dim), x)
    assert torch.equal(order.permute(x.transpose(1, 2), -1), order.permute(x).transpose(1, 2))


@given(st.integers(0, 80), st.integers(1, 9), st.none() | st.integers(1, 40))
def test_residue_is_its_definition(n: int, rate: int, period: int | None) -> None:
    order = orders.residue(rate, period)
    permutation = order.permutation(n)
    assert permutation is not None
    assert permutation.tolist() == residue_positions(n, rate, period)
    check_round_trip(order, n)


@given(strategies.grids(200))
def test_hilbert_round_trip(grid: tuple[int, ...]) -> None:
    check_round_trip(orders.hilbert(*grid), math.prod(grid))


def test_identity_changes_nothing() -> None:
    x = torch.randn(2, 5, 3)
    assert orders.identity().permutation(5) is None
    assert orders.identity().permute(x) is x
    assert orders.identity().invert(x) is x


def cells_of(order: Order, grid: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The coordinates of the cell at each place, (axes, cells)."""
    permutation = order.permutation(math.prod(grid))
    assert permutation is not None
    return np.stack(np.unravel_index(permutation, grid))


@pytest.mark.parametrize(
    "grid", [(2, 2), (4, 4), (16, 16), (64, 64), (2, 2, 2), (8, 8, 8), (1, 8, 8), (16, 1, 16)]
)
def test_hilbert_steps_to_a_neighbor(grid: tuple[int, ...]) -> None:
    cells = cells_of(orders.hilbert(*grid), grid)
    assert (np.abs(np.diff(cells, axis=1)).sum(axis=0) == 1).all()


@pytest.mark.parametrize(
    "grid", [(9, 15), (48, 48), (12, 100), (100, 100), (5, 20, 30), (64, 8, 8)]
)
def test_hilbert_of_other_sizes_rarely_jumps(grid: tuple[int, ...]) -> None:
    n = math.prod(grid)
    cells = cells_of(orders.hilbert(*grid), grid)
    steps = np.abs(np.diff(cells, axis=1)).sum(axis=0)
    assert np.mean(steps) < 1.2
    starts = np.arange(0, n - 63, 64)
    boxes = orders.hilbert(*grid).regions(starts, starts + 64, n)
    # A run of 64 cells in row-major order spans complete rows; here its bounding box has at most
    # 2.5 times its cells.
    assert np.mean(np.prod(boxes.extent, axis=1)) < 2.5 * 64


@pytest.mark.parametrize(
    ("grid", "run"),
    [((16, 16), 64), ((48, 80), 256), ((1024, 1024), 4096), ((8, 8, 8), 64), ((4, 16, 16), 64)],
)
def test_aligned_hilbert_runs_are_boxes(grid: tuple[int, ...], run: int) -> None:
    n = math.prod(grid)
    starts = np.arange(0, n, run)
    boxes = orders.hilbert(*grid).regions(starts, starts + run, n)
    side = round(run ** (1 / len(grid)))
    assert (boxes.extent == side).all()


@given(st.data())
def test_regions_contain_their_runs(data: st.DataObject) -> None:
    _, order, n = data.draw(strategies.masks_and_orders())
    starts_and_lengths = st.tuples(st.integers(0, n - 1), st.integers(1, n))
    runs = []
    for start, length in data.draw(st.lists(starts_and_lengths, min_size=1)):
        runs.append((start, min(n, start + length)))
    starts, stops = np.array(runs).T
    permutation = order.permutation(n)
    positions = np.arange(n) if permutation is None else permutation
    regions = order.regions(starts, stops, n)
    for row, (start, stop) in enumerate(runs):
        region, run = set(regions.positions(row).tolist()), set(positions[start:stop].tolist())
        assert run <= region
        assert max(region) < n
        assert min(region) >= 0
        if isinstance(order, orders.Residue):
            # The region of a run within one residue class is exact.
            period = order.period or n
            if len({(p // period, p % period % order.rate) for p in run}) == 1:
                assert region == run


def test_large_hilbert_curves_are_int32() -> None:
    order = orders.hilbert(1024, 1024)
    x = torch.arange(2**20, dtype=torch.int32)[None, :, None]
    assert torch.equal(order.invert(order.permute(x)), x)
    assert curves.curve((1024, 1024)).dtype == np.int32
    assert all(index.dtype == torch.int32 for index in vars(indices.INDICES).values())


def test_curves_beyond_int32() -> None:
    """A thin slab in a cube of 2**36 cells."""
    order = orders.hilbert(2, 2, 3000)
    permutation = order.permutation(12000)
    assert permutation is not None
    assert sorted(permutation) == list(range(12000))
    check_round_trip(order, 12000)


CASES = [
    orders.identity(),
    orders.residue(3),
    orders.residue(4, period=16),
    orders.residue(3, period=10),
    orders.hilbert(8, 8),
]


@pytest.mark.parametrize("order", CASES, ids=repr)
def test_gradients_are_permuted_back(order: Order) -> None:
    x = torch.randn(2, 64, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order.permute, (x,))
    assert torch.autograd.gradcheck(order.invert, (x,))


@pytest.mark.parametrize("order", CASES, ids=repr)
def test_under_compile(order: Order) -> None:
    q, k = torch.randn(2, 64, 3), torch.randn(2, 64, 3)
    compiled = torch.compile(RoundTrip(order), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), q * k.sin())


@pytest.mark.parametrize("order", CASES, ids=repr)
def test_under_export(order: Order) -> None:
    q, k = torch.randn(2, 64, 3), torch.randn(2, 64, 3)
    exported = torch.export.export(RoundTrip(order), (q, k))
    torch.testing.assert_close(exported.module()(q, k), q * k.sin())
    # No tensor of the trace may remain in the cache.
    torch.testing.assert_close(order.permute(order.invert(q)), q)


def test_residue_of_dynamic_length() -> None:
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        RoundTrip(orders.residue(3, period=9)), fullgraph=True, dynamic=True, backend=graphs
    )
    for n in (18, 20, 7, 1, 133, 81, 9, 2, 64):
        q, k = torch.randn(2, n, 3), torch.randn(2, n, 3)
        torch.testing.assert_close(compiled(q, k), q * k.sin())
    # Complete periods (one or many), other lengths, and a single token.
    assert 1 <= graphs.frame_count <= 4


def test_hilbert_first_used_in_inference_mode() -> None:
    vars(indices.INDICES).clear()
    order = orders.hilbert(4, 8)
    with torch.inference_mode():
        order.permute(torch.randn(1, 32, 2))
    x = torch.randn(1, 32, 2, requires_grad=True)
    order.permute(x).sum().backward()
    assert x.grad is not None


def test_the_index_cache_is_bounded() -> None:
    for rows in range(2, 40):
        orders.hilbert(rows, 2).permute(torch.randn(rows * 2, 1))
    assert len(vars(indices.INDICES)) <= indices.MOST_INDICES


@pytest.mark.parametrize("order", [*CASES, orders.hilbert(2, 3, 4)], ids=repr)
def test_orders_are_values(order: Order) -> None:
    evaluated = eval(repr(order), vars(orders))
    assert evaluated == order
    assert hash(evaluated) == hash(order)
    assert len({*CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: orders.residue(0), ValueError, "rate must be at least 1; got 0"),
        (lambda: orders.residue(2, 0), ValueError, "period must be at least 1; got 0"),
        (
            lambda: orders.residue(1.5),  # type: ignore[arg-type]
            TypeError,
            "rate must be an integer; got float 1.5",
        ),
        (
            lambda: orders.hilbert(4),
            ValueError,
            r"hilbert orders grids of 2 or 3 axes; got 1 sizes \(4,\)",
        ),
        (lambda: orders.hilbert(4, 4, 4, 4), ValueError, "grids of 2 or 3 axes; got 4 sizes"),
        (lambda: orders.hilbert(4, 0), ValueError, "must be at least 1; got 0"),
        (
            lambda: orders.hilbert((4, 4)),  # type: ignore[arg-type]
            TypeError,
            "must be an integer; got tuple",
        ),
        (
            lambda: orders.hilbert(4, 4).permutation(15),
            ValueError,
            r"hilbert\(4, 4\) orders the 16 cells of its grid; got 15 tokens",
        ),
        (lambda: orders.hilbert(4, 4).permute(torch.zeros(15, 2)), ValueError, "got 15 tokens"),
        (lambda: orders.hilbert(4, 4).check(17), ValueError, "got 17 tokens"),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
