"""Models of any kind, wrapped without a program.

Results and gradients stay the same.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.tracing import is_traced
from tests.support.wrapped import (
    HEADS,
    MODULES,
    SEEN,
    TOKENS,
    WIDTH,
    Bare,
    Net,
    Q,
    X,
    assert_close,
    assert_gradients,
    assert_same,
    wrapped,
)

LENGTHS = torch.tensor([TOKENS, 31])
MASKS = {
    "causal": None,
    "padding": torch.arange(TOKENS)[None, None, None] < LENGTHS[:, None, None, None],
    "of pairs": SEEN,
    "of pairs and heads": SEEN.expand(2, HEADS, TOKENS, TOKENS),
    "two dimensions": SEEN[0, 0],
    "bias": torch.randn(1, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)),
    "bias of -inf": torch.zeros(2, 1, TOKENS, TOKENS).masked_fill(~SEEN, -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_of_a_call(mask: Tensor | None) -> None:
    assert_same(*wrapped(Net()), X, mask)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_checkpoints(kv_heads: int, checkpointed: bool) -> None:
    model, plain = wrapped(Net(checkpointed, kv_heads=kv_heads))
    assert_same(model, plain, X)
    assert [site.path for site in cd.sites(model)] == ["blocks.0", "blocks.1"]


# Modules of torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch(name: str, training: bool) -> None:
    model, plain = wrapped(MODULES[name]().train(training))
    assert_same(model, plain, X)
    with torch.no_grad():
        assert_close(model(X), plain(X))
    assert len(cd.sites(model)) == (2 if name == "encoder" else 1)
    assert "not called" not in repr(cd.sites(model))


def test_masks_of_an_encoder() -> None:
    model, plain = wrapped(MODULES["encoder"]())
    padding = torch.arange(TOKENS)[None] >= LENGTHS[:, None]
    bias = padding.float().masked_fill(padding, -torch.inf)
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    assert_same(model, plain, X, src_key_padding_mask=padding)
    assert_same(model, plain, X, mask=causal, is_causal=True)
    assert_same(model, plain, X, mask=causal, is_causal=False)
    assert_same(model, plain, X, mask=causal, is_causal=False, src_key_padding_mask=bias)


def test_an_encoder_and_decoder() -> None:
    model, plain = wrapped(nn.Transformer(WIDTH, HEADS, 1, 1, 96, 0.0, batch_first=True))
    assert_same(model, plain, X, X[:, :33])
    assert [site.path for site in cd.sites(model)] == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]


def test_a_padded_mask_with_is_causal_that_is_not_causal() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, 0.0, batch_first=True)
    places = torch.arange(TOKENS)
    far = (places[:, None] - places).abs() > 5
    masks: dict[str, Any] = {
        "src_mask": torch.zeros(TOKENS, TOKENS).masked_fill(far, -torch.inf),
        "src_key_padding_mask": torch.zeros(2, TOKENS),
    }
    assert_same(*wrapped(layer), X, **masks, is_causal=True)


class WithZeroKey(nn.Module):
    """nn.MultiheadAttention with one more key, which its causal mask does not cover."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
        return self.attention(x, x, x, attn_mask=hidden, is_causal=True)[0]


def test_a_causal_mask_beside_a_key_that_all_queries_see() -> None:
    assert_same(*wrapped(WithZeroKey()), X)


# Masks of any dimensions -----------------------------------------------------------------------

FIVE_DIMENSIONS = {
    "of batches": (2, 1, 1, 20, 20),
    "of the inner batch": (1, 3, 1, 20, 20),
    "four dimensions": (3, HEADS, 20, 20),
    "keys": (3, 1, 1, 20),
    "one key": (2, 1, 1, 1, 1),
}


@pytest.mark.parametrize("shape", FIVE_DIMENSIONS.values(), ids=FIVE_DIMENSIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_any_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    numbers = torch.randn(shape)
    mask = numbers > -0.5 if dtype == torch.bool else numbers
    for q in (Q, Q[0], Q[0, 0]):
        if len(shape) > q.dim():
            continue
        model, plain = wrapped(Bare())
        assert_close(model(q, mask), plain(q, mask))


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(3, 20, 20) > 0.3,
        torch.rand(3, 1, 20) > 0.3,
        torch.randn(3, 20, 20).requires_grad_(),
    ],
    ids=["pairs", "keys", "learned"],
)
def test_the_first_of_three_dimensions_is_a_batch(mask: Tensor) -> None:
    model, plain = wrapped(Bare())
    q = Q[0, :, 0].clone().requires_grad_()
    learned = [x for x in (q, mask) if x.requires_grad]
    assert_gradients(model(q, mask), plain(q, mask), learned)


# Threads ---------------------------------------------------------------------------------------


def test_threads_share_two_graphs() -> None:
    """More threads than torch's limit of graphs, each with a length of its own."""
    model, plain = wrapped(Net())
    torch._dynamo.utils.counters.clear()
    inputs = [X[:, :tokens] for tokens in range(20, 32)]
    with ThreadPoolExecutor(len(inputs)) as threads:
        results = list(threads.map(model, inputs))
    for x, result in zip(inputs, results, strict=True):
        assert_close(result, plain(x))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_call_behind_a_graph_break_is_not_traced() -> None:
    """Dynamo skips `outer`, and compiles the functions that it calls one by one."""

    @torch._dynamo.disable(recursive=False)
    def outer(x: Tensor) -> Tensor:
        return x + is_traced()

    inside = torch.compile(lambda x: x + is_traced(), backend="eager", fullgraph=True)
    behind = torch.compile(lambda x: outer(2 * x), backend="eager")
    for _ in range(2):
        assert inside(torch.zeros(1)) == 1
        assert behind(torch.zeros(1)) == 0


def test_a_compilation_in_another_thread_changes_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's flag of a compilation is one for all threads."""
    model, plain = wrapped(Net())
    assert_close(model(X), plain(X))
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert not is_traced()
    assert_close(model(X), plain(X))
    bad: Any = lambda score, b: score  # noqa: E731
    with pytest.raises(TypeError, match="arguments"):
        cd.compile(masks.causal())(Q[0], Q[0], Q[0], score_mod=bad)
