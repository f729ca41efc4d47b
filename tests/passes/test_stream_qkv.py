"""Transformer blocks in chunks of tokens against the same blocks whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from passes.rewrites.rows.attentions import parse
from passes.rewrites.stream_qkv import StreamQKV, attention
from tests.graphs import Block, Gelu, Swiglu, measured_peak
from tests.hooked import Hook, captured, compiled, exported
from tests.support.layers import HEADS, MODELS, WIDTH, Layer, angles, apart, batch, model_of
from tests.support.turns import in_turn, one_in


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_dynamos_graph_agree(name: str) -> None:
    model = model_of(name)
    step, lines = captured(model, StreamQKV(rows=3))
    for tokens in (7, 6, 3, 1):
        x = batch(tokens)
        torch.testing.assert_close(step(x), model(x))
    # Dynamo's graphs of several lengths are rewritten alike.
    assert lines[0].split()[1:] == lines[-1].split()[1:] or name == "two"
    assert len(lines) % MODELS[name][1] == 0
    assert len(lines) >= MODELS[name][1]
    assert all("in chunks of 3 tokens, with keys and values whole: " in line for line in lines)


@torch.no_grad()
@pytest.mark.parametrize("name", one_in(2, list(MODELS)))
def test_chunks_of_an_exported_graph_agree(name: str) -> None:
    model, x = model_of(name), batch(7)
    dynamic = ({1: torch.export.Dim("tokens", min=2)},)
    module, lines = exported(model, StreamQKV(rows=3), x, dynamic=dynamic)
    for tokens in (7, 2):
        x = batch(tokens)
        torch.testing.assert_close(module(x), model(x))
    assert len(lines) == MODELS[name][1]


# Sequences and tokens, as many as there are heads or features.
COINCIDING = ((HEADS, HEADS), (WIDTH, WIDTH), (HEADS, WIDTH), (WIDTH, HEADS), (1, HEADS))


@torch.no_grad()
@pytest.mark.parametrize(("name", "sequences", "tokens"), in_turn(list(MODELS), COINCIDING))
def test_dims_are_recognized_if_sizes_coincide(name: str, sequences: int, tokens: int) -> None:
    """There are four heads of four features, with as many sequences or tokens."""
    model = model_of(name)
    step, lines = captured(model, StreamQKV(rows=3), dynamic=False)
    x = torch.randn(sequences, tokens, WIDTH, dtype=torch.float64)
    turns = angles(tokens) if name in ("apart", "as llama") else ()
    torch.testing.assert_close(step(x, *turns), model(x, *turns))
    assert len(lines) == MODELS[name][1]


def heads(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)


def tokens_and_batch_exchanged(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """With as many tokens as sequences no size differs."""
    keys = heads(y.transpose(0, 1))
    attended = F.scaled_dot_product_attention(heads(F.linear(x, weight)), keys, keys)
    return x + F.linear(attended.transpose(1, 2).flatten(2), weight)


def heads_of_an_input(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    attended = F.scaled_dot_product_attention(heads(F.linear(x, weight)), heads(y), heads(y))
    return x + F.linear(attended.transpose(1, 2).flatten(2), weight)


def named_arguments(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    rows = F.linear(x, weight).unflatten(-1, (HEADS, WIDTH // HEADS))
    keys = torch.transpose(input=rows, dim0=1, dim1=2)
    attended = F.scaled_dot_product_attention(keys, keys, keys)
    return x + y * F.linear(attended.transpose(1, 2).flatten(2), weight)


def contiguous() -> Tensor:
    return torch.randn(5, 5, WIDTH, dtype=torch.float64)


def part_of_a_storage() -> Tensor:
    return torch.randn(25 * WIDTH + 4, dtype=torch.float64)[4:].view(5, 5, WIDTH)


ROWS: dict[str, Callable[[], Tensor]] = {
    "contiguous": contiguous,
    "tokens outermost": lambda: contiguous().transpose(0, 1),
    "part of a storage": part_of_a_storage,
}


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "function", [tokens_and_batch_exchanged, heads_of_an_input, named_arguments]
)
def test_heads_are_recognized_by_strides(function: Callable[..., Tensor], rows: str) -> None:
    x, y = contiguous(), ROWS[rows]()
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    step, lines = captured(function, StreamQKV(rows=2), dynamic=False)
    torch.testing.assert_close(step(x, y, weight), function(x, y, weight))
    # Heads of rows that are not contiguous are no range of their features.
    is_rewritten = {
        heads_of_an_input: rows != "tokens outermost",
        named_arguments: True,
        tokens_and_batch_exchanged: False,
    }
    assert bool(lines) == is_rewritten[function]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_the_angles_of_a_rotary_embedding_are_chunked(shape: tuple[int, ...]) -> None:
    model = model_of("as llama")
    step, lines = captured(model, StreamQKV(rows=3))
    for tokens in (7, 5):
        x, turns = batch(tokens), angles(tokens, shape)
        torch.testing.assert_close(step(x, *turns), model(x, *turns))
    assert len(lines) >= 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["as llama", "as timm"])
def test_one_call_replaces_a_block_and_computes_nothing_twice(name: str) -> None:
    """A recipe computes only its part of a packed linear.

    The part is queries, keys or values.
    """
    hook = Hook(StreamQKV(rows=3))
    calls: list[Node] = []

    def backend(module: Any, _: Any) -> Any:
        hook(module.graph)
        for node in module.graph.nodes:
            if node.op.startswith("call") and node.users:
                calls.append(node)
        return module

    torch._dynamo.reset()
    turns = angles(7) if name == "as llama" else ()
    torch.compile(model_of(name), backend=backend)(batch(7), *turns)
    (call,) = calls
    assert str(call.target) == "passes.streamed.default"
    # The range of features in each recipe, by start and length.
    parts: list[list[tuple[str, str]]] = []
    for text in call.args[2:5]:
        assert "= linear(" not in str(text)
        parts.append(re.findall(r"linear_part\(.*start=(\d+), length=(\d+)\)", str(text)))
    if name == "as llama":
        assert parts == [[("0", "16")], [("0", "8")], [("0", "8")]]
    else:
        assert parts == [[("0", "16")], [("16", "16")], [("32", "16")]]


@torch.library.custom_op("tests::before", mutates_args=())
def before(
    query: Tensor, key: Tensor, value: Tensor, window: int, start: int = 0, first: int = 0
) -> Tensor:
    """Attention of each query to itself and the `window` tokens before it."""
    distance = torch.arange(query.shape[2])[:, None] + start - torch.arange(key.shape[2]) - first
    return F.scaled_dot_product_attention(query, key, value, (distance >= 0) & (distance <= window))


@before.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, window: int, start: int = 0, first: int = 0
) -> Tensor:
    return torch.empty_like(query)


# Keys of each call.
KEY_COUNTS: list[int] = []


def part(
    query: Tensor, key: Tensor, value: Tensor, start: int, first: int, *, window: int
) -> Tensor:
    KEY_COUNTS.append(key.shape[2])
    return before(query, key, value, window, start, first)


attention(
    torch.ops.tests.before.default,
    read=lambda query, key, value, window: {"window": window},
    reach=lambda start, stop, tokens, *, window: (max(0, start - window), stop),
    part=part,
)


@torch.no_grad()
def test_a_registered_attention_gets_the_keys_in_its_reach() -> None:
    class Windowed(Layer):
        def forward(self, x: Tensor, *angles: Tensor) -> Tensor:
            q, k, v = self.split(self, self.before(x))
            return x + self.out(torch.ops.tests.before(q, k, v, 4).transpose(1, 2).flatten(2))

    model, x = Windowed(apart).double(), batch(11)
    step, lines = captured(model, StreamQKV(rows=3))
    KEY_COUNTS.clear()
    torch.testing.assert_close(step(x), model(x))
    assert KEY_COUNTS == [3, 6, 7, 6]
    assert "whole: tests.before.default" in lines[0]


def test_an_unregistered_attention_is_named() -> None:
    message = r"elsewhere\.op is no attention registered for stream_qkv. Import the module"
    with pytest.raises(KeyError, match=message):
        parse("('elsewhere.op', {})")


@torch.no_grad()
def test_blocks_compiled_by_inductor_agree() -> None:
    model = model_of("as llama")
    step, lines = compiled(model, StreamQKV(rows=3))
    for tokens in (7, 4):
        x, turns = batch(tokens), angles(tokens)
        torch.testing.assert_close(step(x, *turns), model(x, *turns))
    assert len(lines) >= 1


@pytest.mark.slow
@torch.no_grad()
def test_blocks_of_a_package_agree(tmp_path: Path) -> None:
    """In every run the exported graph is compared, before it is compiled."""
    model, x, hook = model_of("as llama"), batch(7), Hook(StreamQKV(rows=3))
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
def test_a_block_peaks_at_three_activations(mlp: Callable[[int], nn.Module]) -> None:
    """The activations are keys, values and the result.

    On one thread: attention has a workspace for each thread.
    """
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
