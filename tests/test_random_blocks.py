"""Windows of blocks, random blocks, and BigBird.

BigBird consists of both and global tokens.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import counting, masks
from compiled_dilated.masks.explicit import Tiles, splitmix64
from compiled_dilated.programs import as_program
from compiled_dilated.regions import EMPTY, FULL
from compiled_dilated.tiles import TileMap
from tests.strategies import dense


def test_a_window_of_no_blocks_is_segments() -> None:
    assert (dense(masks.block_window(7, 0), 50, 60) == dense(masks.segments(7), 50, 60)).all()


@given(
    block=st.integers(1, 9),
    reach=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    q=st.integers(0, 60),
    n=st.integers(1, 60),
)
def test_block_window(block: int, reach: tuple[int, int], q: int, n: int) -> None:
    left, right = reach
    seen = [key for key in range(n) if -left <= key // block - q // block <= right]
    mask = masks.block_window(block, left, right)
    assert np.flatnonzero(dense(mask, 1, n, q_offset=q)[0]).tolist() == seen
    assert list(itertools.chain(*(mask.keys_of(q, n) or ()))) == seen


@pytest.mark.parametrize("tile", [16, 32, 48, 128])
def test_verdicts_of_query_tiles_over_several_listed_rows_are_exact(tile: int) -> None:
    """A band of tiles of 16 tokens."""
    band = masks.tiles([*((i, i) for i in range(40)), *((i + 1, i) for i in range(39))], block=16)
    verdicts = TileMap.build(band, 640, 640, q_tile=tile, kv_tile=16).verdicts()
    allowed = dense(band, 640, 640)
    for row in range(len(verdicts)):
        for column in range(40):
            seen = allowed[row * tile : (row + 1) * tile, column * 16 : (column + 1) * 16]
            assert (verdicts[row, column] == FULL) == seen.all()
            assert (verdicts[row, column] == EMPTY) == (not seen.any())


def test_splitmix64_gives_the_published_numbers() -> None:
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + number * gamma) % 2**64 for number in range(5)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]


def next_number(state: int) -> int:
    """SplitMix64 with Python integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def drawn(blocks: int, count: int, seed: int) -> set[tuple[int, int]]:
    """The definition of random blocks, draw by draw."""
    tiles = set()
    for row in range(blocks):
        columns: set[int] = set()
        for draw in range(count):
            last = blocks - count + draw
            number = next_number(next_number(next_number(seed) ^ row) ^ draw) % (last + 1)
            columns.add(last if number in columns else number)
        tiles |= {(row, column) for column in columns}
    return tiles


@given(
    blocks=st.integers(1, 30),
    share=st.floats(0, 1),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**60),
)
def test_random_blocks_are_those_of_the_definition(
    blocks: int, share: float, block: int, seed: int
) -> None:
    count = round(share * blocks)
    mask = masks.random_blocks(block, count, blocks * block, seed)
    tiles = drawn(blocks, count, seed)
    assert len(tiles) == blocks * count
    assert mask == masks.tiles(tiles, block, columns=blocks)
    assert counting.pairs(mask, blocks * block, blocks * block) == blocks * count * block**2


def test_random_blocks_never_change() -> None:
    """A checkpoint was trained with them."""
    expected = masks.tiles(TILES_OF_SEED_3, 64, columns=7)
    assert masks.random_blocks(64, 2, tokens=400, seed=3) == expected
    assert masks.random_blocks(64, 2, tokens=400) != masks.random_blocks(64, 2, tokens=400, seed=1)


TILES_OF_SEED_3 = [
    *((0, 1), (0, 5), (1, 0), (1, 2), (2, 0), (2, 4), (3, 2)),
    *((3, 6), (4, 0), (4, 2), (5, 1), (5, 3), (6, 0), (6, 2)),
]


def test_random_blocks_are_spread_evenly() -> None:
    mask = masks.random_blocks(1, 8, tokens=2000)
    assert isinstance(mask, Tiles)
    columns = np.bincount(np.array(mask.keys) % mask.columns, minlength=2000)
    # Poisson of mean 8.
    assert abs(columns.var() - 8) < 1
    assert columns.max() < 26


def test_random_blocks_of_another_length() -> None:
    """A shorter sequence has fewer blocks, a longer one no more.

    The last block may be short.
    """
    mask = masks.random_blocks(8, 2, tokens=37, seed=1)
    allowed = dense(mask, 60, 60)
    assert not allowed[40:].any()
    assert not allowed[:, 40:].any()
    assert (dense(mask, 20, 20) == allowed[:20, :20]).all()
    assert (allowed[:40].sum(axis=1) == 16).all()


# BigBird


def test_big_bird() -> None:
    program = cd.big_bird(64, 128, 3, 64, tokens=4096, seed=5)
    expected = (
        masks.block_window(64, 1)
        | masks.global_tokens(128)
        | masks.random_blocks(64, 3, 4096, seed=5)
    )
    assert program == as_program(expected)
    names = {**vars(masks), "Program": cd.Program, "Branch": cd.Branch}
    assert eval(repr(program), names) == program


def test_tiles_of_big_bird_are_full() -> None:
    mask = cd.big_bird(64, 128, 3, 64, tokens=4096).branches[0].mask
    tiles = TileMap.build(mask, 4096, 4096, q_tile=64, kv_tile=64)
    assert tiles.full.all()
    assert 64 * 5 < len(tiles.indices) < 64 * 8 + 2 * 64


def test_big_bird_at_a_million_tokens() -> None:
    start = time.perf_counter()
    mask = cd.big_bird(64, 64, 3, 64, tokens=2**20).branches[0].mask
    tiles = TileMap.build(mask, 2**20, 2**20, q_tile=64, kv_tile=64)
    assert tiles.full.all()
    assert time.perf_counter() - start < 20
