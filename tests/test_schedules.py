"""Schedules as data: every allowed pair once, nothing sent without need or twice, and few steps for many ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.masks import Mask
from compiled_dilated.programs import as_program
from compiled_dilated.regions import EMPTY, FULL, Regions
from compiled_dilated.ring.blocks import in_place
from compiled_dilated.ring.layouts import Contiguous, Layout
from compiled_dilated.ring.plans import layouts_of
from compiled_dilated.ring.schedules import Block, Schedule, regions
from tests import strategies
from tests.cases import grid_of
from tests.support.decoding import MASKS

HEADS, KV_HEADS = 4, 2


def inside(inner: range, outer: range) -> bool:
    return set(inner) <= set(outer)


def counts_of(schedule: Schedule) -> npt.NDArray[np.int64]:
    """How many branches allow each pair of places, (heads, tokens, tokens), by definition."""
    layout = schedule.layout
    permutation = layout.order.permutation(layout.tokens)
    at = np.arange(layout.tokens) if permutation is None else permutation
    out = np.zeros((schedule.heads, layout.tokens, layout.tokens), dtype=np.int64)
    for branch in schedule.program.branches:
        for head in branch.head_range(schedule.heads):
            out[head] += branch.mask_at(head, schedule.heads).allows(
                np.int64(0), np.int64(head), at[:, None], at[None, :]
            )
    return out


def scheduled(schedule: Schedule, blocks: Iterator[Block]) -> npt.NDArray[np.int64]:
    """How often each pair is computed."""
    tokens = schedule.layout.tokens
    out = np.zeros((schedule.heads, tokens, tokens), dtype=np.int64)
    for block in blocks:
        queries, keys = np.array(block.queries), np.array(block.keys)
        allowed = block.mask.allows(np.int64(0), np.int64(0), queries[:, None], keys[None, :])
        for head in block.heads.indices():
            out[head, queries[:, None], keys[None, :]] += allowed
    return out


def check_steps(schedule: Schedule) -> None:
    """Blocks and messages are about what their rank and their source hold; nothing is sent for nothing."""
    layout, group = schedule.layout, schedule.heads // schedule.kv_heads
    for rank in range(layout.ranks):
        steps = list(schedule.steps(rank))
        distances = [schedule.distance(rank, step.source) for step in steps]
        assert distances == sorted(set(distances))
        for step in steps:
            runs = layout.runs(step.source)
            assert step.blocks
            assert set(step.messages) == {block.message for block in step.blocks} - {None}
            assert len(set(step.messages)) == len(step.messages)
            assert all(any(inside(message.rows, run) for run in runs) for message in step.messages)
            for block in step.blocks:
                assert (block.message is None) == (step.source == rank)
                assert any(inside(block.queries, run) for run in layout.runs(rank))
                holders = runs if block.message is None else [block.message.rows]
                assert any(inside(block.keys, holder) for holder in holders)
                read = {head // group for head in block.heads.indices()}
                assert set(block.kv_heads.indices()) == read
                assert block.message is None or read <= set(block.message.kv_heads.indices())


def check_peers(schedule: Schedule) -> None:
    """Both ends of every transfer know of it: sources and targets leave out no step that there is."""
    ranks = range(schedule.layout.ranks)
    needed = {
        (rank, source)
        for rank in ranks
        for source in ranks
        if schedule.step(rank, source) is not None
    }
    for rank in ranks:
        sources, targets = schedule.sources(rank), schedule.targets(rank)
        assert {source for at, source in needed if at == rank} <= set(sources)
        assert {target for target, source in needed if source == rank} - {rank} <= set(targets)
        assert [schedule.distance(rank, source) for source in sources] == sorted(
            schedule.distance(rank, s) for s in set(sources)
        )
        assert [schedule.distance(t, rank) for t in targets] == sorted(
            schedule.distance(t, rank) for t in set(targets)
        )


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """One or two branches over a layout that is weighed for them, at most 30 tokens."""
    mask, order, tokens = draw(strategies.masks_and_orders(30))
    heads = st.sampled_from([None, (0, 3), (1, 4), "1/2"])
    branches = [Branch(mask, draw(heads), order)]
    if draw(st.booleans()):
        branches.append(
            Branch(draw(strategies.expressions(strategies.line_masks(30))), draw(heads))
        )
    program = Program(tuple(branches))
    layout = draw(
        st.sampled_from(layouts_of(program, tokens, draw(st.sampled_from((1, 2, 3, 5, 8)))))
    )
    return Schedule(program, layout, HEADS, KV_HEADS)


@settings(max_examples=30)
@given(schedules())
def test_every_pair_is_computed_once_for_each_branch_that_allows_it(schedule: Schedule) -> None:
    blocks = (
        block
        for rank in range(schedule.layout.ranks)
        for step in schedule.steps(rank)
        for block in step.blocks
    )
    assert (scheduled(schedule, blocks) == counts_of(schedule)).all()
    check_steps(schedule)
    check_peers(schedule)


PROGRAMS = [
    cd.longnet((8, 16, 32), (1, 2, 4)),
    cd.longnet((8, 16, 32), (1, 2, 4), causal=True),
    cd.longnet((8, 24), (1, 3), heads="split", offsets="grouped"),
    cd.longnet((7, 15), (3, 2), causal=True),
    cd.hilbert_window(grid_of(63), 2),
    as_program(masks.causal() & (masks.window(6) | masks.sinks(3))),
    as_program(masks.from_mod(strategies.by_head, within=masks.window(8))),
    Program(
        (
            Branch(masks.window(4)),
            Branch(masks.causal(), order=orders.residue(3)),
            Branch(masks.window(4)),
        )
    ),
]


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("program", PROGRAMS, ids=repr)
def test_schedules_of_named_programs(program: Program, ranks: int) -> None:
    for layout in layouts_of(program, 63, ranks):
        schedule = Schedule(program, layout, HEADS, KV_HEADS)
        blocks = (
            block for rank in range(ranks) for step in schedule.steps(rank) for block in step.blocks
        )
        assert (scheduled(schedule, blocks) == counts_of(schedule)).all()
        check_steps(schedule)
        check_peers(schedule)


@settings(max_examples=30)
@given(schedules(), st.data())
def test_a_block_in_place_is_the_same_block(schedule: Schedule, data: st.DataObject) -> None:
    """A block's own mask says of counted queries and keys, and of tiles of them, what the whole mask says of their places."""
    blocks = [
        block
        for rank in range(schedule.layout.ranks)
        for step in schedule.steps(rank)
        for block in step.blocks
    ]
    if not blocks:
        return
    block = data.draw(st.sampled_from(blocks))
    mask, offset = in_place(block.mask, block.queries, block.keys)
    q, kv = np.arange(len(block.queries)) + offset, np.arange(len(block.keys))
    zero = np.int64(0)
    got = np.broadcast_to(mask.allows(zero, zero, q[:, None], kv[None, :]), (len(q), len(kv)))
    want = block.mask.allows(
        zero, zero, np.array(block.queries)[:, None], np.array(block.keys)[None, :]
    )
    assert (got == want).all()
    for rows, columns in itertools.product(np.array_split(q, 2), np.array_split(kv, 2)):
        if len(rows) and len(columns):
            tile = got[np.ix_(rows - offset, columns)]
            sides = (Regions.contiguous([run[0]], [run[-1] + 1]) for run in (rows, columns))
            verdict = mask.classify(*sides)[0]
            assert not (verdict == EMPTY and tile.any())
            assert not (verdict == FULL and not tile.all())


# What a mask leaves of queries and keys


@st.composite
def spans(draw: st.DrawFn, tokens: int) -> range:
    start = draw(st.integers(0, tokens - 1))
    return range(
        start, draw(st.integers(start + 1, tokens)), draw(st.sampled_from((1, 1, 2, 3, 6)))
    )


def check_shrink(mask: Mask, q: range, kv: range) -> None:
    left_q, left_kv = mask.shrink(q, kv)
    assert inside(left_q, q)
    assert inside(left_kv, kv)
    allowed = strategies.dense(mask, 45, 45)[np.ix_(q, kv)]
    kept = np.isin(q, left_q)[:, None] & np.isin(kv, left_kv)[None, :]
    assert not (allowed & ~kept).any()


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@settings(max_examples=30)
@given(q=spans(45), kv=spans(45))
def test_shrink_keeps_every_allowed_pair(mask: Mask, q: range, kv: range) -> None:
    check_shrink(mask, q, kv)


@settings(max_examples=300)
@given(
    mask=strategies.expressions(strategies.line_masks(45) | strategies.mods()),
    q=spans(45),
    kv=spans(45),
)
def test_shrink_of_any_expression_keeps_every_allowed_pair(mask: Mask, q: range, kv: range) -> None:
    check_shrink(mask, q, kv)


# What is sent


def rows_received(schedule: Schedule, rank: int) -> Counter[tuple[int, int]]:
    """(key head, place) of everything that a rank is sent."""
    return Counter(
        (head, place)
        for step in schedule.steps(rank)
        for message in step.messages
        for head in message.kv_heads.indices()
        for place in message.rows
    )


def layouts_for(program: Program, tokens: int, ranks: int) -> list[Any]:
    return [
        pytest.param(program, layout, id=f"{layout.name}-{program}")
        for layout in layouts_of(program, tokens, ranks)
    ]


NESTED = cd.longnet((16, 32, 64), (1, 2, 4)), cd.longnet((16, 32, 64), (1, 2, 4), causal=True)


@pytest.mark.parametrize(
    ("program", "layout"), [each for program in NESTED for each in layouts_for(program, 256, 8)]
)
def test_nested_rates_receive_no_row_twice(program: Program, layout: Layout) -> None:
    for kv_heads in (HEADS, KV_HEADS):
        schedule = Schedule(program, layout, HEADS, kv_heads)
        for rank in range(layout.ranks):
            received = rows_received(schedule, rank)
            assert not received or max(received.values()) == 1


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 100, 200, 1000])
def test_a_causal_window_receives_only_visible_keys(window: int) -> None:
    """Rank p of shards of n tokens: the window's rows before its first token, in ceil(window / n) remote steps."""
    n, ranks = 64, 8
    schedule = Schedule(
        as_program(masks.causal() & masks.window(window)),
        Contiguous(n * ranks, ranks),
        HEADS,
        KV_HEADS,
    )
    for rank in range(ranks):
        assert rows_received(schedule, rank).total() == KV_HEADS * min(window, rank * n)
        assert len(list(schedule.steps(rank))) == 1 + min(-(-window // n), rank)


@pytest.mark.parametrize("ranks", [16, 64])
def test_longnet_moves_what_nested_rates_need(ranks: int) -> None:
    """A rank needs of each segment that is longer than its shard every r-th row, less those that a finer branch brought."""
    lengths, rates, tokens = (64, 256, 1024), (1, 4, 16), 4096
    n = tokens // ranks
    wider = zip(lengths, (n, *lengths[:-1]), rates, strict=True)
    optimum = HEADS * sum(max(0, length - max(before, n)) // rate for length, before, rate in wider)
    schedule = Schedule(cd.longnet(lengths, rates), Contiguous(tokens, ranks), HEADS, HEADS)
    for rank in range(0, ranks, 5):
        assert optimum <= rows_received(schedule, rank).total() <= 1.1 * optimum


# A quarter of a million ranks

MANY, TOKENS = 262_144, 2**30
BILLION = cd.longnet((2048, 4096, 8192), (1, 2, 4))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_billion_tokens_are_scheduled_rank_by_rank(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank asks for the steps of its own segment alone: two ranks of 4096 tokens hold one of 8192."""
    (chosen,) = layouts_of(BILLION, TOKENS, MANY, layout)
    schedule = Schedule(BILLION, chosen, HEADS, KV_HEADS)
    asked, blocks = set(), Schedule._blocks

    def noted(self: Schedule, rank: int, source: int) -> Iterator[Block]:
        asked.add((rank, source))
        return blocks(self, rank, source)

    monkeypatch.setattr(Schedule, "_blocks", noted)
    for rank in (0, 1, 131_071, 131_072, MANY - 1):
        asked.clear()
        segment = {rank // 2 * 2, rank // 2 * 2 + 1}
        assert {step.source for step in schedule.steps(rank)} == segment
        assert asked == {(rank, source) for source in segment}
        assert set(schedule.targets(rank)) == segment - {rank}


def test_regions_of_runs() -> None:
    made = regions([range(3, 10), range(4, 20, 5)])
    assert [(int(made.first[i]), int(made.last[i])) for i in range(2)] == [(3, 9), (4, 19)]
