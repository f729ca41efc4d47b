"""Block masks are what torch builds pair by pair, only narrow; parts merge to the whole; kernels accept them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from compiled_dilated import masks, orders, tiles
from compiled_dilated.block_masks import BlockMaskPart, block_mask, block_masks, tile_map, widen
from compiled_dilated.masks import Mask
from compiled_dilated.orders import Order
from compiled_dilated.tiles import TileMap
from tests.strategies import by_head, every_third

MILLION = 2**20

IDENTITY = orders.identity()

# mask, order, q_len, kv_len, q_offset: whole and ragged lengths, and masks that classify exactly, as torch does.
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
    (
        masks.segments(512) & masks.congruent(4, 1, period=512),
        orders.residue(4, period=512),
        1024,
        1024,
        0,
    ),
    (
        masks.segments(512) & masks.congruent(4, 1, period=512) & masks.causal(),
        orders.residue(4, period=512),
        1100,
        1100,
        0,
    ),
    (masks.neighborhood((32, 32), 5), orders.hilbert(32, 32), 1024, 1024, 0),
]


def in_order(
    mask: Mask, order: Order, n: int, q_offset: int, data: Any = None, device: str = "cpu"
) -> Callable[..., Tensor]:
    """The mask_mod, written independently of ours."""
    permutation = order.permutation(n)
    table = (
        torch.arange(max(n, 2**12), device=device)
        if permutation is None
        else torch.from_numpy(permutation).to(device)
    )
    return lambda b, h, q, kv: mask.allows(b, h, table[q] + q_offset, table[kv], data)


def lists_of(num: Tensor | None, indices: Tensor | None) -> list[Any]:
    assert num is not None
    assert indices is not None
    heads, rows = num.shape[1:]
    return [indices[0, h, r, : num[0, h, r]].tolist() for h in range(heads) for r in range(rows)]


def assert_same_lists(ours: BlockMask, theirs: BlockMask) -> None:
    for name in ("kv", "full_kv", "q", "full_q"):
        mine, other = (
            (getattr(each, f"{name}_num_blocks"), getattr(each, f"{name}_indices"))
            for each in (ours, theirs)
        )
        assert mine[0].dtype == mine[1].dtype == torch.int32
        assert mine[0].is_contiguous()
        assert mine[1].is_contiguous()
        assert lists_of(*mine) == lists_of(*other), name
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE


@pytest.mark.parametrize(
    ("mask", "order", "q_len", "kv_len", "q_offset"),
    SAME_AS_TORCH,
    ids=lambda value: repr(value)[:50],
)
def test_same_as_create_block_mask(
    mask: Mask, order: Order, q_len: int, kv_len: int, q_offset: int
) -> None:
    ours = block_mask(mask, q_len, kv_len, order=order, q_offset=q_offset)
    theirs = create_block_mask(
        in_order(mask, order, q_len, q_offset), None, None, q_len, kv_len, device="cpu"
    )
    assert_same_lists(ours, theirs)
    assert ours.kv_indices.shape[-1] == max(
        1, int(ours.kv_num_blocks.max()), int(ours.full_kv_num_blocks.max())
    )
    assert ours.kv_indices.shape == ours.full_kv_indices.shape
    assert ours.q_indices.shape == ours.full_q_indices.shape


@pytest.mark.parametrize("tile", [16, 64, 100])
def test_other_tiles(tile: int) -> None:
    mask = masks.window(70) & masks.causal()
    theirs = create_block_mask(
        in_order(mask, IDENTITY, 333, 0), None, None, 333, 333, device="cpu", BLOCK_SIZE=tile
    )
    assert_same_lists(block_mask(mask, 333, 333, tile=tile), theirs)


@pytest.mark.parametrize("offset", ["cyclic", "grouped", (0, 2, 2, 1)])
def test_heads_that_differ(offset: Any) -> None:
    mask = masks.segments(96) & masks.congruent(3, offset, period=96)
    ours = block_mask(mask, 300, 300, heads=4, tile=32, order=orders.residue(3, period=96))
    theirs = create_block_mask(
        in_order(mask.for_heads(4), orders.residue(3, period=96), 300, 0),
        None,
        4,
        300,
        300,
        device="cpu",
        BLOCK_SIZE=32,
    )
    assert ours.kv_indices.shape[:2] == (1, 4)
    assert_same_lists(ours, theirs)


def test_heads_that_agree_share_one_list() -> None:
    assert block_mask(masks.window(64), 512, 512, heads=8).kv_indices.shape[:2] == (1, 1)
    assert block_mask(
        masks.from_mod(every_third, within=masks.window(64)), 512, 512, heads=8
    ).kv_indices.shape[:2] == (1, 1)
    assert block_mask(
        masks.from_mod(by_head, within=masks.window(64)), 512, 512, heads=8
    ).kv_indices.shape[:2] == (1, 8)


def pairs_of(part: BlockMaskPart, heads: int = 1, batch: int = 1) -> Tensor:
    """What the part's mask_mod says of its slice, (batch, heads, queries, keys), and its lists agree with."""
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
    q, kv = (
        torch.arange(len(part.queries))[None, None, :, None],
        torch.arange(len(part.keys))[None, None, None, :],
    )
    return part.block_mask.mask_mod(b, h, q, kv).broadcast_to(
        batch, heads, len(part.queries), len(part.keys)
    )


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
def test_parts_are_disjoint_and_whole(
    mask: Mask, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_ALWAYS_FITS", 1)
    monkeypatch.setattr(tiles, "_MOST_PADDING", 1.5)
    n, heads, tile = 300, 2, 8
    parts = block_masks(mask, n, n, heads=heads, tile=tile, order=order)
    assert len(parts) >= 2
    taken, seen = torch.zeros(n, n, dtype=torch.int64), torch.zeros(heads, n, n, dtype=torch.bool)
    for part in parts:
        assert part.block_mask.seq_lengths == (len(part.queries), len(part.keys))
        rows, columns = (
            slice(part.queries.start, part.queries.stop),
            slice(part.keys.start, part.keys.stop),
        )
        taken[rows, columns] += 1
        pairs = pairs_of(part, heads)[0]
        seen[:, rows, columns] = pairs
        for head in range(part.block_mask.kv_num_blocks.shape[1]):
            listed = (
                torch.from_numpy(tile_map(part.block_mask, head=head).verdicts())
                .repeat_interleave(tile, 0)
                .repeat_interleave(tile, 1)
            )
            listed = listed[: len(part.queries), : len(part.keys)]
            mine = (
                pairs[head] if part.block_mask.kv_num_blocks.shape[1] == heads else pairs.any(dim=0)
            )
            assert not (mine & (listed == 0)).any()
            assert not (~mine & (listed == 2)).any()
    assert taken.max() == 1
    index = torch.arange(n)
    truth = in_order(mask, order, n, 0)(
        0, torch.arange(heads)[:, None, None], index[:, None], index[None, :]
    )
    assert torch.equal(seen, truth.broadcast_to(heads, n, n))


@pytest.mark.parametrize(
    "mask",
    [masks.window(256) | masks.sinks(4), masks.window(256) | masks.global_tokens(4)],
    ids=repr,
)
def test_heavy_masks_at_a_million_tokens(mask: Mask) -> None:
    parts = block_masks(mask, MILLION, MILLION)
    total = sum(
        tensor.nbytes
        for part in parts
        for tensor in vars(part.block_mask).values()
        if isinstance(tensor, Tensor)
    )  # partial and full lists, forward and transposed
    assert 2 <= len(parts) <= 3
    assert total <= 4 * 2**20
    with pytest.raises(
        ValueError, match=rf"takes {len(parts)} block masks: .* Call block_masks\(...\)"
    ):
        block_mask(mask, MILLION, MILLION)


def test_window_at_a_million_tokens_is_one_part() -> None:
    whole = block_mask(masks.window(256), MILLION, MILLION)
    assert whole.kv_indices.shape == (1, 1, 8192, 3)
    assert whole.seq_lengths == (MILLION, MILLION)


def test_a_mask_of_nothing() -> None:
    (part,) = block_masks(masks.sinks(0), 300, 300)
    assert part.block_mask.kv_indices.shape == (1, 1, 3, 1)
    assert int(part.block_mask.kv_num_blocks.sum()) == 0
    assert not pairs_of(part).any()


@pytest.mark.parametrize("q_len", [256, 300])
def test_tile_map_round_trip(q_len: int) -> None:
    mask = masks.window(60)
    whole = block_mask(mask, q_len, 384, tile=64)
    built = TileMap.build(mask, q_len, 384, q_tile=64, kv_tile=64)
    theirs = create_block_mask(
        in_order(mask, IDENTITY, q_len, 0), None, None, q_len, 384, device="cpu", BLOCK_SIZE=64
    )
    for again in (tile_map(whole), tile_map(widen(whole)), tile_map(theirs)):
        assert again.indices.tolist() == built.indices.tolist()
        assert again.offsets.tolist() == built.offsets.tolist()
        assert (again.q_len, again.kv_len, again.q_tile, again.kv_tile) == (q_len, 384, 64, 64)
        if q_len == 256:
            assert again.full.tolist() == built.full.tolist()
        else:  # short tiles are never FULL to torch
            assert not again.full[again.row_of == again.rows - 1].any()


def test_tile_map_without_full_lists() -> None:
    theirs = BlockMask.from_kv_blocks(
        torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]]), BLOCK_SIZE=32
    )
    assert tile_map(theirs).verdicts().tolist() == [[0, 1], [1, 1]]


def test_widen_only_views() -> None:
    narrow = block_mask(masks.window(40), 1000, 1000, tile=32)
    wide = widen(narrow)
    assert wide.kv_indices.shape == (1, 1, 32, 32)
    assert wide.kv_indices.untyped_storage().nbytes() == narrow.kv_indices.nbytes + 32 * 4
    for name in ("kv", "full_kv", "q", "full_q"):
        mine, other = (
            (getattr(each, f"{name}_num_blocks"), getattr(each, f"{name}_indices"))
            for each in (wide, narrow)
        )
        assert lists_of(*mine) == lists_of(*other)
    assert widen(wide).kv_indices is wide.kv_indices


# Kernels -------------------------------------------------------------------------------------------------------------


def reference(
    mask: Mask, order: Order, q: Tensor, k: Tensor, v: Tensor, data: Any = None
) -> Tensor:
    """Dense, of tensors that stand in the order; rows that see nothing are 0."""
    b, h, at, kv = (
        torch.arange(size, device=q.device).reshape(
            [-1 if axis == each else 1 for each in range(4)]
        )
        for axis, size in enumerate((*q.shape[:3], k.shape[2]))
    )
    seen = in_order(mask.for_heads(q.shape[1]), order, q.shape[2], 0, data, str(q.device))(
        b, h, at, kv
    )
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return torch.softmax(scores, dim=-1).nan_to_num() @ v


def qkv(n: int, heads: int = 2, m: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads, n, 16),
        torch.randn(2, heads, m or n, 16),
        torch.randn(2, heads, m or n, 16),
    )


def kernel_case(mask: Mask, order: Order = IDENTITY, slow: bool = True, **data: Tensor) -> Any:
    """Compiling takes seconds, so that only a few cases are not slow ones."""
    return pytest.param(
        mask, order, data, marks=[pytest.mark.slow] if slow else [], id=repr(mask)[:50]
    )


NUMBERS = torch.arange(600).reshape(2, 300)
KERNEL_CASES = [
    kernel_case(masks.documents(lengths=(100, 50, 120)) & masks.window(60), slow=False),
    kernel_case(
        masks.segments(96) & masks.congruent(3, "grouped", period=96) & masks.padding("pad"),
        orders.residue(3, period=96),
        slow=False,
        pad=NUMBERS % 5 == 0,
    ),
    kernel_case(masks.window(40) & masks.causal()),
    kernel_case(masks.tiles([(0, 0), (1, 1), (2, 0)], block=100)),
    kernel_case(masks.neighborhood((15, 20), 2, edges="shift"), orders.hilbert(15, 20)),
    kernel_case(masks.documents(ids="ids") & masks.window(100), ids=NUMBERS // 70),
    kernel_case(masks.from_mod(every_third, within=masks.window(60))),
]


@pytest.mark.parametrize(("mask", "order", "data"), KERNEL_CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_eager_and_compiled(mask: Mask, order: Order, data: Any) -> None:
    torch.compiler.reset()
    q, k, v = qkv(300, heads=4)
    narrow = block_mask(mask, 300, 300, heads=4, tile=32, order=order, data=data)
    expected = reference(mask, order, q, k, v, data=data)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=narrow), expected)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(q, k, v, block_mask=widen(narrow)), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_parts_merge_by_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_ALWAYS_FITS", 1)
    monkeypatch.setattr(tiles, "_MOST_PADDING", 1.5)
    mask, n = masks.window(20) | masks.global_tokens(3), 300
    q, k, v = qkv(n)
    out, total = torch.zeros_like(q), torch.zeros(*q.shape[:3], 1)
    for part in block_masks(mask, n, n, tile=8):
        rows, columns = (
            slice(part.queries.start, part.queries.stop),
            slice(part.keys.start, part.keys.stop),
        )
        mine = q[:, :, rows], k[:, :, columns], v[:, :, columns]
        partial, aux = flex_attention(
            *mine, block_mask=part.block_mask, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        weight = aux.lse.exp().nan_to_num()[..., None]
        out[:, :, rows] += partial * weight
        total[:, :, rows] += weight
    torch.testing.assert_close(out / total, reference(mask, IDENTITY, q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize(("mask", "order", "data"), KERNEL_CASES)
def test_narrow_masks_on_a_gpu(mask: Mask, order: Order, data: Any) -> None:
    torch.compiler.reset()
    data = {name: tensor.cuda() for name, tensor in data.items()}
    single = [x.cuda().requires_grad_() for x in qkv(300, heads=4)]
    narrow = block_mask(mask, 300, 300, device="cuda", heads=4, order=order, data=data)
    out = torch.compile(flex_attention, fullgraph=True)(*single, block_mask=narrow)
    double = [x.detach().double().requires_grad_() for x in single]
    expected = reference(mask, order, *double, data=data)
    for ours, theirs in zip(
        (out, *torch.autograd.grad(out.sin().sum(), single)),
        (expected, *torch.autograd.grad(expected.sin().sum(), double)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs.float(), atol=5e-3, rtol=5e-3)


# Bad input -----------------------------------------------------------------------------------------------------------


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
            lambda: block_mask(lambda b, h, q, kv: q >= kv, 4, 4),
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
            lambda: block_mask(masks.padding(), 4, 4, data={"padding": np.zeros((1, 4), bool)}),
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
            "batch entry 0 and head 1 of a block mask of 1 and 1",
        ),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
