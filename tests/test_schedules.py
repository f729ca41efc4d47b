"""Schedules as data: every allowed pair once, no needless row.

No row is sent twice.
"""

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
from compiled_dilated.ring.extents import regions
from compiled_dilated.ring.layouts import Contiguous, Layout
from compiled_dilated.ring.plans import layouts_of
from compiled_dilated.ring.schedules import Schedule
from compiled_dilated.ring.steps import Block
from tests import strategies
from tests.cases import grid_of
from tests.support.decoding import MASKS
from tests.support.turns import in_turn

HEADS, KV_HEADS = 4, 2


def inside(inner: range, outer: range) -> bool:
    return set(inner) <= set(outer)


def counts_of(schedule: Schedule) -> npt.NDArray[np.int64]:
    """Branches that allow each pair of places, by definition.

    Counts (heads, tokens, tokens).
    """
    layout = schedule.layout
    permutation = layout.order.permutation(layout.tokens)
    positions = np.arange(layout.tokens) if permutation is None else permutation
    out = np.zeros((schedule.heads, layout.tokens, layout.tokens), dtype=np.int64)
    for branch in schedule.program.branches:
        for head in branch.head_range(schedule.heads):
            out[head] += branch.mask_at(head, schedule.heads).allows(
                np.int64(0), np.int64(head), positions[:, None], positions[None, :]
            )
    return out


def blocks_of(schedule: Schedule) -> Iterator[Block]:
    """The blocks of all steps of all ranks."""
    for rank in range(schedule.layout.ranks):
        for step in schedule.steps(rank):
            yield from step.blocks


def scheduled_counts_of(schedule: Schedule) -> npt.NDArray[np.int64]:
    """Number of times that each pair is computed, (heads, tokens, tokens)."""
    tokens = schedule.layout.tokens
    out = np.zeros((schedule.heads, tokens, tokens), dtype=np.int64)
    for block in blocks_of(schedule):
        queries, keys = np.array(block.queries), np.array(block.keys)
        allowed = block.mask.allows(np.int64(0), np.int64(0), queries[:, None], keys[None, :])
        for head in block.heads.indices():
            out[head, queries[:, None], keys[None, :]] += allowed
    return out


def check_steps(schedule: Schedule) -> None:
    """Check that ranks compute their own queries.

    The keys are their own or received.
    """
    layout = schedule.layout
    for rank in range(layout.ranks):
        steps = list(schedule.steps(rank))
        distances = [schedule.distance(rank, step.source) for step in steps]
        assert distances == sorted(set(distances))
        for step in steps:
            # Every message is read, sent once, and part of a run of its source.
            assert step.blocks
            assert set(step.messages) == {block.message for block in step.blocks} - {None}
            assert len(set(step.messages)) == len(step.messages)
            for message in step.messages:
                assert any(inside(message.rows, run) for run in layout.runs(step.source))
            for block in step.blocks:
                assert (block.message is None) == (step.source == rank)
                assert any(inside(block.queries, run) for run in layout.runs(rank))
                check_keys(schedule, step.source, block)


def check_keys(schedule: Schedule, source: int, block: Block) -> None:
    """Check that a block's keys and key heads are present.

    They are in its message, or in the rank's own rows.
    """
    group = schedule.heads // schedule.kv_heads
    kv_heads = set(block.kv_heads.indices())
    assert kv_heads == {head // group for head in block.heads.indices()}
    if block.message is None:
        assert any(inside(block.keys, run) for run in schedule.layout.runs(source))
    else:
        assert inside(block.keys, block.message.rows)
        assert kv_heads <= set(block.message.kv_heads.indices())


def check_peers(schedule: Schedule) -> None:
    """Check the sources and targets of all steps, by distance."""
    ranks = range(schedule.layout.ranks)
    for rank in ranks:
        sources, targets = schedule.sources(rank), schedule.targets(rank)
        for peer in ranks:
            if schedule.step(rank, peer) is not None:
                assert peer in sources
            if peer != rank and schedule.step(peer, rank) is not None:
                assert peer in targets
        distances = [schedule.distance(rank, source) for source in sources]
        assert distances == sorted(set(distances))
        distances = [schedule.distance(target, rank) for target in targets]
        assert distances == sorted(set(distances))


def check(schedule: Schedule) -> None:
    """Check counts, steps and peers of a schedule."""
    assert (scheduled_counts_of(schedule) == counts_of(schedule)).all()
    check_steps(schedule)
    check_peers(schedule)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """One or two branches over a candidate layout, at most 30 tokens."""
    mask, order, tokens = draw(strategies.masks_and_orders(30))
    heads = st.sampled_from([None, (0, 3), (1, 4), "1/2"])
    branches = [Branch(mask, draw(heads), order)]
    if draw(st.booleans()):
        second_mask = draw(strategies.expressions(strategies.line_masks(30)))
        branches.append(Branch(second_mask, draw(heads)))
    program = Program(tuple(branches))
    ranks = draw(st.sampled_from((1, 2, 3, 5, 8)))
    layout = draw(st.sampled_from(layouts_of(program, tokens, ranks)))
    return Schedule(program, layout, HEADS, KV_HEADS)


@settings(max_examples=30)
@given(schedules())
def test_every_pair_is_computed_once_for_each_branch_that_allows_it(schedule: Schedule) -> None:
    check(schedule)


WINDOW = Branch(masks.window(4))
PROGRAMS = [
    cd.longnet((8, 16, 32), (1, 2, 4)),
    cd.longnet((8, 16, 32), (1, 2, 4), causal=True),
    cd.longnet((8, 24), (1, 3), heads="split", offsets="grouped"),
    cd.longnet((7, 15), (3, 2), causal=True),
    cd.hilbert_window(grid_of(63), 2),
    as_program(masks.causal() & (masks.window(6) | masks.sinks(3))),
    as_program(masks.from_mod(strategies.by_head, within=masks.window(8))),
    Program((WINDOW, Branch(masks.causal(), order=orders.residue(3)), WINDOW)),
]


@pytest.mark.parametrize(("program", "ranks"), in_turn(PROGRAMS, (2, 5, 1), name=repr))
def test_schedules_of_named_programs(program: Program, ranks: int) -> None:
    for layout in layouts_of(program, 63, ranks):
        check(Schedule(program, layout, HEADS, KV_HEADS))


@settings(max_examples=30)
@given(schedules(), st.data())
def test_a_block_in_place_is_the_same_block(schedule: Schedule, data: st.DataObject) -> None:
    """The mask over indices from 0 allows the original's pairs.

    The original allows them at its places.
    """
    blocks = list(blocks_of(schedule))
    if not blocks:
        return
    block = data.draw(st.sampled_from(blocks))
    mask, offset = in_place(block.mask, block.queries, block.keys)
    q, kv = np.arange(len(block.queries)) + offset, np.arange(len(block.keys))
    allowed = allowed_pairs(mask, q, kv)
    places = np.array(block.queries), np.array(block.keys)
    assert (allowed == allowed_pairs(block.mask, *places)).all()
    # Verdicts on tiles agree with the pairs.
    for rows, columns in itertools.product(np.array_split(q, 2), np.array_split(kv, 2)):
        if len(rows) and len(columns):
            tile = allowed[np.ix_(rows - offset, columns)]
            sides = (Regions.contiguous([run[0]], [run[-1] + 1]) for run in (rows, columns))
            verdict = mask.classify(*sides)[0]
            assert not (verdict == EMPTY and tile.any())
            assert not (verdict == FULL and not tile.all())


def allowed_pairs(
    mask: Mask, q: npt.NDArray[np.int64], kv: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Pairs that a mask allows, (queries, keys).

    They are of the first batch entry and head.
    """
    zero = np.int64(0)
    allowed = mask.allows(zero, zero, q[:, None], kv[None, :])
    return np.broadcast_to(allowed, (len(q), len(kv)))


# Queries and keys without those that a mask hides


@st.composite
def spans(draw: st.DrawFn, tokens: int) -> range:
    start = draw(st.integers(0, tokens - 1))
    stop = draw(st.integers(start + 1, tokens))
    return range(start, stop, draw(st.sampled_from((1, 1, 2, 3, 6))))


def check_shrink(mask: Mask, q: range, kv: range) -> None:
    """Check that ranges are narrowed, and that no allowed pair is lost."""
    narrow_q, narrow_kv = mask.shrink(q, kv)
    assert inside(narrow_q, q)
    assert inside(narrow_kv, kv)
    allowed = strategies.dense(mask, 45, 45)[np.ix_(q, kv)]
    remaining = np.isin(q, narrow_q)[:, None] & np.isin(kv, narrow_kv)[None, :]
    assert not (allowed & ~remaining).any()


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


# Messages


def rows_received(schedule: Schedule, rank: int) -> Counter[tuple[int, int]]:
    """(key head, place) of all rows that a rank receives, counted."""
    received: Counter[tuple[int, int]] = Counter()
    for step in schedule.steps(rank):
        for message in step.messages:
            received.update(itertools.product(message.kv_heads.indices(), message.rows))
    return received


def programs_and_layouts() -> Iterator[Any]:
    """Programs with nested rates, over all of their layouts."""
    for causal in (False, True):
        program = cd.longnet((16, 32, 64), (1, 2, 4), causal=causal)
        for layout in layouts_of(program, 256, 8):
            yield pytest.param(program, layout, id=f"{layout.name}-{program}")


@pytest.mark.parametrize(("program", "layout"), list(programs_and_layouts()))
def test_nested_rates_receive_no_row_twice(program: Program, layout: Layout) -> None:
    for kv_heads in (HEADS, KV_HEADS):
        schedule = Schedule(program, layout, HEADS, kv_heads)
        for rank in range(layout.ranks):
            received = rows_received(schedule, rank)
            assert not received or max(received.values()) == 1


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 100, 200, 1000])
def test_a_causal_window_receives_only_visible_keys(window: int) -> None:
    """A rank receives the window's rows before its first token.

    The rows come in ceil(window / n) remote steps.
    """
    n, ranks = 64, 8
    program = as_program(masks.causal() & masks.window(window))
    schedule = Schedule(program, Contiguous(n * ranks, ranks), HEADS, KV_HEADS)
    for rank in range(ranks):
        assert rows_received(schedule, rank).total() == KV_HEADS * min(window, rank * n)
        assert len(list(schedule.steps(rank))) == 1 + min(-(-window // n), rank)


@pytest.mark.parametrize("ranks", [16, 64])
def test_longnet_moves_what_nested_rates_need(ranks: int) -> None:
    """Every r-th row of segments longer than a shard moves.

    The rows of finer branches do not.
    """
    lengths, rates, tokens = (64, 256, 1024), (1, 4, 16), 4096
    rows, covered = 0, tokens // ranks
    for length, rate in zip(lengths, rates, strict=True):
        rows += max(0, length - covered) // rate
        covered = max(covered, length)
    optimum = HEADS * rows
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
    """Only steps within the rank's segment are computed.

    A segment of 8192 tokens lies on two ranks of 4096.
    """
    (chosen,) = layouts_of(BILLION, TOKENS, MANY, layout)
    schedule = Schedule(BILLION, chosen, HEADS, KV_HEADS)
    computed, blocks = set(), Schedule._blocks

    def recording(self: Schedule, rank: int, source: int) -> Iterator[Block]:
        computed.add((rank, source))
        return blocks(self, rank, source)

    monkeypatch.setattr(Schedule, "_blocks", recording)
    for rank in (0, 1, 131_071, 131_072, MANY - 1):
        computed.clear()
        segment = {rank // 2 * 2, rank // 2 * 2 + 1}
        assert {step.source for step in schedule.steps(rank)} == segment
        assert computed == {(rank, source) for source in segment}
        assert set(schedule.targets(rank)) == segment - {rank}


def test_regions_of_runs() -> None:
    bounds = regions([range(3, 10), range(4, 20, 5)])
    assert [int(first) for first in bounds.first] == [3, 4]
    assert [int(last) for last in bounds.last] == [9, 19]
