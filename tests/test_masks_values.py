"""Masks as values: algebra, repr, equality, names, heads."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_dilated import masks
from compiled_dilated.masks import Mask
from tests import strategies
from tests.strategies import by_head, dense, every_third
from tests.support.masks import EXACT, check_classify, contiguous_tiles


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
def test_repr_of_per_head_and_data_masks_is_code(mask: Mask) -> None:
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
        of_head = masks.segments(6) & masks.congruent(3, value, period=6)
        assert mask.at_head(head, 7) == of_head
        truth = dense(of_head, 20, 20)
        assert (dense(mask.for_heads(7), 20, 20, head=head) == truth).all()
        if offset != "grouped":
            assert (dense(mask, 20, 20, head=head) == truth).all()
    tiles = contiguous_tiles(20, 3)
    for form in (mask, mask.for_heads(7)):
        for value in set(expected):
            of_head = masks.segments(6) & masks.congruent(3, value, period=6)
            check_classify(form, dense(of_head, 20, 20), tiles, tiles)


def test_at_head_applies_to_every_part() -> None:
    mask = ~(
        masks.congruent(2, "cyclic") | masks.from_mod(by_head, within=masks.congruent(3, "grouped"))
    )
    for head in range(4):
        of_head = mask.at_head(head, 4)
        assert (dense(of_head, 12, 12) == dense(mask.for_heads(4), 12, 12, head=head)).all()
    assert len({mask.at_head(head, 4) for head in range(4)}) == 4
    assert masks.window(3).at_head(1, 4) == masks.window(3)


def test_per_head_rule_without_head_count_raises() -> None:
    with pytest.raises(ValueError, match="depends on the number of heads"):
        dense(masks.congruent(3, "grouped"), 4, 4)
    with pytest.raises(ValueError, match="names 2 offsets for 3 heads"):
        masks.congruent(3, (0, 1)).at_head(0, 3)
