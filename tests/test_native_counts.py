"""Native kernels: counted pairs and tiles, and the share of useful work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.lowerings.native import _TYPES
from compiled_dilated.masks import Mask
from compiled_dilated.native.encode import encode
from compiled_dilated.programs import Program, as_program
from compiled_dilated.reference import multiplicity
from tests.cases import CASES, Case
from tests.support.native import counts_of, executed, ops, problem_of

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


@pytest.mark.parametrize("case", CASES[1::8], ids=str)
def test_counts_are_what_is_executed(case: Case, threads: Callable[[int], None]) -> None:
    n = case.lengths[-1]
    program = as_program(case.program(n))
    shapes = [None, (n // 2, n, n // 3), (n, n // 2, 0)] if case.crossed and n < 400 else [None]
    for shape in shapes:
        problem, inputs = problem_of(case, n, torch.float32, shape)
        counted = counts_of(problem)
        counts = multiplicity(
            program, inputs.q, inputs.k, q_offset=problem.q_offset, data=inputs.data
        )
        assert int(counts.sum()) <= counted[0], "an allowed pair is not computed"
        # Pairs whose mask is not evaluated are allowed, except lanes past a tile's last query.
        assert counted[1] <= counted[0]
        for count in (1, 3):
            threads(count)
            assert executed(problem) == counted


def share(program: Program | Mask, n: int, heads: int) -> float:
    """The share of allowed pairs among computed pairs, for n tokens."""
    program = as_program(program)
    sizes = [1, heads, 1, n, n, 16, 16, _TYPES["float32"]]
    counts = ops.native_counts(None, None, encode(program, heads), sizes, 0, None)
    computed = int(counts[0])
    if isinstance(program.branches[0].mask, masks.Tiles):
        tiles = program.branches[0].mask
        return len(tiles.keys) * tiles.block**2 / computed
    useful, keys = 0, torch.arange(n)
    for branch in program.branches:
        for head in branch.head_range(heads):
            mask = branch.mask_at(head, heads)
            for start in range(0, n, 512):
                queries = torch.arange(start, min(n, start + 512))[:, None]
                allowed = mask.allows(torch.tensor(0), torch.tensor(head), queries, keys)
                useful += int(allowed.expand(len(queries), n).sum())
    return useful / computed


def listed_tiles(block: int, n: int) -> Mask:
    rows, tiles = n // block, list[tuple[int, int]]()
    for row in range(rows):
        tiles += [(row, column) for column in {row, row * 7 % rows, 0}]
    return masks.tiles(tiles, block)


LENGTHS = (1000, 24, 1500, 572, 1000)
# Tokens, and the least share for vectors of 16 queries, which are the longest.
SHARES: dict[str, tuple[Program | Mask, int, float]] = {
    "full": (masks.full(), 4096, 1.0),
    "causal": (masks.causal(), 4096, 0.99),
    "window 256": (masks.window(256), 4096, 0.96),
    "window 256 back": (masks.window(256, 0), 4096, 0.93),
    "window 32": (masks.window(32), 4096, 0.78),
    "window dilated": (masks.window(256, dilation=4), 4096, 0.87),
    "window dilated 64": (masks.window(64 * 16, dilation=64), 4096, 0.7),
    "window dilated 127": (masks.window(127 * 16, dilation=127), 4096, 0.6),
    "window dilated 300": (masks.window(300 * 8, dilation=300), 4800, 0.35),
    "windows dilated 64 and 128": (
        masks.window(64 * 16, dilation=64) | masks.window(128 * 8, dilation=128),
        4096,
        0.5,
    ),
    "line dilated 96": (masks.neighborhood((4608,), 12, dilation=96), 4608, 0.6),
    "segments 256": (masks.segments(256), 4096, 1.0),
    "segments 100": (masks.segments(100), 4000, 0.8),
    "segments 256 causal": (masks.segments(256) & masks.causal(), 4096, 0.93),
    "congruent 4": (masks.congruent(4, 1), 4096, 1.0),
    "tiles of 16": (listed_tiles(16, 4096), 4096, 1.0),
    "tiles of 64": (listed_tiles(64, 4096), 4096, 1.0),
    "tiles of 100": (listed_tiles(100, 4000), 4000, 0.83),
    "tiles of 128": (listed_tiles(128, 4096), 4096, 1.0),
    "longnet": (cd.longnet((256, 512, 1024), (1, 2, 4)), 2048, 1.0),
    "longnet 64": (cd.longnet((256, 1024, 4096), (1, 4, 64)), 4096, 0.95),
    "longnet of short segments": (cd.longnet((64, 128, 256), (1, 2, 4)), 2048, 0.9),
    "longnet causal": (cd.longnet((256, 512, 1024), (1, 2, 4), causal=True), 2048, 0.82),
    "neighborhood": (masks.neighborhood((64, 64), 6), 4096, 0.5),
    "global tokens": (
        masks.window(64) | masks.global_tokens(positions=range(100, 4096, 400)),
        4096,
        0.45,
    ),
    "documents": (masks.causal() & masks.documents(lengths=LENGTHS), 4096, 0.96),
}


@pytest.mark.parametrize("name", SHARES)
def test_share_of_useful_pairs_in_computed_tiles(name: str) -> None:
    mask, n, least = SHARES[name]
    computed_share = share(mask, n, heads=4 if "longnet" in name else 1)
    print(f"useful share of {name}: {computed_share:.4f}")
    assert least <= computed_share <= 1.0


def test_counts_of_a_million_tokens_need_no_walk_over_their_keys() -> None:
    n = 1 << 20
    sizes = [1, 1, 1, n, n, 16, 16, _TYPES["float32"]]
    counts = ops.native_counts(None, None, encode(as_program(masks.full()), 1), sizes, 0, None)
    assert counts[0] == n**2
    assert counts[1] == 0
