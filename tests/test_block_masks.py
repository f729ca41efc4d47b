"""Block masks: torch's lists, but narrow, and masks from them.

Parts together cover the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
)

from compiled_dilated import masks, orders
from compiled_dilated.block_masks import BlockMaskPart, block_mask, block_masks, tile_map, widen
from compiled_dilated.masks import Mask
from compiled_dilated.orders import Order
from compiled_dilated.regions import EMPTY, FULL
from compiled_dilated.tiles import TileMap, splitting
from tests.strategies import by_head, every_third
from tests.support.block_masks import IDENTITY, in_order, slices_of

MILLION = 2**20


DILATED = masks.segments(512) & masks.congruent(4, 1, period=512)
# (mask, order, q_len, kv_len, q_offset) of masks that classify exactly, as torch does.
SAME_AS_TORCH = [
    (masks.causal(), IDENTITY, 1024, 1024, 0),
    (masks.window(200), IDENTITY, 1024, 1024, 0),
    (masks.window(300) & masks.causal(), IDENTITY, 1000, 1000, 0),
    (masks.full(), IDENTITY, 300, 700, 0),
    (masks.segments(256), IDENTITY, 1001, 1001, 0),
    (masks.causal(), IDENTITY, 130, 1024, 894),
    (masks.window(100) | masks.sinks(4), IDENTITY, 1024, 1000, 0),
    (masks.window(100) | masks.global_tokens(4), IDENTITY, 900, 900, 0),
    (masks.documents(lengths=(300, 128, 84, 500)), IDENTITY, 1012, 1012, 0),
    (masks.tiles([(0, 3), (2, 2), (5, 1)], block=128), IDENTITY, 1024, 1024, 0),
    (DILATED, orders.residue(4, period=512), 1024, 1024, 0),
    (DILATED & masks.causal(), orders.residue(4, period=512), 1100, 1100, 0),
    (masks.neighborhood((32, 32), 5), orders.hilbert(32, 32), 1024, 1024, 0),
]


def lists_of(mask: BlockMask, name: str) -> list[list[int]]:
    """The listed blocks, by head and row."""
    num, indices = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
    lists = []
    for head in range(num.shape[1]):
        for row in range(num.shape[2]):
            lists.append(indices[0, head, row, : num[0, head, row]].tolist())
    return lists


def assert_same_lists(actual: BlockMask, expected: BlockMask) -> None:
    for name in ("kv", "full_kv", "q", "full_q"):
        for table in (getattr(actual, f"{name}_num_blocks"), getattr(actual, f"{name}_indices")):
            assert table.dtype == torch.int32
            assert table.is_contiguous()
        assert lists_of(actual, name) == lists_of(expected, name), name
    assert actual.seq_lengths == expected.seq_lengths
    assert actual.BLOCK_SIZE == expected.BLOCK_SIZE


@pytest.mark.parametrize(
    ("mask", "order", "q_len", "kv_len", "q_offset"),
    SAME_AS_TORCH,
    ids=lambda value: repr(value)[:50],
)
def test_same_as_create_block_mask(
    mask: Mask, order: Order, q_len: int, kv_len: int, q_offset: int
) -> None:
    actual = block_mask(mask, q_len, kv_len, order=order, q_offset=q_offset)
    mask_mod = in_order(mask, order, q_len, q_offset)
    assert_same_lists(actual, create_block_mask(mask_mod, None, None, q_len, kv_len, "cpu"))
    assert actual.full_kv_num_blocks is not None
    widest = max(int(actual.kv_num_blocks.max()), int(actual.full_kv_num_blocks.max()))
    assert actual.kv_indices.shape[-1] == max(1, widest)
    assert actual.full_kv_indices is not None
    assert actual.kv_indices.shape == actual.full_kv_indices.shape
    assert actual.q_indices is not None
    assert actual.full_q_indices is not None
    assert actual.q_indices.shape == actual.full_q_indices.shape


NO_TENSOR = {"padding": np.zeros((1, 4), bool)}


@pytest.mark.parametrize("tile", [16, 64, 100])
def test_other_tiles(tile: int) -> None:
    mask = masks.window(70) & masks.causal()
    mask_mod = in_order(mask, IDENTITY, 333, 0)
    expected = create_block_mask(mask_mod, None, None, 333, 333, "cpu", BLOCK_SIZE=tile)
    assert_same_lists(block_mask(mask, 333, 333, tile=tile), expected)


@pytest.mark.parametrize("offset", ["cyclic", "grouped", (0, 2, 2, 1)])
def test_heads_that_differ(offset: Any) -> None:
    mask = masks.segments(96) & masks.congruent(3, offset, period=96)
    order = orders.residue(3, period=96)
    actual = block_mask(mask, 300, 300, heads=4, tile=32, order=order)
    mask_mod = in_order(mask.for_heads(4), order, 300, 0)
    expected = create_block_mask(mask_mod, None, 4, 300, 300, "cpu", BLOCK_SIZE=32)
    assert actual.kv_indices.shape[:2] == (1, 4)
    assert_same_lists(actual, expected)


def test_heads_that_agree_share_one_list() -> None:
    window = masks.window(64)
    for mask, lists in (
        (window, 1),
        (masks.from_mod(every_third, within=window), 1),
        (masks.from_mod(by_head, within=window), 8),
    ):
        assert block_mask(mask, 512, 512, heads=8).kv_indices.shape[:2] == (1, lists)


def pairs_of(part: BlockMaskPart, heads: int = 1, batch: int = 1) -> Tensor:
    """The pairs that the part's mask_mod allows, (batch, heads, queries, keys)."""
    shape = batch, heads, len(part.queries), len(part.keys)
    b, h, q, kv = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return part.block_mask.mask_mod(b, h, q, kv).broadcast_to(shape)


@pytest.mark.parametrize(
    ("mask", "order"),
    [
        (masks.window(20) | masks.sinks(3), IDENTITY),
        (masks.window(20) | masks.global_tokens(3), IDENTITY),
        (masks.causal() & (masks.window(20) | masks.sinks(3)), IDENTITY),
        (masks.window(20) | masks.global_tokens(3), orders.residue(3, period=50)),
        (masks.congruent(3, "cyclic") | masks.global_tokens(3), orders.residue(3)),
        (masks.neighborhood((15, 20), 2) | masks.global_tokens(3), orders.hilbert(15, 20)),
    ],
    ids=repr,
)
def test_parts_are_disjoint_and_cover_the_mask(
    mask: Mask, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "_ALWAYS_FITS", 1)
    monkeypatch.setattr(splitting, "_MOST_PADDING", 1.5)
    n, heads, tile = 300, 2, 8
    parts = block_masks(mask, n, n, heads=heads, tile=tile, order=order)
    assert len(parts) >= 2
    covered = torch.zeros(n, n, dtype=torch.int64)
    seen = torch.zeros(heads, n, n, dtype=torch.bool)
    for part in parts:
        assert part.block_mask.seq_lengths == (len(part.queries), len(part.keys))
        rows, columns = slices_of(part)
        covered[rows, columns] += 1
        pairs = pairs_of(part, heads)[0]
        seen[:, rows, columns] = pairs
        lists = part.block_mask.kv_num_blocks.shape[1]
        for head in range(lists):
            # Heads may share one list: then it covers the pairs of all heads.
            allowed = pairs[head] if lists == heads else pairs.any(dim=0)
            verdicts = torch.from_numpy(tile_map(part.block_mask, head=head).verdicts())
            of_pairs = verdicts.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
            of_pairs = of_pairs[: len(part.queries), : len(part.keys)]
            assert not (allowed & (of_pairs == EMPTY)).any()
            assert not (~allowed & (of_pairs == FULL)).any()
    assert covered.max() == 1
    h, index = torch.arange(heads)[:, None, None], torch.arange(n)
    expected = in_order(mask, order, n, 0)(0, h, index[:, None], index[None, :])
    assert torch.equal(seen, expected.broadcast_to(heads, n, n))


@pytest.mark.parametrize(
    "mask",
    [masks.window(256) | masks.sinks(4), masks.window(256) | masks.global_tokens(4)],
    ids=repr,
)
def test_heavy_masks_at_a_million_tokens(mask: Mask) -> None:
    parts = block_masks(mask, MILLION, MILLION)
    nbytes = 0
    for part in parts:
        # Partial and full lists, forward and transposed.
        for value in vars(part.block_mask).values():
            nbytes += value.nbytes if isinstance(value, Tensor) else 0
    assert 2 <= len(parts) <= 3
    assert nbytes <= 4 * 2**20
    message = rf"takes {len(parts)} block masks: .* Call block_masks\(...\)"
    with pytest.raises(ValueError, match=message):
        block_mask(mask, MILLION, MILLION)


def test_window_at_a_million_tokens_is_one_part() -> None:
    window = block_mask(masks.window(256), MILLION, MILLION)
    assert window.kv_indices.shape == (1, 1, 8192, 3)
    assert window.seq_lengths == (MILLION, MILLION)


def test_a_mask_of_nothing() -> None:
    (part,) = block_masks(masks.sinks(0), 300, 300)
    assert part.block_mask.kv_indices.shape == (1, 1, 3, 1)
    assert int(part.block_mask.kv_num_blocks.sum()) == 0
    assert not pairs_of(part).any()


@pytest.mark.parametrize("q_len", [256, 300])
def test_tile_map_round_trip(q_len: int) -> None:
    mask = masks.window(60)
    expected = TileMap.build(mask, q_len, 384, q_tile=64, kv_tile=64)
    narrow, mask_mod = block_mask(mask, q_len, 384, tile=64), in_order(mask, IDENTITY, q_len, 0)
    of_torch = create_block_mask(mask_mod, None, None, q_len, 384, "cpu", BLOCK_SIZE=64)
    for result in (tile_map(narrow), tile_map(widen(narrow)), tile_map(of_torch)):
        assert result.indices.tolist() == expected.indices.tolist()
        assert result.offsets.tolist() == expected.offsets.tolist()
        assert (result.q_len, result.kv_len, result.q_tile, result.kv_tile) == (q_len, 384, 64, 64)
        if q_len == 256:
            assert result.full.tolist() == expected.full.tolist()
        else:  # torch lists no short tile as full
            assert not result.full[result.row_of == result.rows - 1].any()


def test_tile_map_without_full_lists() -> None:
    counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    partial_only = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=32)
    assert tile_map(partial_only).verdicts().tolist() == [[0, 1], [1, 1]]


def test_widen_only_views() -> None:
    narrow = block_mask(masks.window(40), 1000, 1000, tile=32)
    wide = widen(narrow)
    assert wide.kv_indices.shape == (1, 1, 32, 32)
    assert wide.kv_indices.untyped_storage().nbytes() == narrow.kv_indices.nbytes + 32 * 4
    for name in ("kv", "full_kv", "q", "full_q"):
        assert lists_of(wide, name) == lists_of(narrow, name)
    assert widen(wide).kv_indices is wide.kv_indices


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: block_mask(masks.causal(), 0, 4), ValueError, "q_len must be at least 1; got 0"),
        (lambda: block_mask(masks.causal(), 4, 0), ValueError, "kv_len must be at least 1; got 0"),
        (
            lambda: block_mask(masks.causal(), 4, 4, tile=0),
            ValueError,
            "tile must be at least 1; got 0",
        ),
        (
            lambda: block_mask(masks.causal(), 4, 4, heads=0),
            ValueError,
            "heads must be at least 1; got 0",
        ),
        (
            lambda: block_mask(lambda b, h, q, kv: q >= kv, 4, 4),  # type: ignore[arg-type]
            TypeError,
            "mask must be a mask; got function",
        ),
        (
            lambda: block_mask(masks.padding(), 4, 4),
            ValueError,
            r"reads the data tensors \['padding'\]; got \[\]",
        ),
        (
            lambda: block_mask(masks.causal(), 4, 4, data={"x": torch.zeros(1)}),
            ValueError,
            r"reads the data tensors \[\]; got \['x'\]. Pass data=",
        ),
        (
            lambda: block_mask(masks.padding(), 4, 4, data=NO_TENSOR),  # type: ignore[arg-type]
            TypeError,
            "must be a bool or integer tensor; got ndarray",
        ),
        (
            lambda: block_mask(
                masks.padding(),
                4,
                4,
                data={"padding": torch.zeros(1, 4, dtype=torch.bool, device="meta")},
            ),
            ValueError,
            "must be on the device of q, cpu; got meta",
        ),
        (
            lambda: block_mask(masks.congruent(2, "grouped"), 4, 4),
            ValueError,
            "depends on the number of heads; say it by heads=...",
        ),
        (
            lambda: block_mask(masks.congruent(2, (0, 1)), 4, 4, heads=3),
            ValueError,
            "names 2 offsets for 3 heads",
        ),
        (
            lambda: block_mask(masks.causal(), 4, 5, order=orders.residue(2)),
            ValueError,
            "needs q_len == kv_len",
        ),
        (lambda: block_mask(masks.neighborhood((2, 2), 1), 5, 5), ValueError, "a grid of 4 tokens"),
        (
            lambda: tile_map(block_mask(masks.causal(), 4, 4), head=1),
            ValueError,
            "batch entry 0 and head 1 are not in a block mask of 1 batch entries and 1 heads",
        ),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
