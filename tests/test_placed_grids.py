"""Neighborhoods and Hilbert orders on grids between other tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

import compiled_dilated as cd
from compiled_dilated import Branch, Program, counting, masks, orders, text
from compiled_dilated.modules import visible
from compiled_dilated.orders import Order
from compiled_dilated.programs import as_program
from compiled_dilated.tiles import TileMap
from tests import strategies
from tests.comparing import assert_close, exact_results, normal
from tests.strategies import dense
from tests.support.orders import RoundTrip


@given(st.data())
def test_a_placed_neighborhood_is_the_plain_one_between_empty_rows(data: st.DataObject) -> None:
    grid = data.draw(strategies.grids())
    plain = data.draw(strategies.grid_masks(grid))
    before, after = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    cells = math.prod(grid)
    n = before + cells + after
    expected = np.zeros((n, n), dtype=np.bool_)
    expected[before : before + cells, before : before + cells] = dense(plain, cells, cells)
    mask = strategies.placed(plain, before)
    assert (dense(mask, n, n) == expected).all()
    assert (dense(mask.expanded(), n, n) == expected).all()
    assert counting.pairs(mask, n, n) == expected.sum()
    shorter = n - data.draw(st.integers(0, n - 1))
    assert counting.pairs(mask, shorter, shorter) == expected[:shorter, :shorter].sum()


def test_neighborhoods_with_an_offset_accept_any_length() -> None:
    for offset in (0, 3):
        mask = masks.neighborhood((4, 5), 1, offset=offset)
        assert not mask.is_bounded
        as_program(mask).check(1000, 1000)
        assert not dense(mask, 60, 60)[offset + 20 :].any()


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_verdicts_of_a_placed_grid_are_those_of_a_plain_one(offset: int) -> None:
    plain, placed = masks.neighborhood((32, 32), 3), masks.neighborhood((32, 32), 3, offset=offset)
    starts = np.arange(0, 1024, 64)
    boxes = orders.hilbert(32, 32).regions(starts, starts + 64, 1024)
    starts = starts + offset
    placed_boxes = orders.hilbert(32, 32, offset=offset).regions(starts, starts + 64, 1030)
    assert (placed_boxes.base - offset == boxes.base).all()
    rows, columns = (axis.reshape(-1) for axis in np.indices((16, 16)))
    expected = plain.classify(boxes[rows], boxes[columns])
    assert (placed.classify(placed_boxes[rows], placed_boxes[columns]) == expected).all()


def test_a_class_token_costs_few_tiles() -> None:
    """An image of 64 x 64 patches and one token before it."""
    plain = masks.neighborhood((64, 64), 7)
    mask = masks.neighborhood((64, 64), 7, offset=1) | masks.global_tokens(1)
    order = orders.hilbert(64, 64, offset=1)
    with_token = TileMap.build(mask, 4097, 4097, q_tile=128, kv_tile=128, order=order)
    order = orders.hilbert(64, 64)
    without = TileMap.build(plain, 4096, 4096, q_tile=128, kv_tile=128, order=order)
    assert len(with_token.indices) < 1.5 * len(without.indices)
    pairs = counting.pairs(plain, 4096, 4096)
    assert pairs is not None
    assert counting.pairs(mask, 4097, 4097) == pairs + 2 * 4097 - 1


def test_pairs_of_a_large_placed_grid_beside_global_tokens_are_counted() -> None:
    plain, n = masks.neighborhood((1024, 1024), 5), 2**20
    pairs = plain.pairs(range(n), range(n))
    assert pairs is not None
    mask = masks.neighborhood((1024, 1024), 5, offset=4) | masks.global_tokens(4)
    assert counting.pairs(mask, n + 4, n + 4) == pairs + 2 * 4 * (n + 4) - 16


# Orders


ORDERS: list[Order] = [
    orders.hilbert(8, 7, offset=0),
    orders.hilbert(8, 7, offset=5),
    orders.hilbert(2, 4, 7, offset=1),
]


@pytest.mark.parametrize("order", ORDERS, ids=repr)
@pytest.mark.parametrize("after", [0, 1, 6])
def test_other_tokens_keep_their_places(order: Order, after: int) -> None:
    assert isinstance(order, orders.PlacedHilbert)
    n = order.tokens.stop + after
    permutation = order.permutation(n)
    inside = order.hilbert.permutation(len(order.tokens))
    assert permutation is not None
    assert inside is not None
    outside = [i for i in range(n) if i not in order.tokens]
    assert permutation[outside].tolist() == outside
    image = permutation[order.tokens.start : order.tokens.stop]
    assert np.array_equal(image, inside + order.offset)
    x = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    for dim in (-2, 1):
        assert torch.equal(order.permute(x, dim), x[:, torch.from_numpy(permutation)])
        assert torch.equal(order.invert(order.permute(x, dim), dim), x)
    assert torch.equal(order.permute(x.transpose(1, 2), -1), order.permute(x).transpose(1, 2))
    assert torch.autograd.gradcheck(order.permute, (x,))


@pytest.mark.parametrize("order", ORDERS, ids=repr)
def test_orders_are_values(order: Order) -> None:
    assert text.read_order(repr(order)) == order
    assert len({*ORDERS, orders.hilbert(8, 7), orders.hilbert(2, 4, 7)}) == 5


@pytest.mark.parametrize("dynamic", [None, True])
def test_orders_under_compile(dynamic: bool | None) -> None:
    """Of other lengths too, which makes the length vary in the graph."""
    torch.compiler.reset()
    compiled = torch.compile(
        RoundTrip(ORDERS[1]), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for n in (61, 70, 75):
        q, k = torch.randn(2, n, 3), torch.randn(2, n, 3)
        torch.testing.assert_close(compiled(q, k), q * k.sin())


# Programs


def test_hilbert_window_within() -> None:
    assert cd.hilbert_window((6, 9), 2, offset=1) == Program(
        (Branch(masks.neighborhood((6, 9), 2, offset=1), order=orders.hilbert(6, 9, offset=1)),)
    )


@pytest.mark.parametrize("lowering", ["auto", "tiled", "dense"])
def test_an_image_with_registers(lowering: str) -> None:
    """Registers are global tokens; the Hilbert order changes no result."""
    mask = masks.neighborhood((9, 12), 2, offset=4) | masks.global_tokens(4)
    inputs = normal((2, 2, 114, 8), (2, 1, 114, 8), (2, 1, 114, 8))
    expected = exact_results(mask, *inputs)
    assert_close([cd.compile(mask, lowering=lowering)(*inputs)], expected)
    ordered = Program((Branch(mask, order=orders.hilbert(9, 12, offset=4)),))
    assert_close([cd.compile(ordered, lowering=lowering)(*inputs)], expected)


@pytest.mark.parametrize(
    "program",
    [masks.neighborhood((5, 6), 1, offset=2), cd.hilbert_window((5, 6), 1, offset=2)],
    ids=repr,
)
def test_texts_padding_pictures_and_block_masks(program: Any) -> None:
    program = as_program(program)
    operands: list[torch.Tensor] = []
    assert text.read(text.write(program, operands), operands) == program
    assert text.read_program(repr(program)) == program
    x = torch.randn(1, 2, 40, 8, dtype=torch.float64)
    padded, data = visible(program), {"padding": torch.arange(40)[None] > 25}
    assert isinstance(padded, Program)
    out = cd.compile(padded)(x, x, x, data=data)
    assert_close([out], exact_results(padded, x, x, x, data=data))
    (panel,) = cd.show(program, 40).panels
    branch = program.branches[0]
    assert panel.pixels.pairs == dense(branch.mask, 40, 40).sum()
    block_mask = cd.block_mask(branch.mask, 40, 40, tile=8, order=branch.order)
    y = branch.order.permute(x)
    out = branch.order.invert(flex_attention(y, y, y, block_mask=block_mask))
    assert_close([out], exact_results(program, x, x, x))


@pytest.mark.parametrize("join", [operator.or_, operator.and_], ids=["or", "and"])
@pytest.mark.parametrize("reversed_operands", [False, True])
@pytest.mark.parametrize(
    "value", [cd.hilbert_window((4, 4), 1), Branch(masks.causal())], ids=["program", "branch"]
)
def test_programs_say_how_masks_are_joined(
    join: Callable[[Any, Any], Any], reversed_operands: bool, value: Any
) -> None:
    message = r"got (Program|Branch) .*Join masks before a program is made of them, as masks\."
    for operand in (masks.global_tokens(16), value):
        operands = (operand, value) if reversed_operands else (value, operand)
        with pytest.raises(TypeError, match=message):
            join(*operands)
    with pytest.raises(TypeError, match="Join masks before a program is made"):
        operator.invert(value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: masks.neighborhood((4, 4), 1, offset=-1),
            ValueError,
            "offset must be at least 0; got -1",
        ),
        (
            lambda: masks.neighborhood((4, 4), 1, offset=1.0),  # type: ignore[arg-type]
            TypeError,
            "offset must be an integer; got float 1.0",
        ),
        (
            lambda: masks.neighborhood((4, 4), 1, offset=2**60),
            ValueError,
            "the last position of the grid must be at most 2..60",
        ),
        (
            lambda: as_program(masks.neighborhood((4, 4), 1)).check(17, 17),
            ValueError,
            "a grid of 16 tokens; got positions up to 17.*offset=0, or offset=1",
        ),
        (
            lambda: cd.hilbert_window((4, 4), 1).check(17, 17),
            ValueError,
            "got positions up to 17.*offset=",
        ),
        (
            lambda: cd.hilbert_window((4, 4), 1).check(15, 15),
            ValueError,
            "the 16 cells of its grid; got 15 tokens.*offset=",
        ),
        (
            lambda: cd.hilbert_window((4, 4), 1, offset=1).check(16, 16),
            ValueError,
            r"hilbert\(4, 4, offset=1\) orders the 16 cells .* from position 1 on; got 16 tokens",
        ),
        (lambda: orders.hilbert(4, 4, offset=-2), ValueError, "offset must be at least 0; got -2"),
        (
            lambda: orders.hilbert(4, 4, offset=1).permute(torch.zeros(16, 2)),
            ValueError,
            "from position 1 on; got 16 tokens",
        ),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
