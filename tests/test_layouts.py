"""Layouts assign every token to one rank, evenly.

They find the owners of any places.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, orders
from compiled_dilated.orders import hilbert
from compiled_dilated.ring.layouts import ByResidue, Contiguous, Layout, Striped, Zigzag
from compiled_dilated.ring.plans import layouts_of


@st.composite
def layouts(draw: st.DrawFn, most: int = 200) -> Layout:
    """A layout of any numbers of tokens and ranks.

    They need not divide each other, and ranks may exceed tokens.
    """
    tokens, ranks = draw(st.integers(1, most)), draw(st.integers(1, 40))
    group = draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
    residues = ByResidue(tokens, ranks, draw(st.integers(1, 12)))
    contiguous, striped = Contiguous(tokens, ranks), Striped(tokens, ranks)
    return draw(st.sampled_from((contiguous, Zigzag(tokens, ranks, group), striped, residues)))


def shard(layout: Layout, rank: int) -> tuple[int, ...]:
    """The places of a rank."""
    return tuple(itertools.chain(*layout.runs(rank)))


def check_partition(layout: Layout) -> None:
    """Every token has one rank, and ranks have nearly equally many."""
    shards = [shard(layout, rank) for rank in range(layout.ranks)]
    assert sorted(itertools.chain(*shards)) == list(range(layout.tokens))
    for rank in range(layout.ranks):
        assert all(run and run.step >= 1 for run in layout.runs(rank))
    counts = [layout.count(rank) for rank in range(layout.ranks)]
    assert max(counts) - min(counts) <= (2 if isinstance(layout, Zigzag) else 1)


@settings(max_examples=100)
@given(layouts())
def test_layouts_partition_tokens_evenly(layout: Layout) -> None:
    check_partition(layout)


@pytest.mark.parametrize("ranks", [1, 2, 3, 16, 31, 128])
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 127, 128, 1009])
def test_few_tokens_primes_and_more_ranks_than_tokens(tokens: int, ranks: int) -> None:
    for layout in (
        Contiguous(tokens, ranks),
        Zigzag(tokens, ranks, ranks),
        Striped(tokens, ranks),
        ByResidue(tokens, ranks, 4),
    ):
        check_partition(layout)


@settings(max_examples=100)
@given(layouts(), st.integers(-5, 200), st.integers(0, 200), st.integers(1, 50))
def test_owners_contain_every_owner(layout: Layout, start: int, size: int, step: int) -> None:
    places = range(max(0, start), min(layout.tokens, start + size), step)
    listed = list(layout.owners(places))
    owners = {rank for rank in range(layout.ranks) if set(shard(layout, rank)) & set(places)}
    assert listed == sorted(set(listed))
    assert owners <= set(listed) <= set(range(layout.ranks))
    if step == 1 or isinstance(layout, Striped):
        assert owners == set(listed)


def test_owners_of_places_beyond_the_sequence() -> None:
    for layout in (Contiguous(20, 4), Zigzag(20, 4, 4), Striped(20, 4), ByResidue(20, 4, 3)):
        assert list(layout.owners(range(0))) == []
        assert set(layout.owners(range(100))) == {0, 1, 2, 3}


def test_the_figure() -> None:
    """The shards that the module's docstring draws."""
    figure = {
        Contiguous(16, 4): ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
        Zigzag(16, 4, 4): ((0, 1, 14, 15), (2, 3, 12, 13), (4, 5, 10, 11), (6, 7, 8, 9)),
        Striped(16, 4): ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
        ByResidue(16, 4, 2): ((0, 2, 4, 6), (8, 10, 12, 14), (1, 3, 5, 7), (9, 11, 13, 15)),
    }
    for layout, shards in figure.items():
        assert tuple(shard(layout, rank) for rank in range(4)) == shards


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_zigzag_groups_are_contiguous_and_balance_causal_work(group: int) -> None:
    layout, tokens = Zigzag(96, 6, group), 96 // 6 * group
    for first in range(0, 6, group):
        start = first * 16
        shards = [shard(layout, rank) for rank in range(first, first + group)]
        assert sorted(itertools.chain(*shards)) == list(range(start, start + tokens))
        # A causal query at place p of the group sees p + 1 of its keys.
        work = [sum(places) + (1 - start) * len(places) for places in shards]
        assert len(set(work)) == 1


@pytest.mark.parametrize("order", [orders.residue(3), hilbert(8, 6)], ids=repr)
def test_contiguous_along_an_order(order: orders.Order) -> None:
    layout = Contiguous(48, 5, order)
    check_partition(layout)
    assert layout.order == order
    assert layout.name == repr(order)


# Candidate layouts of a program

LONGNET = cd.longnet((16, 32), (1, 2), causal=True)


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (masks.causal(), ["contiguous", "zigzag", "striped"]),
        (masks.congruent(1), ["contiguous", "zigzag", "striped"]),
        (LONGNET, ["contiguous", "zigzag of 2", "striped", "residue 2"]),
        (cd.longnet((16, 48), (2, 3)), ["contiguous", "zigzag", "striped", "residue 3"]),
        (masks.neighborhood((8, 16), 2), ["contiguous", "zigzag", "striped", "hilbert(8, 16)"]),
        (masks.neighborhood((128,), 2), ["contiguous", "zigzag", "striped"]),
        (cd.hilbert_window((16, 8), 2), ["contiguous", "zigzag", "striped", "hilbert(16, 8)"]),
        (
            Program((Branch(masks.causal(), order=orders.residue(4)),)),
            ["contiguous", "zigzag", "striped", "residue(4)"],
        ),
    ],
    ids=repr,
)
def test_candidate_layouts(program: Program | masks.Mask, names: list[str]) -> None:
    program = program if isinstance(program, Program) else Program((Branch(program),))
    candidates = layouts_of(program, 128, 8)
    assert [layout.name for layout in candidates] == names
    assert all((layout.tokens, layout.ranks) == (128, 8) for layout in candidates)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("contiguous", Contiguous), ("zigzag", Zigzag), ("striped", Striped), ("residue", ByResidue)],
)
def test_a_layout_by_name(name: str, kind: type[Layout]) -> None:
    (layout,) = layouts_of(LONGNET, 64, 4, name)
    assert type(layout) is kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "residue",
            r"layout 'residue' needs a dilated program; .* names no residue. Use layout='auto'",
        ),
        (
            "hilbert",
            r"layout 'hilbert' needs a program over a grid of \d+ cells; .* names none. "
            "Use layout='auto'",
        ),
        (
            "snake",
            r"layout must be one of 'auto', 'contiguous', .*, 'hilbert'; got 'snake'",
        ),
    ],
)
def test_inapplicable_layouts_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layouts_of(Program((Branch(masks.causal()),)), 64, 4, name)
