"""Masks: classify never contradicts the dense mask, allows says what the definition says, and masks are values."""

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

from compiled_dilated import masks, orders
from compiled_dilated.masks import Mask
from compiled_dilated.regions import EMPTY, FULL, PARTIAL, Regions
from tests import strategies
from tests.strategies import by_head, dense, every_third

DOCUMENTS = masks.documents(lengths=(7, 0, 20, 5))

# Masks whose classify is exact on contiguous tiles.
EXACT = [
    masks.full(),
    masks.causal(),
    masks.window(9),
    masks.window(3, 12),
    masks.window(11, dilation=3),
    masks.window(0, 17, dilation=5),
    masks.segments(12),
    masks.congruent(3, 1),
    masks.congruent(4, 3, period=16),
    DOCUMENTS,
    masks.sinks(5),
    masks.prefix(13),
    masks.global_tokens(6),
    masks.global_tokens(positions=(0, 17, 18, 19, 20, 40)),
    masks.block_window(5, 1, 2),
    masks.tiles([(0, 1), (1, 1), (2, 0), (2, 1)], block=8),
    masks.random_blocks(6, 3, 48),
    masks.neighborhood((30,), 4, offset=5),
]


def verdict_of(seen: Any) -> Any:
    return FULL if seen.all() else PARTIAL if seen.any() else EMPTY


def contiguous_tiles(n: int, tile: int) -> Regions:
    starts = np.arange(0, n, tile)
    return Regions.contiguous(starts, np.minimum(starts + tile, n))


def check_classify(mask: Mask, truth: Any, q: Regions, kv: Regions, exact: bool = False) -> None:
    """All pairs of the regions of q and of kv against the dense truth."""
    rows, columns = (axis.reshape(-1) for axis in np.indices((len(q), len(kv))))
    verdicts = mask.classify(q[rows], kv[columns])
    assert verdicts.dtype == np.uint8
    assert verdicts.shape == rows.shape
    for row, column, verdict in zip(rows, columns, verdicts, strict=True):
        seen = truth[np.ix_(q.positions(row), kv.positions(column))]
        assert verdict in ((verdict_of(seen),) if exact else (verdict_of(seen), PARTIAL)), (mask, q[[row]], kv[[column]])


# classify ------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_classify_is_sound(data: st.DataObject) -> None:
    mask, _, n = data.draw(strategies.masks_and_orders())
    q, kv = data.draw(strategies.regions(n, 6)), data.draw(strategies.regions(n, 6))
    check_classify(mask, dense(mask, n, n), q, kv)


@given(st.data())
def test_classify_is_sound_on_boxes(data: st.DataObject) -> None:
    grid = data.draw(strategies.grids())
    n = math.prod(grid)
    mask = data.draw(strategies.expressions(strategies.grid_masks(grid) | strategies.line_masks()))
    q, kv = data.draw(strategies.regions(n, 6, grid)), data.draw(strategies.regions(n, 6, grid))
    check_classify(mask, dense(mask, n, n), q, kv)


@pytest.mark.parametrize("mask", EXACT, ids=repr)
@pytest.mark.parametrize("tile", [1, 4, 7, 16])
def test_classify_is_exact_on_contiguous_tiles(mask: Mask, tile: int) -> None:
    check_classify(mask, dense(mask, 48, 41), contiguous_tiles(48, tile), contiguous_tiles(41, tile), exact=True)


@pytest.mark.parametrize(("width", "rate"), [(16, 2), (12, 3), (16, 3), (24, 4), (5, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_dilated_branch_is_exact_in_residue_order(width: int, rate: int, causal: bool) -> None:
    """LongNet's branches become whole tiles where a tile holds one class of one segment."""
    n, order = 3 * width + 2, orders.residue(rate, period=width)
    place = np.arange(n)
    for offset in range(rate):
        mask = masks.segments(width) & masks.congruent(rate, offset, period=width)
        mask = mask & masks.causal() if causal else mask
        check_classify(
            mask, dense(mask, n, n), order.regions(place, place + 1, n), order.regions(place, place + 1, n), exact=True
        )
        # Whole classes: the first longer ones of a segment hold one token more.
        starts = np.cumsum([0] + [len(range(c, width, rate)) for c in range(rate)])
        starts = starts[:-1][np.diff(starts) > 0]
        stops = np.append(starts[1:], width)
        segments = np.arange(3)[:, None] * width
        tiles = order.regions((segments + starts).reshape(-1), (segments + stops).reshape(-1), n)
        check_classify(mask, dense(mask, n, n), tiles, tiles, exact=True)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("edges", ["cut", "shift"])
def test_neighborhood_is_exact_on_boxes(dilation: int, edges: str) -> None:
    grid, side = (12, 16), 4
    mask = masks.neighborhood(grid, 3 if dilation == 1 else 1, dilation, edges=edges)
    corners = [row * 16 + column for row in range(0, 12, side) for column in range(0, 16, side)]
    boxes = Regions(np.array(corners), np.full((len(corners), 2), side), np.tile([16, 1], (len(corners), 1)))
    truth = dense(mask, 192, 192)
    rows, columns = (axis.reshape(-1) for axis in np.indices((len(boxes), len(boxes))))
    verdicts = mask.classify(boxes[rows], boxes[columns])
    for row, column, verdict in zip(rows, columns, verdicts, strict=True):
        seen = truth[np.ix_(boxes.positions(row), boxes.positions(column))]
        # The shifted window's reach is bounded per tile, so a tile that is seen may be called PARTIAL; never one that is not.
        assert (verdict == EMPTY) == (not seen.any())
        if edges == "cut":
            assert verdict == verdict_of(seen)


def test_data_masks_classify_as_partial() -> None:
    q = contiguous_tiles(20, 5)
    for mask in (masks.documents(ids="d"), masks.padding(), masks.global_tokens(data="d")):
        assert (mask.classify(q, q) == PARTIAL).all()
        assert ((mask & masks.sinks(0)).classify(q, q) == EMPTY).all()


def test_from_mod_is_exact_on_small_tiles() -> None:
    for mask in (masks.from_mod(every_third), masks.from_mod(every_third, within=masks.segments(12))):
        check_classify(mask, dense(mask, 48, 48), contiguous_tiles(48, 1), contiguous_tiles(48, 4), exact=True)
    for head in range(3):
        mine = masks.from_mod(by_head).at_head(head, 3)
        check_classify(mine, dense(mine, 24, 24, head=head), contiguous_tiles(24, 1), contiguous_tiles(24, 2), exact=True)


def test_from_mod_that_reads_the_batch_classifies_as_partial() -> None:
    def by_batch(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return q - q < b

    tiles = contiguous_tiles(8, 4)
    assert (masks.from_mod(by_batch).classify(tiles, tiles) == PARTIAL).all()


# allows --------------------------------------------------------------------------------------------------------------


def pairs(q_len: int, kv_len: int, allowed: Callable[[int, int], bool]) -> Any:
    return np.array([[allowed(i, j) for j in range(kv_len)] for i in range(q_len)])


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
        (masks.documents(lengths=(3, 0, 4)), lambda i, j: (i < 3 and j < 3) or (3 <= i < 7 and 3 <= j < 7)),
        (masks.sinks(2), lambda i, j: j < 2),
        (masks.prefix(3), lambda i, j: i < 3 and j < 3),
        (masks.global_tokens(3), lambda i, j: i < 3 or j < 3),
        (masks.tiles([(0, 1), (2, 0), (2, 0)], block=4), lambda i, j: (i // 4, j // 4) in ((0, 1), (2, 0))),
        (masks.tiles([], block=4), lambda i, j: False),
        (masks.global_tokens(positions=(2, 16, 90)), lambda i, j: i in (2, 16) or j in (2, 16)),
        (masks.block_window(4, 1, 0), lambda i, j: i // 4 - 1 <= j // 4 <= i // 4),
        (
            masks.neighborhood((3, 4), 1, offset=2),
            lambda i, j: (
                2 <= i < 14 and 2 <= j < 14 and abs((i - 2) // 4 - (j - 2) // 4) < 2 and abs((i - 2) % 4 - (j - 2) % 4) < 2
            ),
        ),
        (masks.from_mod(every_third), lambda i, j: (i + j) % 3 == 0),
        (masks.from_mod(every_third, within=masks.causal()), lambda i, j: (i + j) % 3 == 0 and j <= i),
        (masks.window(2) & ~masks.sinks(1), lambda i, j: abs(i - j) <= 2 and j >= 1),
        (masks.causal() | masks.prefix(5), lambda i, j: j <= i or (i < 5 and j < 5)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Mask) else "",
)
def test_allows(mask: Mask, allowed: Callable[[int, int], bool]) -> None:
    assert (dense(mask, 20, 17) == pairs(20, 17, allowed)).all()


def shifted(size: int, radius: int, dilation: int, i: int) -> list[int]:
    """NATTEN's neighbours of i on one axis, by its definition: the window nearest to i in the list of i's own residue class."""
    members = [j for j in range(size) if j % dilation == i % dilation]
    start = max(0, min(members.index(i) - radius, len(members) - (2 * radius + 1)))
    return members[start : start + 2 * radius + 1]


@pytest.mark.parametrize("size", [1, 4, 7, 12])
@pytest.mark.parametrize("radius", [0, 1, 2, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
def test_shifted_edges(size: int, radius: int, dilation: int) -> None:
    mask = masks.neighborhood((size,), radius, dilation, edges="shift")
    assert (dense(mask, size, size) == pairs(size, size, lambda i, j: j in shifted(size, radius, dilation, i))).all()


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
    zero = torch.tensor(0)
    seen = mask.allows(zero, zero, torch.arange(n)[:, None], torch.arange(n)[None, :])
    assert seen.dtype == torch.bool
    assert (seen.broadcast_to(n, n).numpy() == dense(mask, n, n)).all()
    on_device = mask.on("cpu")
    assert on_device == mask
    seen = on_device.allows(zero, zero, torch.arange(n, dtype=torch.int32)[:, None], torch.arange(n, dtype=torch.int32)[None, :])
    assert (seen.broadcast_to(n, n).numpy() == dense(mask, n, n)).all()


@given(st.data())
def test_masks_are_invariant_under_their_period(data: st.DataObject) -> None:
    mask = data.draw(strategies.expressions(strategies.line_masks(12)))
    if mask.period is not None and mask.period <= 500:
        assert (dense(mask, 40, 40) == dense(mask, 40 + mask.period, 40 + mask.period)[mask.period :, mask.period :]).all()


@given(st.data())
def test_keys_of(data: st.DataObject) -> None:
    mask = data.draw(strategies.expressions(strategies.line_masks()))
    n, q = data.draw(st.integers(1, 64)), data.draw(st.integers(0, 64))
    ranges = mask.keys_of(q, n)
    if ranges is not None:
        seen = [key for each in ranges for key in each]
        assert len(seen) == len(set(seen))
        assert sorted(seen) == np.flatnonzero(dense(mask, 1, n, q_offset=q)[0]).tolist()


# Algebra -------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_algebra(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    leaves = strategies.expressions(strategies.line_masks())
    a, b = data.draw(leaves), data.draw(leaves)
    x, y = dense(a, n, n), dense(b, n, n)
    assert (dense(a & b, n, n) == (x & y)).all()
    assert (dense(a | b, n, n) == (x | y)).all()
    assert (dense(~a, n, n) == ~x).all()
    assert (dense(~~a, n, n) == x).all()
    assert (dense(~(a & b), n, n) == dense(~a | ~b, n, n)).all()
    assert (dense(~(a | b), n, n) == dense(~a & ~b, n, n)).all()
    assert (dense(masks.conjunction(masks.conjuncts(a & b)), n, n) == (x & y)).all()


def test_double_negation_is_the_mask_itself() -> None:
    mask = masks.window(3)
    assert ~~mask is mask


# Values --------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_repr_is_code(data: st.DataObject) -> None:
    grid = data.draw(strategies.grids())
    mask = data.draw(strategies.expressions(strategies.line_masks() | strategies.grid_masks(grid)))
    again = eval(repr(mask), {name: getattr(masks, name) for name in masks.__all__})
    n = math.prod(grid)
    assert (dense(again, n, n) == dense(mask, n, n)).all()
    assert repr(again) == repr(mask)
    assert again == mask
    assert hash(again) == hash(mask)


@pytest.mark.parametrize(
    "mask",
    [
        masks.congruent(4, (0, 3, 1)),
        masks.congruent(4, "cyclic", period=9),
        masks.documents(ids="d"),
        masks.padding(),
        masks.padding("pad"),
        masks.tiles([(0, 0), (3, 1)], block=8, columns=5),
        masks.global_tokens(data="d"),
    ],
    ids=repr,
)
def test_repr_of_the_others(mask: Mask) -> None:
    again = eval(repr(mask), {name: getattr(masks, name) for name in masks.__all__})
    assert again == mask
    assert hash(again) == hash(mask)


def test_different_masks_differ() -> None:
    different = [
        *EXACT,
        masks.window(9, 8),
        masks.window(9, dilation=2),
        masks.congruent(3, 2),
        masks.congruent(3, 1, period=9),
        masks.sinks(13),
        masks.causal() & masks.window(9),
        masks.causal() | masks.window(9),
        ~masks.causal(),
        masks.neighborhood((4, 4), 1),
        masks.neighborhood((4, 4), 1, edges="shift"),
        masks.padding(),
        masks.documents(ids="d"),
        masks.global_tokens(data="d"),
        masks.neighborhood((4, 4), 1, offset=0),
        masks.neighborhood((4, 4), 1, offset=1),
        masks.from_mod(every_third),
        masks.from_mod(by_head),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    "combine",
    [lambda a, b: a and b, lambda a, b: a or b, lambda a, b: not a, lambda a, b: 1 if a else 2],
    ids=["and", "or", "not", "if"],
)
def test_truth_value_is_refused(combine: Callable[[Mask, Mask], Any]) -> None:
    with pytest.raises(TypeError, match=r"Write `a & b`, `a \| b` or `~a`"):
        combine(masks.causal(), masks.window(2))


@pytest.mark.parametrize("combine", [operator.and_, operator.or_], ids=["and", "or"])
def test_operands_must_be_masks(combine: Callable[[Mask, Any], Any]) -> None:
    with pytest.raises(TypeError, match="joins two masks; got int 3"):
        combine(masks.causal(), 3)


def test_names() -> None:
    assert (masks.padding("p") & masks.documents(ids="d") | ~masks.padding("p")).names == ("d", "p")
    assert masks.window(3).names == ()


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ("cyclic", [0, 1, 2, 0, 1, 2, 0]),
        ("grouped", [0, 0, 0, 1, 1, 1, 2]),
        ((2, 2, 0, 1, 0, 1, 2), [2, 2, 0, 1, 0, 1, 2]),
        (1, [1] * 7),
    ],
)
def test_offsets_of_heads(offset: Any, expected: list[int]) -> None:
    mask = masks.segments(6) & masks.congruent(3, offset, period=6)
    for head, value in enumerate(expected):
        mine = masks.segments(6) & masks.congruent(3, value, period=6)
        assert mask.at_head(head, 7) == mine
        truth = dense(mine, 20, 20)
        assert (dense(mask.for_heads(7), 20, 20, head=head) == truth).all()
        if offset != "grouped":
            assert (dense(mask, 20, 20, head=head) == truth).all()
    tiles = contiguous_tiles(20, 3)
    for form in (mask, mask.for_heads(7)):
        for value in set(expected):
            mine = masks.segments(6) & masks.congruent(3, value, period=6)
            check_classify(form, dense(mine, 20, 20), tiles, tiles)


def test_heads_reach_every_part() -> None:
    mask = ~(masks.congruent(2, "cyclic") | masks.from_mod(by_head, within=masks.congruent(3, "grouped")))
    for head in range(4):
        at = mask.at_head(head, 4)
        assert (dense(at, 12, 12) == dense(mask.for_heads(4), 12, 12, head=head)).all()
    assert len({mask.at_head(head, 4) for head in range(4)}) == 4
    assert masks.window(3).at_head(1, 4) == masks.window(3)


def test_an_offset_rule_needs_the_number_of_heads() -> None:
    with pytest.raises(ValueError, match="depends on the number of heads"):
        dense(masks.congruent(3, "grouped"), 4, 4)
    with pytest.raises(ValueError, match="names 2 offsets for 3 heads"):
        masks.congruent(3, (0, 1)).at_head(0, 3)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.window(-1), ValueError, "left must be at least 0; got -1"),
        (lambda: masks.window(2.5), TypeError, "left must be an integer; got float 2.5"),
        (lambda: masks.window(True), TypeError, "left must be an integer; got bool"),
        (lambda: masks.window(2, -1), ValueError, "right must be at least 0"),
        (lambda: masks.window(2, dilation=0), ValueError, "dilation must be at least 1"),
        (lambda: masks.segments(0), ValueError, "length must be at least 1"),
        (lambda: masks.congruent(0), ValueError, "modulus must be at least 1"),
        (lambda: masks.congruent(3, 3), ValueError, "offset must be below the modulus 3; got 3"),
        (lambda: masks.congruent(3, (0, 4)), ValueError, "offset must be below the modulus 3"),
        (lambda: masks.congruent(3, "round"), ValueError, "offset must be one of 'cyclic', 'grouped'; got 'round'"),
        (lambda: masks.congruent(3, 0, period=0), ValueError, "period must be at least 1"),
        (lambda: masks.documents(), ValueError, "either ids .* or lengths"),
        (lambda: masks.documents(ids="a", lengths=(1,)), ValueError, "either ids .* or lengths"),
        (lambda: masks.documents(ids=torch.zeros(3)), TypeError, "ids must be the name of a data tensor; got Tensor"),
        (lambda: masks.documents(lengths=()), ValueError, "lengths is empty"),
        (lambda: masks.documents(lengths=5), TypeError, "lengths must be a sequence of integers"),
        (lambda: masks.padding(torch.zeros(3)), TypeError, "name must be the name of a data tensor; got Tensor"),
        (lambda: masks.sinks(-1), ValueError, "count must be at least 0"),
        (lambda: masks.neighborhood((4, 4, 4, 4), 1), ValueError, "grid must have 1 to 3 axes"),
        (lambda: masks.neighborhood(16, 1), TypeError, "grid must be a sequence of integers"),
        (lambda: masks.neighborhood((4, 4), (1, 1, 1)), ValueError, "radius must be one number or one per axis"),
        (lambda: masks.neighborhood((4, 4), 1, edges="wrap"), ValueError, "edges must be one of 'cut', 'shift'; got 'wrap'"),
        (lambda: masks.neighborhood((4, 4), 1, causal=(True,)), ValueError, "causal must be a bool or one bool per axis"),
        (lambda: masks.neighborhood((4, 4), 1, causal=None), ValueError, "causal must be a bool or one bool per axis"),
        (lambda: masks.tiles([(1, 2, 3)]), ValueError, "every tile must be a .query tile, key tile. pair"),
        (lambda: masks.tiles([(0, -1)]), ValueError, "must be at least 0"),
        (lambda: masks.tiles("ab"), TypeError, "pairs must be .query tile, key tile. pairs"),
        (lambda: masks.tiles([(0, 3)], columns=2), ValueError, "columns must be at least 4"),
        (lambda: masks.from_mod(3), TypeError, "fn must be a function of"),
        (lambda: masks.from_mod(every_third, within=3), TypeError, "within must be a mask; got int"),
        (lambda: masks.from_mod(every_third).check(range(10**6), 10**6), ValueError, "from_mod.fn, within=mask."),
        (
            lambda: masks.neighborhood((4, 4), 1).check(range(17), 4),
            ValueError,
            "speaks of a grid of 16 tokens; got positions up to 17",
        ),
        (lambda: (masks.causal() & masks.neighborhood((4, 4), 1)).check(range(17), 4), ValueError, "grid of 16 tokens"),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
