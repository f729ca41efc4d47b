"""Global tokens by position and by data, at all entry points.

Their masks and the masks of blocks are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import compiled_dilated as cd
from compiled_dilated import masks, text
from compiled_dilated.masks import Mask
from compiled_dilated.programs import as_program
from compiled_dilated.tiles import TileMap
from tests.comparing import assert_close, exact_results, leaves, normal, results_and_gradients
from tests.strategies import dense

SCATTERED = tuple(range(5, 4000, 97))

# Global tokens


def test_positions_are_a_set() -> None:
    mask = masks.global_tokens(positions=[17, 0, 900, 17])
    assert mask == masks.global_tokens(positions=np.array([0, 17, 900]))
    assert mask == masks.global_tokens(positions=torch.tensor([900, 17, 0]))
    assert repr(mask) == "global_tokens(positions=(0, 17, 900))"
    assert not dense(masks.global_tokens(positions=()), 9, 9).any()
    assert mask != masks.global_tokens(3)


def test_the_first_positions_are_the_first_tokens() -> None:
    by_position, by_count = masks.global_tokens(positions=range(5)), masks.global_tokens(5)
    assert (dense(by_position, 30, 20) == dense(by_count, 30, 20)).all()
    assert by_position.keys_of(7, 20) == by_count.keys_of(7, 20)


def test_scattered_global_tokens_leave_most_tiles_empty() -> None:
    """Of 64 x 64 tiles, 3 rows and 3 columns."""
    mask = masks.global_tokens(positions=(0, 1700, 4095))
    tiles = TileMap.build(mask, 4096, 4096, q_tile=64, kv_tile=64)
    assert len(tiles.indices) == 64 * 64 - 61 * 61


def test_global_tokens_by_data_are_those_of_each_batch_entry() -> None:
    flags = torch.tensor([[True, False, False, False], [False, False, True, False]])
    mask, head = masks.global_tokens(data="g"), torch.tensor(0)
    q, kv = torch.arange(4)[:, None], torch.arange(4)[None, :]
    for batch in range(2):
        seen = mask.allows(torch.tensor(batch), head, q, kv, {"g": flags})
        assert torch.equal(seen, flags[batch][:, None] | flags[batch][None, :])


def test_data_of_batch_one_serves_all_entries_and_queries_past_the_last_key() -> None:
    program = masks.window(3) | masks.global_tokens(data="g")
    q, k, v = normal((2, 2, 10, 8), (2, 2, 20, 8), (2, 2, 20, 8))
    flags = torch.zeros(1, 35, dtype=torch.bool)
    flags[0, [4, 27]] = True
    options: dict[str, Any] = {"data": {"g": flags}, "q_offset": 25, "return_lse": True}
    results = cd.compile(program)(q, k, v, **options)
    assert_close(results, exact_results(program, q, k, v, **options))
    for tokens in (20, 34):
        with pytest.raises(ValueError, match="at least 35 tokens"):
            cd.compile(program)(q, k, v, data={"g": flags[:, :tokens]}, q_offset=25)


def test_flags_are_bool() -> None:
    x = torch.zeros(1, 1, 4, 8)
    mask, flags = masks.global_tokens(data="g"), torch.ones(1, 4, dtype=torch.int64)
    expected = "must be a bool tensor, True where a token is global"
    message = rf"data\['g'\] {expected}; got torch.int64.*== 1"
    with pytest.raises(TypeError, match=message):
        cd.compile(mask)(x, x, x, data={"g": flags})
    with pytest.raises(TypeError, match=message):
        cd.reference(mask, x, x, x, data={"g": flags})


def test_new_data_never_replans() -> None:
    mask = masks.window(5) | masks.global_tokens(data="g")
    attend = cd.compile(mask)
    x = torch.randn(1, 2, 64, 8)
    plans = {id(attend.plan(x, x, x)) for _ in range(2)}
    for position in (3, 40):
        data = {"g": torch.arange(64)[None] == position}
        (expected,) = exact_results(mask, x, x, x, data=data)
        assert_close([attend(x, x, x, data=data)], [expected.float()], 1e-5)
    assert {id(attend.plan(x, x, x))} == plans


# All entry points

MASKS: dict[str, Mask] = {
    "positions": masks.window(9) | masks.global_tokens(positions=(3, 130)),
    "many positions": masks.window(9) | masks.global_tokens(positions=SCATTERED),
    "data": masks.window(9) | masks.global_tokens(data="is_global"),
    "random blocks": masks.random_blocks(16, 2, 160) | masks.block_window(16, 1),
    "big bird": cd.big_bird(16, 16, 2, 16, 160).branches[0].mask,
}


def flags_of(mask: Mask, n: int) -> dict[str, torch.Tensor] | None:
    """Data for the masks that read any."""
    return {"is_global": torch.arange(n)[None] % 50 == 7} if mask.names else None


@pytest.mark.parametrize("name", MASKS)
def test_text_round_trip(name: str) -> None:
    program = as_program(MASKS[name])
    operands: list[torch.Tensor] = []
    program_text = text.write(program, operands)
    assert len(program_text) < 300
    assert len(operands) == (name == "many positions")
    assert text.read(program_text, operands) == program
    assert text.read_program(repr(program)) == program


@pytest.mark.parametrize("name", MASKS)
def test_ring_decoding_and_gradients(name: str) -> None:
    mask, n = MASKS[name], 150
    inputs = leaves(*normal((1, 2, n, 8), (1, 1, n, 8), (1, 1, n, 8)))
    data = flags_of(mask, n)

    def reference(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return cd.reference(mask, q, k, v, **options)

    expected = results_and_gradients(reference, inputs, data=data)
    for options in ({}, {"ranks": 3}, {"lowering": "tiled"}):
        attend = cd.compile(mask, **options)
        assert_close(results_and_gradients(attend, inputs, data=data), expected)
    with torch.no_grad():
        q, k, v = inputs
        attend, out = cd.compile(mask), reference(q, k, v, data=data)
        for position in (3, 4, 57, 149):
            query = slice(position, position + 1)
            row = attend(q[:, :, query], k, v, q_offset=position, data=data)
            assert_close([row], [out[:, :, query]])


@pytest.mark.parametrize("name", MASKS)
def test_block_masks(name: str) -> None:
    mask, n = MASKS[name], 150
    q, k, v = normal((1, 2, n, 8), (1, 2, n, 8), (1, 2, n, 8))
    data = flags_of(mask, n)
    block_mask = cd.block_mask(mask, n, n, tile=32, data=data)
    out = flex_attention(q, k, v, block_mask=block_mask)
    assert isinstance(out, torch.Tensor)
    assert_close([out], exact_results(mask, q, k, v, data=data))


@pytest.mark.parametrize("name", ["positions", "many positions", "big bird"])
def test_models_are_exported_and_compiled(name: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = cd.compile(MASKS[name])

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return self.attend(q, k, v)

    inputs = normal((1, 2, 150, 8), (1, 2, 150, 8), (1, 2, 150, 8))
    expected = exact_results(MASKS[name], *inputs)
    exported = torch.export.export(Model(), tuple(inputs)).module()
    assert_close([exported(*inputs)], expected)
    torch.compiler.reset()
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    assert_close([compiled(*inputs)], expected)


def test_a_picture_of_many_tiles_has_a_short_heading() -> None:
    program = cd.big_bird(64, 64, 3, 64, 4096)
    figure = cd.show(program, 4096)
    assert len(figure.heading) < 100
    assert figure.panels[0].pixels.pairs == cd.plan(program, (1, 1, 4096, 16)).useful_pairs


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.global_tokens(), ValueError, "one of count .*, positions, or data"),
        (
            lambda: masks.global_tokens(3, positions=(1,)),
            ValueError,
            "got count=3, positions=.1,., data=None",
        ),
        (
            lambda: masks.global_tokens((0, 17)),  # type: ignore[arg-type]
            TypeError,
            r"count must be an integer; got tuple. Write global_tokens.positions=",
        ),
        (
            lambda: masks.global_tokens(positions=(3, -1)),
            ValueError,
            r"positions\[1\] must be at least 0; got -1",
        ),
        (
            lambda: masks.global_tokens(positions=5),  # type: ignore[arg-type]
            TypeError,
            "positions must be a sequence of integers; got int 5",
        ),
        (
            lambda: masks.global_tokens(positions="05"),  # type: ignore[arg-type]
            TypeError,
            "positions must be a sequence of integers; got str",
        ),
        (
            lambda: masks.global_tokens(data=torch.zeros(3)),  # type: ignore[arg-type]
            TypeError,
            "data must be the name of a data tensor; got Tensor",
        ),
        (lambda: masks.block_window(0, 1), ValueError, "block must be at least 1"),
        (lambda: masks.block_window(8, -1), ValueError, "left must be at least 0"),
        (
            lambda: masks.block_window(2**40, 2**40),
            ValueError,
            "the tokens of the window must be at most",
        ),
        (
            lambda: masks.random_blocks(8, 5, 32),
            ValueError,
            "at most the 4 blocks of 8 tokens that 32 tokens have; got 5",
        ),
        (lambda: masks.random_blocks(1, 2, 2**20), ValueError, "lists at most 1,048,576 tiles"),
        (lambda: masks.random_blocks(8, 1, 0), ValueError, "tokens must be at least 1"),
        (lambda: masks.random_blocks(8, 1, 64, seed=-1), ValueError, "seed must be at least 0"),
        (
            lambda: cd.big_bird(100, 64, 3, 64, 4096),
            ValueError,
            "window must be a multiple of the block of 64 tokens; got 100",
        ),
        (
            lambda: cd.big_bird(64, 1, 3, 64, 4096),
            ValueError,
            "global_tokens must be a multiple of the block",
        ),
        (lambda: cd.big_bird(64, 64, -1, 64, 4096), ValueError, "random must be at least 0"),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
