"""Masks: allows, keys_of and period, against plain Python."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiled_dilated import masks
from compiled_dilated.masks import Mask
from tests import strategies
from tests.strategies import dense, every_third


def pairs(q_len: int, kv_len: int, allowed: Callable[[int, int], bool]) -> Any:
    out = np.empty((q_len, kv_len), dtype=bool)
    for i, j in np.ndindex(q_len, kv_len):
        out[i, j] = allowed(i, j)
    return out


def neighbors_on_a_placed_grid(i: int, j: int) -> bool:
    """neighborhood((3, 4), 1, offset=2) by its definition."""
    if not (2 <= i < 14 and 2 <= j < 14):
        return False
    rows, columns = (i - 2) // 4 - (j - 2) // 4, (i - 2) % 4 - (j - 2) % 4
    return abs(rows) < 2 and abs(columns) < 2


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        (masks.full(), lambda i, j: True),
        (masks.causal(), lambda i, j: j <= i),
        (masks.window(2), lambda i, j: -2 <= j - i <= 2),
        (masks.window(5, 1), lambda i, j: -5 <= j - i <= 1),
        (masks.window(6, 3, dilation=3), lambda i, j: -6 <= j - i <= 3 and (j - i) % 3 == 0),
        (masks.segments(4), lambda i, j: i // 4 == j // 4),
        (masks.congruent(3, 2), lambda i, j: i % 3 == j % 3 == 2),
        (masks.congruent(3, 1, period=7), lambda i, j: i % 7 % 3 == j % 7 % 3 == 1),
        (
            masks.documents(lengths=(3, 0, 4)),
            lambda i, j: (i < 3 and j < 3) or (3 <= i < 7 and 3 <= j < 7),
        ),
        (masks.sinks(2), lambda i, j: j < 2),
        (masks.prefix(3), lambda i, j: i < 3 and j < 3),
        (masks.global_tokens(3), lambda i, j: i < 3 or j < 3),
        (
            masks.tiles([(0, 1), (2, 0), (2, 0)], block=4),
            lambda i, j: (i // 4, j // 4) in ((0, 1), (2, 0)),
        ),
        (masks.tiles([], block=4), lambda i, j: False),
        (masks.global_tokens(positions=(2, 16, 90)), lambda i, j: i in (2, 16) or j in (2, 16)),
        (masks.block_window(4, 1, 0), lambda i, j: i // 4 - 1 <= j // 4 <= i // 4),
        (masks.neighborhood((3, 4), 1, offset=2), neighbors_on_a_placed_grid),
        (masks.from_mod(every_third), lambda i, j: (i + j) % 3 == 0),
        (
            masks.from_mod(every_third, within=masks.causal()),
            lambda i, j: (i + j) % 3 == 0 and j <= i,
        ),
        (masks.window(2) & ~masks.sinks(1), lambda i, j: abs(i - j) <= 2 and j >= 1),
        (masks.causal() | masks.prefix(5), lambda i, j: j <= i or (i < 5 and j < 5)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Mask) else "",
)
def test_allows(mask: Mask, allowed: Callable[[int, int], bool]) -> None:
    assert (dense(mask, 20, 17) == pairs(20, 17, allowed)).all()


def shifted(size: int, radius: int, dilation: int, i: int) -> list[int]:
    """NATTEN's neighbors of i on one axis.

    They are the nearest window in i's residue class.
    """
    members = [j for j in range(size) if j % dilation == i % dilation]
    start = max(0, min(members.index(i) - radius, len(members) - (2 * radius + 1)))
    return members[start : start + 2 * radius + 1]


@pytest.mark.parametrize("size", [1, 4, 7, 12])
@pytest.mark.parametrize("radius", [0, 1, 2, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
def test_shifted_edges(size: int, radius: int, dilation: int) -> None:
    mask = masks.neighborhood((size,), radius, dilation, edges="shift")
    expected = pairs(size, size, lambda i, j: j in shifted(size, radius, dilation, i))
    assert (dense(mask, size, size) == expected).all()


@pytest.mark.parametrize("edges", ["cut", "shift"])
def test_neighborhood_is_the_product_of_its_axes(edges: str) -> None:
    grid, radius, dilation, causal = (4, 5, 6), (1, 2, 1), (1, 1, 2), (False, True, False)
    mask = masks.neighborhood(grid, radius, dilation, causal, edges)
    axes = []
    for size, reach, gap, back in zip(grid, radius, dilation, causal, strict=True):
        line = masks.neighborhood((size,), reach, gap, back, edges)
        axes.append(dense(line, size, size))
    expected = np.einsum("ab,cd,ef->acebdf", *axes).reshape(120, 120)
    assert (dense(mask, 120, 120) == expected).all()


def test_causal_axis_is_cut_even_where_others_shift() -> None:
    mask = masks.neighborhood((6,), 2, causal=True, edges="shift")
    assert (dense(mask, 6, 6) == pairs(6, 6, lambda i, j: 0 <= i - j <= 2)).all()


def test_data_masks() -> None:
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    hidden = torch.tensor([[False, False, False, True], [False, True, False, False]])
    b, h = torch.arange(2)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    q, kv = torch.arange(4)[None, None, :, None], torch.arange(4)[None, None, None, :]
    seen = masks.documents(ids="d").allows(b, h, q, kv, {"d": ids})
    assert torch.equal(seen[:, 0], ids[:, :, None] == ids[:, None, :])
    seen = masks.padding().allows(b, h, q, kv, {"padding": hidden})
    assert torch.equal(seen[:, 0], ~hidden[:, None, :].expand(2, 4, 4))
    with pytest.raises(ValueError, match="reads the data tensor 'd'; got nothing"):
        masks.documents(ids="d").allows(b, h, q, kv)


@given(strategies.masks_and_orders())
def test_torch_and_numpy_agree(case: tuple[Mask, Any, int]) -> None:
    mask, _, n = case
    zero, positions = torch.tensor(0), torch.arange(n)
    seen = mask.allows(zero, zero, positions[:, None], positions[None, :])
    assert seen.dtype == torch.bool
    assert (seen.broadcast_to(n, n).numpy() == dense(mask, n, n)).all()
    # With tables on the device, and positions of 32 bits.
    on_device, positions = mask.on("cpu"), positions.int()
    assert on_device == mask
    seen = on_device.allows(zero, zero, positions[:, None], positions[None, :])
    assert (seen.broadcast_to(n, n).numpy() == dense(mask, n, n)).all()


@given(st.data())
def test_shifting_by_the_period_changes_nothing(data: st.DataObject) -> None:
    mask = data.draw(strategies.expressions(strategies.line_masks(12)))
    period = mask.period
    if period is not None and period <= 500:
        longer = dense(mask, 40 + period, 40 + period)
        assert (dense(mask, 40, 40) == longer[period:, period:]).all()


@given(st.data())
def test_keys_of(data: st.DataObject) -> None:
    mask = data.draw(strategies.expressions(strategies.line_masks()))
    n, q = data.draw(st.integers(1, 64)), data.draw(st.integers(0, 64))
    ranges = mask.keys_of(q, n)
    if ranges is not None:
        seen = list(itertools.chain(*ranges))
        assert len(seen) == len(set(seen))
        assert sorted(seen) == np.flatnonzero(dense(mask, 1, n, q_offset=q)[0]).tolist()
