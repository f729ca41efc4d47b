"""Biases that last: one for all sizes, within its bytes, and right where heads see different keys in one kernel call."""

from __future__ import annotations

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.lowerings import biases
from compiled_dilated.lowerings.biases import Bias, Kept
from compiled_dilated.lowerings.lattice import Lattice

CPU = torch.device("cpu")


def _whole(size: int, *parts: masks.Mask, heads: tuple[int, ...] = (0,)) -> Bias:
    rows = Lattice(0, ((1, 0),), ((size, 1),))
    return Bias(parts, heads, rows, rows, shared=True)


def test_sizes_share_one_bias() -> None:
    kept, mask = Kept(), masks.window(5)
    small, large = _whole(40, mask), _whole(70, mask)
    assert small.beginning() == large.beginning()
    first = kept.tiles(large.beginning(), 70, 70, False, CPU, torch.float32).bias
    second = kept.tiles(small.beginning(), 40, 40, False, CPU, torch.float32).bias
    assert first is not None
    assert second is not None
    assert first.data_ptr() == second.data_ptr()
    b = biases.batch_indices(slice(0, 1), CPU)
    for bias, tiles in ((large, first), (small, second)):
        assert torch.equal(tiles, bias.made(b, {}, torch.float32))


def test_a_larger_bias_takes_the_place_of_the_smaller() -> None:
    kept, bias = Kept(), _whole(40, masks.window(5)).beginning()
    kept.tiles(bias, 40, 40, False, CPU, torch.float32)
    before = kept.held_bytes
    assert before == 256 * 256 * 4
    kept.tiles(bias, 300, 40, False, CPU, torch.float32)
    assert kept.held_bytes == 512 * 256 * 4
    kept.tiles(bias, 40, 40, False, CPU, torch.float32)
    assert kept.held_bytes == 512 * 256 * 4


def test_masks_with_an_end_are_not_asked_beyond_it() -> None:
    grid = masks.neighborhood((5, 9), 1)
    bias = _whole(45, grid)
    assert bias.beginning() != _whole(36, grid).beginning()
    tiles = Kept().tiles(bias.beginning(), 45, 45, False, CPU, torch.float32)
    assert tiles.bias is not None
    assert tiles.bias.shape == (1, 1, 45, 45)


def test_a_mask_mod_is_asked_about_tokens_alone() -> None:
    """Not about those up to which a bias would be rounded: what it captures may be as long as the sequence."""
    ids = torch.arange(45) // 7
    mask = masks.from_mod(lambda b, h, q, kv: (ids[q] == ids[kv]) & (kv <= q))
    q, k, v = (torch.randn(1, 2, 45, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(cd.compile(mask, lowering="dense")(q, k, v), cd.reference(mask, q, k, v), rtol=1e-10, atol=1e-10)


def test_no_more_is_kept_than_its_bytes() -> None:
    kept = Kept(most_bytes=3 * 256 * 256 * 4)
    wanted = [_whole(40, masks.window(width)).beginning() for width in range(1, 6)]
    for bias in wanted:
        tiles = kept.tiles(bias, 40, 40, False, CPU, torch.float32)
        assert kept.held_bytes <= kept.most_bytes
    again = kept.tiles(wanted[-1], 40, 40, False, CPU, torch.float32)
    assert again is tiles
    once_more = kept.tiles(wanted[0], 40, 40, False, CPU, torch.float32)
    assert once_more.bias is not None
    assert torch.equal(
        once_more.bias, _whole(40, masks.window(1)).made(biases.batch_indices(slice(0, 1), CPU), {}, torch.float32)
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_short_longnet_is_one_dense_call_for_all_heads(causal: bool, kv_heads: int, batch: int) -> None:
    """Heads that see other keys, in one call where that is possible: results and gradients, for lengths in any order."""
    program = cd.longnet((64, 128, 256), (1, 2, 4), causal=causal)
    attend = cd.compile(program, lowering="dense")
    for tokens in (96, 33, 130, 1):
        shapes = ((batch, 8, tokens, 16), (batch, kv_heads, tokens, 16), (batch, kv_heads, tokens, 24))
        q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        out, lse = attend(q, k, v, return_lse=True)
        truth, true_lse = cd.reference(program, q, k, v, return_lse=True)
        torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, true_lse, rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(out), torch.randn_like(lse)
        found = torch.autograd.grad((out, lse), (q, k, v), weights)
        expected = torch.autograd.grad((truth, true_lse), (q, k, v), weights)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_one_call_where_heads_stand_evenly_apart() -> None:
    program = cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True)
    plan = cd.plan(program, q_shape=(1, 8, 512, 64))
    assert plan.lowering == "dense"
    (batch,) = plan.chosen[0].work
    assert (batch.alike, batch.causal, batch.kept) == (4, True, True)
    assert len(cd.plan(program, q_shape=(2, 8, 512, 64), lowering="dense").chosen[0].work) == 4
