"""Transformer blocks in chunks of tokens against the same blocks whole: however heads are packed, whatever attends."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.rewrites.stream_qkv import StreamQKV, attention
from tests.graphs import Block, Gelu, Swiglu, measured_peak
from tests.hooked import Hook, captured, compiled, exported

WIDTH, HEADS = 16, 4
Heads = tuple[Tensor, Tensor, Tensor]


class Rotary(nn.Module):
    """Turns the halves of a head by the angles of its token's position, as Llama does."""

    def forward(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = heads[..., : heads.shape[-1] // 2], heads[..., heads.shape[-1] // 2 :]
        return heads * cos + torch.cat((-right, left), dim=-1) * sin


class Layer(nn.Module):
    """A block with its heads made one way of several, and its attention called one way of several."""

    def __init__(
        self,
        split: Callable[[nn.Module, Tensor], Heads],
        mlp: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        kv_heads = 2 if options.get("enable_gqa") else HEADS
        self.packed = nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.k, self.v = (
            nn.Linear(WIDTH, heads * WIDTH // HEADS, bias=False)
            for heads in (HEADS, kv_heads, kv_heads)
        )
        self.out, self.before, self.between = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.RMSNorm(WIDTH),
        )
        self.split, self.mlp, self.options, self.rotary = (
            split,
            mlp or Swiglu(WIDTH),
            options,
            Rotary(),
        )

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        if angles:
            q, k = self.rotary(q, *angles), self.rotary(k, *angles)
        attended = F.scaled_dot_product_attention(q, k, v, **self.options)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.between(x))


def apart(layer: Any, h: Tensor) -> Heads:
    q, k, v = (
        each(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
        for each in (layer.q, layer.k, layer.v)
    )
    return q, k, v


def as_llama(layer: Any, h: Tensor) -> Heads:
    batch, tokens, _ = h.shape
    q, k, v = (
        each(h).view(batch, tokens, -1, WIDTH // HEADS).transpose(1, 2)
        for each in (layer.q, layer.k, layer.v)
    )
    return q, k, v


def as_gpt(layer: Any, h: Tensor) -> Heads:
    q, k, v = (
        each.view(*h.shape[:2], HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)
        for each in layer.packed(h).split(WIDTH, dim=2)
    )
    return q, k, v


def as_timm(layer: Any, h: Tensor) -> Heads:
    q, k, v = (
        layer.packed(h)
        .reshape(*h.shape[:2], 3, HEADS, WIDTH // HEADS)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    return q, k, v


def unbound(layer: Any, h: Tensor) -> Heads:
    q, k, v = (
        each.transpose(1, 2) for each in layer.packed(h).unflatten(-1, (3, HEADS, -1)).unbind(2)
    )
    return q, k, v


def interleaved(layer: Any, h: Tensor) -> Heads:
    """Heads whose q, k and v stand together: no run of features is the queries."""
    q, k, v = layer.packed(h).unflatten(-1, (HEADS, 3, -1)).transpose(1, 2).unbind(3)
    return q, k, v


def angles(tokens: int, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    turns = torch.arange(tokens)[:, None] * torch.rand(2, dtype=torch.float64).repeat(2)
    return turns.cos().view(*shape, tokens, 4), turns.sin().view(*shape, tokens, 4)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gelu": (lambda: Block(Gelu(WIDTH), WIDTH), 1),
    "two": (
        lambda: nn.Sequential(
            Block(Gelu(WIDTH), WIDTH), Block(Swiglu(WIDTH), WIDTH), nn.LayerNorm(WIDTH)
        ),
        2,
    ),
    "apart": (lambda: Layer(apart, is_causal=True), 1),
    "as llama": (lambda: Layer(as_llama, is_causal=True, enable_gqa=True), 1),
    "as gpt": (lambda: Layer(as_gpt, Gelu(WIDTH), is_causal=True, scale=0.3), 1),
    "as timm": (lambda: Layer(as_timm), 1),
    "unbound": (lambda: Layer(unbound, is_causal=True), 1),
    "after an embedding": (
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), Layer(apart)),
        1,
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double().eval()


def batch(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_dynamo(name: str) -> None:
    model = made(name)
    step, lines = captured(model, StreamQKV(rows=3))
    for tokens in (7, 6, 3, 1):
        x = batch(tokens)
        torch.testing.assert_close(step(x), model(x))
    assert lines[0].split()[1:] == lines[-1].split()[1:] or name == "two"
    assert len(lines) % MODELS[name][1] == 0
    assert len(lines) >= MODELS[name][1]
    assert all("in chunks of 3 tokens, with keys and values whole: " in line for line in lines)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_export(name: str) -> None:
    model, x = made(name), batch(7)
    module, lines = exported(
        model, StreamQKV(rows=3), x, dynamic=({1: torch.export.Dim("tokens", min=2)},)
    )
    for tokens in (7, 2):
        x = batch(tokens)
        torch.testing.assert_close(module(x), model(x))
    assert len(lines) == MODELS[name][1]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_as_many_tokens_as_heads_and_features(name: str) -> None:
    """Four heads of four features: with four sequences of four tokens all sizes are equal, and numbers in the graph."""
    model = made(name)
    for sequences, tokens in (
        (HEADS, HEADS),
        (WIDTH, WIDTH),
        (HEADS, WIDTH),
        (WIDTH, HEADS),
        (1, HEADS),
    ):
        step, lines = captured(model, StreamQKV(rows=3), dynamic=False)
        x = torch.randn(sequences, tokens, WIDTH, dtype=torch.float64)
        turns = angles(tokens) if name in ("apart", "as llama") else ()
        torch.testing.assert_close(step(x, *turns), model(x, *turns))
        assert len(lines) == MODELS[name][1]


def heads(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)


def tokens_and_batch_exchanged(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """With as many tokens as sequences the exchange shows in no size."""
    keys = heads(y.transpose(0, 1))
    return x + F.linear(
        F.scaled_dot_product_attention(heads(F.linear(x, weight)), keys, keys)
        .transpose(1, 2)
        .flatten(2),
        weight,
    )


def heads_of_an_input(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    attended = F.scaled_dot_product_attention(heads(F.linear(x, weight)), heads(y), heads(y))
    return x + F.linear(attended.transpose(1, 2).flatten(2), weight)


def named_arguments(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    keys = torch.transpose(
        input=F.linear(x, weight).unflatten(-1, (HEADS, WIDTH // HEADS)), dim0=1, dim1=2
    )
    return x + y * F.linear(
        F.scaled_dot_product_attention(keys, keys, keys).transpose(1, 2).flatten(2), weight
    )


ROWS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(5, 5, WIDTH, dtype=torch.float64),
    "tokens outermost": lambda: torch.randn(5, 5, WIDTH, dtype=torch.float64).transpose(0, 1),
    "from the middle of a storage": lambda: torch.randn(25 * WIDTH + 4, dtype=torch.float64)[
        4:
    ].view(5, 5, WIDTH),
}


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "function", [tokens_and_batch_exchanged, heads_of_an_input, named_arguments]
)
def test_heads_are_those_of_their_strides(function: Callable[..., Tensor], rows: str) -> None:
    x, y, weight = (
        ROWS["contiguous"](),
        ROWS[rows](),
        torch.randn(WIDTH, WIDTH, dtype=torch.float64),
    )
    step, lines = captured(function, StreamQKV(rows=2), dynamic=False)
    torch.testing.assert_close(step(x, y, weight), function(x, y, weight))
    # A view of rows that are not contiguous is no run of their features.
    understood = {
        heads_of_an_input: rows != "tokens outermost",
        named_arguments: True,
        tokens_and_batch_exchanged: False,
    }
    assert bool(lines) == understood[function]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_rotary_embedding_goes_with_its_tokens(shape: tuple[int, ...]) -> None:
    model = made("as llama")
    step, lines = captured(model, StreamQKV(rows=3))
    for tokens in (7, 5):
        x, turns = batch(tokens), angles(tokens, shape)
        torch.testing.assert_close(step(x, *turns), model(x, *turns))
    assert len(lines) >= 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["as llama", "as timm"])
def test_one_node_is_left_and_computes_nothing_twice(name: str) -> None:
    """Of a packed linear a recipe has the queries alone, or the keys, or the values."""
    hook, called = Hook(StreamQKV(rows=3)), []

    def backend(module: Any, _: Any) -> Any:
        hook(module.graph)
        called.extend(
            node for node in module.graph.nodes if node.op.startswith("call") and node.users
        )
        return module

    torch._dynamo.reset()
    model = made(name)
    torch.compile(model, backend=backend)(batch(7), *(angles(7) if name == "as llama" else ()))
    assert [str(node.target) for node in called] == ["passes.streamed.default"]
    parts = [
        re.findall(r"linear_part\(.*start=(\d+), length=(\d+)\)", text)
        for text in called[0].args[2:5]
    ]
    starts, lengths = (
        (0, 0, 0) if name == "as llama" else (0, 16, 32),
        (16, 8, 8) if name == "as llama" else (16, 16, 16),
    )
    assert parts == [
        [(str(start), str(length))] for start, length in zip(starts, lengths, strict=True)
    ]
    assert all("= linear(" not in text for text in called[0].args[2:5])


def test_gradients_are_left_alone() -> None:
    model, x = made("apart"), batch(7)
    step, lines = captured(model, StreamQKV(rows=3))
    torch.testing.assert_close(step(x), model(x), rtol=0, atol=0)
    assert step(x).requires_grad
    assert lines == []
    model.requires_grad_(False)
    step, lines = captured(model, StreamQKV(rows=3))
    torch.testing.assert_close(step(x), model(x))
    assert len(lines) >= 1


class Masked(Layer):
    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return x + self.out(
            F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        )


class Crossed(Layer):
    """Keys of other tokens than the queries."""

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        return x + self.out(
            F.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2]).transpose(1, 2).flatten(2)
        )


class Reversed(Layer):
    """Keys in another order."""

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        attended = F.scaled_dot_product_attention(q, k.flip(2), v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Cached(Layer):
    """Keys and values that the caller keeps."""

    def forward(self, x: Tensor, *angles: Tensor) -> Any:
        q, k, v = self.split(self, self.before(x))
        return (
            x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)),
            k,
            v,
        )


class Unswapped(Layer):
    """Heads and tokens are not put back before they are joined."""

    def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
        q, k, v = self.split(self, self.before(x))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).reshape(x.shape))


LEFT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "masked": lambda: Masked(apart),
    "crossed": lambda: Crossed(apart),
    "reversed": lambda: Reversed(apart),
    "cached": lambda: Cached(apart),
    "unswapped": lambda: Unswapped(apart),
    "interleaved": lambda: Layer(interleaved),
    "dropout": lambda: Layer(apart, dropout_p=0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    model, x = LEFT_ALONE[name]().double(), batch(7)
    step, lines = captured(model, StreamQKV(rows=3))
    results = []
    for run in (step, model):
        torch.manual_seed(1)
        results.append(run(x))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert lines == []


@torch.library.custom_op("tests::before", mutates_args=())
def before(
    query: Tensor, key: Tensor, value: Tensor, window: int, start: int = 0, first: int = 0
) -> Tensor:
    """Each query sees itself and the `window` tokens before it."""
    distance = torch.arange(query.shape[2])[:, None] + start - torch.arange(key.shape[2]) - first
    return F.scaled_dot_product_attention(query, key, value, (distance >= 0) & (distance <= window))


@before.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, window: int, start: int = 0, first: int = 0
) -> Tensor:
    return torch.empty_like(query)


SEEN: list[int] = []


def part(
    query: Tensor, key: Tensor, value: Tensor, start: int, first: int, *, window: int
) -> Tensor:
    SEEN.append(key.shape[2])
    return before(query, key, value, window, start, first)


attention(
    torch.ops.tests.before.default,
    read=lambda query, key, value, window: {"window": window},
    reach=lambda start, stop, tokens, *, window: (max(0, start - window), stop),
    part=part,
)


@torch.no_grad()
def test_another_attention_says_what_it_reaches() -> None:
    class Windowed(Layer):
        def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
            q, k, v = self.split(self, self.before(x))
            return x + self.out(torch.ops.tests.before(q, k, v, 4).transpose(1, 2).flatten(2))

    model, x = Windowed(apart).double(), batch(11)
    step, lines = captured(model, StreamQKV(rows=3))
    SEEN.clear()
    torch.testing.assert_close(step(x), model(x))
    assert SEEN == [3, 6, 7, 6]
    assert "whole: tests.before.default" in lines[0]


def test_an_attention_that_is_not_there_is_named() -> None:
    from passes.rewrites.rows.attentions import parse

    with pytest.raises(
        KeyError, match=r"elsewhere\.op is no attention that stream_qkv knows. Import the module"
    ):
        parse("('elsewhere.op', {})")


@torch.no_grad()
def test_compiled_and_packaged(tmp_path: Path) -> None:
    model, x = made("as llama"), batch(7)
    step, lines = compiled(model, StreamQKV(rows=3))
    for tokens in (7, 4):
        x, turns = batch(tokens), angles(tokens)
        torch.testing.assert_close(step(x, *turns), model(x, *turns))
    assert len(lines) >= 1
    hook = Hook(StreamQKV(rows=3))
    program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={"pre_grad_custom_pass": hook},
    )
    x = batch(9)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))
    assert len(hook.lines) == 1


@torch.no_grad()
@pytest.mark.parametrize("mlp", [Gelu, pytest.param(Swiglu, marks=pytest.mark.slow)])
def test_peak_of_a_block(mlp: Callable[[int], nn.Module]) -> None:
    """Keys, values and the result are three activations. Each thread of an attention has some working memory."""
    tokens, features = 8192, 128
    model, x = Block(mlp(features), features, 2).eval(), torch.randn(1, tokens, features)
    step, lines = compiled(model, StreamQKV(rows=64), dynamic=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    step(x)
    measured = measured_peak(partial(step, x))
    torch.set_num_threads(threads)
    assert len(lines) == 1
    assert measured <= 3.2 * x.nbytes


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": 0}, "rows must be at least 1; got 0"),
    ({"chunk_bytes": 0}, "chunk_bytes must be at least 1; got 0"),
    (
        {"rows": 1, "chunk_bytes": 1},
        "rows or chunk_bytes, not both; got StreamQKV(rows=1, chunk_bytes=1)",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StreamQKV(**options)
