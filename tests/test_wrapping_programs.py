"""Programs for wrapped models of any kind.

They replace or join the masks of some calls.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.wrapped import (
    HEADS,
    MODULES,
    SEEN,
    TOKENS,
    Multihead,
    Net,
    Q,
    X,
    assert_close,
    assert_same,
    wrapped,
)

PROGRAMS = {
    "longnet": cd.longnet((16, 32), (1, 2), causal=True),
    "window": masks.causal() & masks.window(9),
}
PLACES = torch.arange(TOKENS)


def beyond(radius: int) -> Tensor:
    """The pairs outside of a window."""
    return (PLACES[:, None] - PLACES).abs() > radius


class ByHand(Net):
    """Net as its author would write it with a program."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.attend = cd.compile(program)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        block: Any
        for block in self.blocks:
            y = block.norm(x)
            q = block.q(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            k, v = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in block.kv(y).chunk(2, -1))
            x = x + block.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_replaces_a_causal_call(program: Any) -> None:
    net, by_hand = Net(), ByHand(program)
    by_hand.load_state_dict(net.state_dict())
    model, _ = wrapped(net, program)
    assert_same(model, by_hand, X)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_a_program_in_modules_of_torch(name: str, training: bool) -> None:
    model, plain = wrapped(MODULES[name]().train(training), masks.window(3))
    far = beyond(3)
    if isinstance(plain, Multihead):
        expected = plain.attention(X, X, X, attn_mask=far)[0]
    else:
        expected = plain(X, mask=far)
    assert_close(model(X), expected)
    assert not torch.allclose(model(X), plain(X), atol=1e-3)


def test_a_program_is_joined_with_the_mask_of_a_call() -> None:
    model, plain = wrapped(Net(), masks.window(9))
    near = ~beyond(9)
    padding = PLACES[None, None, None] < torch.tensor([50, 31])[:, None, None, None]
    for mask in (padding, SEEN, SEEN[0, 0]):
        assert_close(model(X, mask), plain(X, mask & near))


def test_programs_by_path() -> None:
    window = PROGRAMS["window"]
    everywhere, plain = wrapped(Net(), window)
    by_path, _ = wrapped(copy.deepcopy(plain), {"blocks.0": window})
    by_function, _ = wrapped(
        copy.deepcopy(plain), lambda layer: window if layer.path == "blocks.0" else None
    )
    assert torch.equal(by_path(X), by_function(X))
    assert not torch.allclose(by_path(X), everywhere(X))
    assert [site.program is None for site in cd.sites(by_path)] == [False, True]


class Twice(nn.Module):
    """Two calls in one module."""

    def forward(self, q: Tensor) -> Tensor:
        q = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(q, q, q)


def test_two_calls_of_a_module_are_two_sites() -> None:
    window = masks.window(3)
    model, _ = wrapped(Twice(), lambda layer: window if layer.path.endswith("#2") else None)
    first = cd.compile(masks.full())(Q[0], Q[0], Q[0])
    assert_close(model(Q[0]), cd.compile(window)(first, first, first))
    assert [site.path for site in cd.sites(model)] == ["", "#2"]


def test_inductors_caches_distinguish_programs() -> None:
    """The second round finds the first round's graphs on disk."""
    for _ in range(2):
        for radius in (3, 9):
            torch.manual_seed(0)
            encoder = MODULES["encoder"]().eval()
            plain = copy.deepcopy(encoder)
            torch._dynamo.reset()
            with torch.no_grad():
                out = cd.compile(encoder, attention=masks.window(radius))(X)
                assert_close(out, plain(X, mask=beyond(radius)))
