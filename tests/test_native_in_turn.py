"""Tiles of long programs that are computed in turn, on copies of rows that are far apart.

The order of a tile's keys is the same as that of tiles one after the other, and so are its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.native import build

# More keys than the copies of two ranges; tiles and stretches are cut short at the end.
TOKENS = 9 * 1024 + 65

reason = build.available()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no native kernel here: {reason}")


def inputs(tokens: int = TOKENS) -> list[Tensor]:
    """q, k and v, their rows one after the other."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 32), (2, 32), (2, 16)
    return [torch.randn(1, heads, tokens, dim, generator=generator) for heads, dim in shapes]


def far_apart(x: Tensor) -> Tensor:
    """The same numbers, their rows 2 KiB apart."""
    wide = torch.full((*x.shape[:3], 512), torch.nan)
    wide[..., : x.shape[3]] = x
    return wide[..., : x.shape[3]]


def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 2 * torch.tanh(score / 2)


PADDING = torch.zeros(1, TOKENS, dtype=torch.bool)
PADDING[:, 3000:3100] = True
PROGRAMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "causal": (masks.causal(), {}),
    "score_mod": (masks.causal(), {"score_mod": capped}),
    "two branches": (cd.Program((cd.Branch(masks.full()), cd.Branch(masks.causal()))), {}),
    "padding": (masks.causal() & masks.padding(), {"data": {"padding": PADDING}}),
    "some long tiles": (masks.window(50) | masks.prefix(9100) | masks.sinks(3), {}),
    "by head": (cd.Program((cd.Branch(masks.full(), (0, 2)), cd.Branch(masks.window(9)))), {}),
}


# bfloat16 has a kernel of its own on CPUs with AMX.
@pytest.mark.parametrize("change", [far_apart, Tensor.half], ids=["far apart", "float16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_bits_are_those_of_tiles_one_after_the_other(
    name: str, change: Callable[[Tensor], Tensor]
) -> None:
    program, options = PROGRAMS[name]
    attend = cd.compile(program, lowering="native")
    changed = [change(x) for x in inputs()]
    plain = [x.float().contiguous() for x in changed]
    out, lse = attend(*changed, return_lse=True, **options)
    expected, expected_lse = attend(*plain, return_lse=True, **options)
    assert torch.equal(out, expected.to(out.dtype))
    assert torch.equal(lse, expected_lse)


def test_a_ring_merges_such_tiles() -> None:
    """The second rank continues from its own tokens with those of the first."""
    changed = [x.half() for x in inputs(2 * TOKENS)]
    ring = cd.compile(masks.causal(), ranks=2, layout="contiguous")
    expected = cd.compile(masks.causal())(*changed)
    torch.testing.assert_close(ring(*changed), expected, rtol=0, atol=2e-3)


def test_hidden_nan_has_no_effect() -> None:
    q, k, v = map(far_apart, inputs())
    attend = cd.compile(masks.causal(), lowering="native")
    expected = attend(q, k, v)[:, :, :9000]
    k[:, :, 9000:] = torch.nan
    out = attend(q, k, v)
    assert torch.equal(out[:, :, :9000], expected)
    assert out[:, :, 9000:].isnan().all()
