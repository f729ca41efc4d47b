"""Tapes of score_mods and mask_mods against their graphs, and verdicts on blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_dilated.mods import trace_mask_mod
from tests import functions
from tests.functions import MASK_MODS, SCORE_MODS, Parameters
from tests.support.mods import reductions
from tests.support.tape import EMPTY, FULL, HEADS, PARTIAL, N, Native, compare_masks, compare_scores

DTYPES = st.sampled_from((torch.float32, torch.float64))
# Sizes of tiles: lanes and keys.
SIZES = st.sampled_from(
    ((16, 40), (1, 1), (8, 5), (64, 128), (40, 13), (4, 128), (64, 1), (24, 40))
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(native: Native, name: str, dtype: torch.dtype) -> None:
    for lanes, keys in ((16, 40), (7, 3)):
        compare_scores(native, SCORE_MODS[name](Parameters.of(HEADS, N, dtype)), lanes, keys, dtype)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(SCORE_MODS)), min_size=1, max_size=3, unique=True),
    DTYPES,
    DTYPES,
    SIZES,
    st.integers(0, 9),
)
def test_compositions_of_score_mods_equal_their_graph(
    native: Native,
    names: list[str],
    dtype: torch.dtype,
    of_tables: torch.dtype,
    size: tuple[int, int],
    seed: int,
) -> None:
    mod = functions.score_mod(names, Parameters.of(HEADS, N, of_tables))
    compare_scores(native, mod, *size, dtype, seed, tables=of_tables)


@pytest.mark.parametrize("name", reductions(torch.zeros(1, 1)))
def test_reductions(native: Native, name: str) -> None:
    rows = torch.randn(N, 5, dtype=torch.float64, requires_grad=True)
    compare_scores(native, reductions(rows)[name], 24, 40, torch.float64)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(MASK_MODS)), min_size=1, max_size=3, unique=True),
    st.sampled_from(("and", "or")),
    SIZES,
)
def test_mask_mods_and_their_blocks(
    native: Native, names: list[str], join: str, size: tuple[int, int]
) -> None:
    compare_masks(native, functions.mask_mod(names, Parameters.of(HEADS, N), join), *size)


# mask_mods, and the least number of 64 blocks of 8 x 8 that are decided.
BANDS: dict[str, tuple[Callable[..., Any], int]] = {
    "causal": (lambda b, h, i, j: i >= j, 64 - 8),
    "window": (lambda b, h, i, j: (i - j).abs() < 8, 64 - 22),
    "segments of positions": (lambda b, h, i, j: i // 8 == j // 8, 64),
    "quotient and remainder": (lambda b, h, i, j: (i // 8 >= j // 8) & (j % 8 < 4), 28),
    "float": (lambda b, h, i, j: (i - j).abs() * 0.125 <= 1.0, 64 - 22),
    "never": (lambda b, h, i, j: (i < 0) | (j > 1000), 64),
}


@pytest.mark.parametrize("name", BANDS)
def test_interval_arithmetic_classifies_blocks(native: Native, name: str) -> None:
    mod, least = BANDS[name]
    graph, operands = trace_mask_mod(mod)
    blocks = [range(start, start + 8) for start in range(0, 64, 8)]
    pairs = itertools.product(blocks, blocks)
    verdicts = [native.classify(graph, operands, q, k) for q, k in pairs]
    assert sum(verdict != PARTIAL for verdict in verdicts) >= least
    compare_masks(native, mod, 16, 40)


def test_blocks_of_tables(native: Native) -> None:
    """A block whose table entries are all equal is decided."""
    ids = torch.arange(N) // 8
    graph, operands = trace_mask_mod(lambda b, h, i, j: ids[i] == ids[j])
    assert native.classify(graph, operands, range(8, 16), range(8, 16)) == FULL
    assert native.classify(graph, operands, range(8, 16), range(16, 24)) == EMPTY
    assert native.classify(graph, operands, range(8, 17), range(8, 16)) == PARTIAL
