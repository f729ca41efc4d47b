"""Pictures of masks of any size: every pixel equals the dense mask."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import Branch, Program, counting, masks, orders
from compiled_dilated.masks import Mask
from compiled_dilated.pictures.pixels import MOST_PIXELS, cuts
from compiled_dilated.programs import as_program
from tests.cases import CASES, Case, document_ids, some_padding
from tests.support.pictures import dense, in_blocks
from tests.support.turns import one_in

SMALL = 129


def heads_of(title: str, heads: int) -> list[int]:
    """The heads that a panel's title lists."""
    if title.startswith("every"):
        return list(range(heads))
    return [int(number) for number in re.findall(r"\d+", title.partition(" of ")[0])]


# Pixels


@pytest.mark.parametrize("case", [case for case in CASES if SMALL in case.lengths], ids=str)
def test_pixels_of_few_tokens_are_the_dense_mask(case: Case) -> None:
    program, data = case.program(SMALL), case.inputs(SMALL, torch.float32).data
    expected = dense(program, case.heads, SMALL, SMALL, data)
    checked = 0
    for batch in (0, 1) if data else (0,):
        options: dict[str, Any] = {"data": data or None, "heads": case.heads, "batch": batch}
        panels = cd.show(program, SMALL, **options).panels
        # Of more than four kinds of heads only one is drawn.
        if len(panels) == 1:
            heads = range(case.heads)
            figures = [cd.show(program, SMALL, head=head, **options) for head in heads]
            panels = tuple(figure.panels[0] for figure in figures)
        for panel in panels:
            assert panel.pixels.is_single
            for head in heads_of(panel.title, case.heads):
                assert (panel.pixels.counts == expected[batch, head]).all()
                assert panel.pixels.pairs == expected[batch, head].sum()
                checked += 1
    assert checked >= case.heads


MANY = [case for case in CASES if max(case.lengths) > MOST_PIXELS]


@pytest.mark.parametrize("case", one_in(2, MANY))
def test_pixels_of_many_tokens_are_sums_of_the_dense_mask(case: Case) -> None:
    n = max(case.lengths)
    program, data = case.program(n), case.inputs(n, torch.float32).data
    batch, heads = 1 if data else 0, case.heads
    expected = dense(program, heads, n, n, data)[batch, -1]
    figure = cd.show(program, n, data=data or None, heads=heads, head=heads - 1, batch=batch)
    (panel,) = figure.panels
    size = int(cuts(n)[1])
    assert panel.pixels.size == (size, size)
    assert size > 1
    assert (panel.pixels.counts == in_blocks(expected, size, size)).all()
    assert panel.pixels.pairs == expected.sum()


@pytest.mark.parametrize(
    ("q_len", "kv_len", "q_offset"),
    [(1, 40, 39), (5, 400, 300), (300, 20, 0), (257, 256, 3), (1, 1, 0)],
)
def test_queries_and_keys_of_different_number(q_len: int, kv_len: int, q_offset: int) -> None:
    mask = masks.causal() & (masks.window(30) | masks.sinks(2))
    pixels = cd.show(mask, q_len, kv_len, q_offset=q_offset).panels[0].pixels
    expected = dense(mask, 8, q_len, kv_len, None, q_offset)[0, 0]
    assert (pixels.counts == in_blocks(expected, *pixels.size)).all()


@pytest.mark.parametrize("n", [36, 324])
@pytest.mark.parametrize("name", ["hilbert", "residue", "placed"])
def test_an_order_draws_its_places(n: int, name: str) -> None:
    side = round(n**0.5)
    order = {
        "hilbert": orders.hilbert(side, side),
        "residue": orders.residue(5),
        "placed": orders.hilbert(side - 1, side, offset=side),
    }[name]
    mask = masks.neighborhood((side, side), 2)
    places = order.permutation(n)
    assert places is not None
    pixels = cd.show(mask, n, order=order).panels[0].pixels
    expected = dense(mask, 1, n, n)[0, 0][places][:, places]
    assert (pixels.counts == in_blocks(expected, *pixels.size)).all()


def test_branches_orders_do_not_move_what_is_drawn() -> None:
    counts = cd.show(cd.hilbert_window((6, 6), 1), 36).panels[0].pixels.counts
    assert (counts == dense(masks.neighborhood((6, 6), 1), 1, 36, 36)[0, 0]).all()


# Data


def test_consecutive_documents_are_counted_at_a_million_tokens() -> None:
    n = 10**6
    ids = (torch.arange(n) // 1000)[None]
    panel = cd.show(masks.documents(ids="ids") & masks.causal(), n, data={"ids": ids}).panels[0]
    assert panel.pixels.pairs == 1000 * 1000 * 1001 // 2


@pytest.mark.parametrize("batch", [0, 1])
def test_data_of_an_entry_of_the_batch(batch: int) -> None:
    data = document_ids(2, 600) | some_padding(2, 600)
    data |= {"is_global": (torch.arange(600) % 97 == 5)[None]}
    mask = masks.documents(ids="documents") & masks.padding()
    mask = mask | masks.global_tokens(data="is_global")
    pixels = cd.show(mask, 600, data=data, batch=batch).panels[0].pixels
    expected = dense(mask, 1, 600, 600, data)[batch, 0]
    assert (pixels.counts == in_blocks(expected, *pixels.size)).all()


# Kinds of heads


def test_up_to_four_kinds_of_heads_are_drawn_side_by_side() -> None:
    figure = cd.show(masks.congruent(3, "cyclic"), 24, heads=7)
    assert figure.kinds == 3
    titles = [panel.title for panel in figure.panels]
    assert titles == ["heads 0, 3, 6 of 7", "heads 1, 4 of 7", "heads 2, 5 of 7"]
    assert "3 kinds of heads among 7" in figure.subheading


def test_head_0_is_drawn_of_more_than_four_kinds() -> None:
    figure = cd.show(masks.congruent(8, "cyclic"), 24)
    assert [panel.title for panel in figure.panels] == ["head 0 of 8"]
    assert "8 kinds of heads among 8" in str(figure)
    (panel,) = cd.show(masks.congruent(8, "cyclic"), 24, head=5).panels
    assert panel.pixels.counts[5, 13] == 1
    assert panel.pixels.pairs == 9


def test_a_head_in_no_branch_sees_nothing() -> None:
    program = Program((Branch(masks.causal(), heads=(1, 2)),))
    first, second = cd.show(program, 8, heads=2).panels
    assert first.title == "head 0 of 2: in no branch"
    assert first.pixels.pairs == 0
    assert second.pixels.pairs == 36


def test_branches_alone_and_their_sum() -> None:
    panels = cd.show(cd.longnet((4, 8), (1, 2)), 16, branches=True).panels
    titles = [panel.title.partition(":")[0] for panel in panels]
    assert titles == ["branch 0", "branch 1", "heads 0, 2, 4, 6 of 8"]
    assert (panels[0].pixels.counts + panels[1].pixels.counts == panels[2].pixels.counts).all()
    assert panels[2].pixels.counts.max() == 2


# Long sequences


@pytest.mark.parametrize(
    "program",
    [
        masks.causal() & (masks.window(1000) | masks.sinks(4)),
        cd.longnet((2048, 32768, 262144), (1, 2, 4), causal=True),
        masks.documents(lengths=(999,) * 1002) & masks.causal(),
        masks.random_blocks(2048, 3, 10**6),
        masks.neighborhood((1000, 1000), 7),
        pytest.param(
            masks.from_mod(lambda b, h, q, kv: (q + kv) % 3 == 0, within=masks.window(300)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sinks", "longnet", "documents", "random blocks", "grid", "function"],
)
def test_a_million_tokens_take_little_memory(program: Program | Mask) -> None:
    """The dense mask would have 10**12 pairs."""
    tracemalloc.start()
    figure = cd.show(program, 10**6, head=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (panel,) = figure.panels
    assert peak <= 128 * 2**20
    assert panel.pixels.counts.shape == (245, 245)
    branches = as_program(program).branches
    pairs = [counting.pairs(branch.mask_at(0, 8), 10**6, 10**6) for branch in branches]
    # A function has too many pairs to be counted: its pixels are estimated.
    if panel.pixels.pairs is None:
        assert "estimated from a sample" in panel.caption
        # A third of the 601 keys of each query's window.
        total = 10**6 * 601 / 3 if None in pairs else sum(number or 0 for number in pairs)
        assert panel.pixels.counts.sum() == pytest.approx(total, rel=0.02)
    else:
        assert panel.pixels.pairs == sum(number or 0 for number in pairs)


# Bad input

CAUSAL, IDS, PADDING = masks.causal(), masks.documents(ids="ids"), masks.padding()
INTEGERS, FLAGS = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool)
GRID = masks.neighborhood((4, 4), 1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((CAUSAL, 0), {}, "q_len must be at least 1; got 0"),
        ((CAUSAL, 4, 0), {}, "kv_len must be at least 1; got 0"),
        ((CAUSAL, 4), {"head": 8}, "head must be one of 8 heads, 0 to 7; got 8"),
        ((CAUSAL, 5), {"order": orders.hilbert(2, 2)}, "the 4 cells of its grid; got 5 tokens"),
        ((GRID, 17), {}, "speaks of a grid of 16 tokens"),
        ((IDS, 4), {}, r"reads the data tensors \['ids'\]; got \[\]"),
        ((CAUSAL, 4), {"data": {"ids": INTEGERS}}, r"tensors \[\]; got \['ids'\]"),
        ((IDS, 4), {"data": {"ids": INTEGERS[:, :3]}}, "at least 4 tokens"),
        ((PADDING, 4), {"data": {"padding": FLAGS}, "batch": 2}, "0 to 1; got 2"),
    ],
)
def test_bad_values_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cd.show(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, 4), {}, "expected a Program or a mask; got int"),
        ((CAUSAL, 4), {"order": "hilbert"}, "order must be an order; got str 'hilbert'"),
        ((CAUSAL, 4), {"branches": 1}, "branches must be True or False"),
        ((IDS, 4), {"data": {"ids": [[1]]}}, "must be a bool or integer tensor"),
        ((PADDING, 4), {"data": {"padding": INTEGERS}}, "must be a bool tensor"),
        ((PADDING, 4), {"data": FLAGS}, "data must be a dict of tensors"),
    ],
)
def test_bad_types_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cd.show(*arguments, **options)
