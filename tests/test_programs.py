"""Programs: heads of a branch, published programs, density of block_sparse."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import (
    Branch,
    Program,
    block_sparse,
    hilbert_window,
    local_window,
    longnet,
    masks,
)
from compiled_dilated.masks import (
    causal,
    congruent,
    dilated_blocks,
    global_tokens,
    neighborhood,
    segments,
    tiles,
    window,
)
from compiled_dilated.masks.core import Or
from compiled_dilated.orders import hilbert, identity, residue
from compiled_dilated.programs import as_program
from compiled_dilated.reference import multiplicity
from tests.cases import CASES, Case


@pytest.mark.parametrize(
    ("heads", "of", "expected"),
    [
        (None, 5, range(5)),
        ((1, 3), 5, range(1, 3)),
        ((2, 2), 5, range(2, 2)),
        ("0/2", 5, range(3)),
        ("1/2", 5, range(3, 5)),
        ("0/3", 8, range(3)),
        ("1/3", 8, range(3, 6)),
        ("2/3", 8, range(6, 8)),
        ("0/3", 2, range(1)),
        ("2/3", 2, range(2, 2)),
    ],
)
def test_head_ranges(heads: Any, of: int, expected: range) -> None:
    assert Branch(masks.full(), heads).head_range(of) == expected


@given(heads=st.integers(0, 64), shares=st.integers(1, 9))
def test_shares_have_every_head_once(heads: int, shares: int) -> None:
    ranges = [Branch(masks.full(), f"{i}/{shares}").head_range(heads) for i in range(shares)]
    assert list(itertools.chain(*ranges)) == list(range(heads))
    sizes = [len(heads_of_share) for heads_of_share in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_heads_with_equal_offsets_have_equal_masks() -> None:
    (branch,) = longnet((8,), (3,)).branches
    cyclic = [branch.mask_at(head, 7) for head in range(7)]
    assert cyclic[0] == cyclic[3] == cyclic[6]
    assert len(set(cyclic)) == 3
    (branch,) = longnet((8,), (3,), offsets="grouped").branches
    grouped = [branch.mask_at(head, 7) for head in range(7)]
    assert grouped == [cyclic[offset] for offset in (0, 0, 0, 1, 1, 1, 2)]


# Values: equal, hashable, printed as code

NAMES = {name: getattr(masks, name) for name in masks.__all__}
NAMES |= {"Program": Program, "Branch": Branch}
NAMES |= {"identity": identity, "residue": residue, "hilbert": hilbert}


@pytest.mark.parametrize("case", [case for case in CASES if "from_mod" not in case.name], ids=str)
def test_programs_print_as_their_code(case: Case) -> None:
    n = case.lengths[-1]
    program = as_program(case.program(n))
    evaluated = eval(repr(program), dict(NAMES))
    assert evaluated == program == as_program(case.program(n))
    assert hash(evaluated) == hash(program)
    assert repr(evaluated) == repr(program)


def test_programs_of_other_arguments_differ() -> None:
    programs = [
        longnet((8, 16), (1, 2)),
        longnet((8, 16), (1, 2), causal=True),
        longnet((8, 16), (1, 2), offsets="grouped"),
        longnet((8, 16), (1, 2), heads="split"),
        longnet((16, 8), (2, 1)),
        Program((Branch(window(8)),)),
        Program((Branch(window(8), order=residue(2)),)),
        Program((Branch(window(8), heads=(0, 1)),)),
    ]
    assert len(set(programs)) == len(programs)


def test_an_attend_prints_as_its_code() -> None:
    attend = cd.compile(causal() & window(9), lowering="tiled")
    assert repr(attend) == "compile(Program((Branch(causal() & window(9)),)), lowering='tiled')"
    assert eval(repr(attend), {**NAMES, "compile": cd.compile}).program == attend.program
    assert repr(cd.compile(window(3))) == "compile(Program((Branch(window(3)),)))"


# Published programs


def test_longnet() -> None:
    assert longnet((2048, 4096), (1, 2), causal=True) == Program(
        (
            Branch(segments(2048) & causal()),
            Branch(segments(4096) & congruent(2, "cyclic", period=4096) & causal()),
        )
    )
    assert longnet([8, 8], [3, 5], heads="split") == Program(
        (
            Branch(segments(8) & congruent(3, 0, period=8), "0/2"),
            Branch(segments(8) & congruent(5, 1, period=8), "1/2"),
        )
    )


@pytest.mark.parametrize("offsets", ["cyclic", "grouped"])
@pytest.mark.parametrize("rates", [(1, 2, 4), (3, 5, 7)])
def test_every_token_sees_itself_in_some_head(rates: tuple[int, ...], offsets: str) -> None:
    """The offsets of all heads together are all residues.

    There are as many heads as the largest rate.
    """
    program = longnet((16, 32, 64), rates, causal=True, offsets=offsets)
    q = torch.zeros(1, 7, 100, 1)
    counts = multiplicity(program, q, q)
    assert (counts.diagonal(dim1=-2, dim2=-1).sum(dim=1) > 0).all()
    assert (counts.tril() == counts).all()


def test_local_window() -> None:
    assert local_window(4) == as_program(window(4))
    assert local_window(4, 1, dilation=3) == as_program(window(4, 1, 3))
    assert local_window(4, causal=True) == local_window(4, 0) == local_window(4, 0, causal=True)


def test_hilbert_window() -> None:
    assert hilbert_window((6, 9), 2) == Program(
        (Branch(neighborhood((6, 9), 2), order=hilbert(6, 9)),)
    )
    assert hilbert_window([2, 3, 4], (1, 1, 2), edges="shift") == Program(
        (Branch(neighborhood((2, 3, 4), (1, 1, 2), edges="shift"), order=hilbert(2, 3, 4)),)
    )


def density_of(program: Program, tokens: int) -> float:
    """The share of pairs that the program links."""
    q = torch.zeros(1, 1, tokens, 1)
    return float(multiplicity(program, q, q).double().mean())


@given(tokens=st.integers(1, 200), density=st.floats(0.0, 1.0, exclude_min=True))
def test_a_local_block_sparse_program_keeps_its_density(tokens: int, density: float) -> None:
    share = density_of(block_sparse(density, tokens=tokens), tokens)
    # One token of window more or less is up to 2 * tokens pairs; the diagonal is always visible.
    assert abs(share - max(density, 1 / tokens)) <= 1 / tokens + 1e-12


@given(tokens=st.integers(20, 200), density=st.floats(0.3, 1.0), block=st.integers(1, 5))
def test_global_and_local_keep_their_density(tokens: int, density: float, block: int) -> None:
    try:
        program = block_sparse(density, "global_local", block=block, tokens=tokens)
    except ValueError:
        assert density * tokens**2 < 2 * block * tokens - block**2 + tokens - block
        return
    assert abs(density_of(program, tokens) - density) <= 1 / tokens + 1e-12
    mask = program.branches[0].mask
    assert isinstance(mask, Or)
    assert mask.masks[0] == global_tokens(block)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_global_tokens_that_are_all_tokens(tokens: int) -> None:
    assert density_of(block_sparse(1.0, "global_local", block=8, tokens=tokens), tokens) == 1.0


@pytest.mark.parametrize(
    ("density", "stride"), [(0.25, 4), (0.5, 2), (1.0, 1), (0.1, 10), (1 / 3, 3)]
)
def test_dilated_blocks_keep_their_density(density: float, stride: int) -> None:
    program = block_sparse(density, "dilated", block=4)
    assert program == as_program(dilated_blocks(4, stride))
    assert math.isclose(density_of(program, 4 * stride * 3), density)


def test_tiles_keep_their_density() -> None:
    program = block_sparse(3 / 16, "tiles", block=8, tokens=32, tiles=[(0, 0), (1, 3), (3, 1)])
    assert program == as_program(tiles([(0, 0), (1, 3), (3, 1)], 8))
    assert math.isclose(density_of(program, 32), 3 / 16)
    # The last tile is short: 8 x 8 and 2 x 2 pairs of 10 x 10.
    program = block_sparse(0.68, "tiles", block=8, tokens=10, tiles=[(0, 0), (1, 1)])
    assert math.isclose(density_of(program, 10), 0.68)


def test_density_is_that_before_causal() -> None:
    full, past = block_sparse(0.2, tokens=100), block_sparse(0.2, tokens=100, causal=True)
    assert past == as_program(masks.conjunction((full.branches[0].mask, causal())))
    assert density_of(past, 100) < 0.6 * density_of(full, 100)


# Checks


def test_names_are_those_of_all_branches() -> None:
    program = Program(
        (
            Branch(masks.padding("pad") & causal()),
            Branch(masks.documents(ids="ids")),
            Branch(~masks.padding("pad")),
        )
    )
    assert program.names == ("ids", "pad")
    assert longnet((4,), (1,)).names == ()


def test_lengths_that_do_not_fit_are_refused() -> None:
    grid = hilbert_window((4, 5), 1)
    grid.check(20, 20)
    message = r"hilbert\(4, 5\) orders one sequence; got 1 queries at offset 19 and 20 keys"
    with pytest.raises(ValueError, match=message):
        grid.check(1, 20, q_offset=19)
    with pytest.raises(ValueError, match="orders the 20 cells of its grid; got 19 tokens"):
        Program((Branch(window(3), order=hilbert(4, 5)),)).check(19, 19)
    as_program(neighborhood((4, 5), 1)).check(1, 20, q_offset=19)
    with pytest.raises(ValueError, match="a grid of 20 tokens; got positions up to 21"):
        as_program(neighborhood((4, 5), 1)).check(1, 20, q_offset=20)
