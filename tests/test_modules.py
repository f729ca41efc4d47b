"""Modules compute the reference in their own layout, with padding and projections."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import DilatedAttention, MultiheadDilatedAttention, Program
from compiled_dilated.attend import Attend
from compiled_dilated.modules import visible
from tests.support.modules import (
    CAUSAL,
    LENGTHS,
    LONGNET,
    RATES,
    assert_same,
    inputs,
    reference,
    right_padding,
)

SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (DilatedAttention, "segment_lengths dilation_rates softmax_scale=None attention_dropout=0.0"),
    (
        MultiheadDilatedAttention,
        "embed_dim num_heads dilation_rates segment_lengths dropout=0.0 bias=True layer_norm=True "
        "layer_norm_eps=1e-05 gamma_init=1.0 device=None dtype=None",
    ),
    (DilatedAttention.forward, "self query key value is_causal=False key_padding_mask=None"),
    (
        MultiheadDilatedAttention.forward,
        "self query key value is_causal=False key_padding_mask=None need_weights=False",
    ),
]


@pytest.mark.parametrize(("function", "signature"), SIGNATURES)
def test_signatures_are_those_of_the_first_port(
    function: Callable[..., Any], signature: str
) -> None:
    """Of the arguments that its users pass by position."""
    positional = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            has_default = parameter.default is not parameter.empty
            default = f"={parameter.default!r}" if has_default else ""
            positional.append(parameter.name + default)
    assert " ".join(positional) == signature


@pytest.mark.parametrize("n", [1, 2, 37, 130])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dilated_attention_is_the_reference(n: int, is_causal: bool) -> None:
    leaves = inputs(n)
    out = DilatedAttention(LENGTHS, RATES)(*leaves, is_causal=is_causal)
    assert_same(out, reference(CAUSAL if is_causal else LONGNET, *leaves), leaves)


@pytest.mark.parametrize("heads", ["all", "split"])
@pytest.mark.parametrize("offsets", ["cyclic", "grouped"])
@pytest.mark.parametrize("lowering", ["auto", "dense", "strided", "tiled"])
def test_options_reach_the_program(heads: str, offsets: str, lowering: str) -> None:
    leaves = inputs(45, kv_heads=2)
    attention = DilatedAttention(
        LENGTHS, RATES, softmax_scale=0.5, offsets=offsets, heads=heads, lowering=lowering
    )
    program = cd.longnet(LENGTHS, RATES, offsets=offsets, heads=heads)
    assert attention.program(45) == program
    assert_same(attention(*leaves), reference(program, *leaves, scale=0.5), leaves)


def test_keys_of_another_length_and_width() -> None:
    query, key, value = torch.randn(2, 37, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, 5)
    out = DilatedAttention(LENGTHS, RATES)(query, key, value)
    assert out.shape == (2, 37, 4, 5)
    expected = reference(LONGNET, query, key, value)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8, 4, 8), (2, 0, 4, 8), (2, 8, 0, 8)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = DilatedAttention(LENGTHS, RATES)(x, x, x)
    out.sum().backward()
    assert out.shape == shape
    assert x.grad is not None


def test_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Tensor] = []
    call = Attend.__call__

    def recording(self: Attend, *tensors: Tensor, **options: Any) -> Any:
        received.extend(tensors)
        return call(self, *tensors, **options)

    monkeypatch.setattr(Attend, "__call__", recording)
    leaves = inputs(20)
    DilatedAttention(LENGTHS, RATES)(*leaves)
    assert [x.data_ptr() for x in received] == [x.data_ptr() for x in leaves]
    assert [x.shape for x in received] == [(2, 4, 20, 8)] * 3


# Padding


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lowering", ["auto", "dense", "tiled"])
def test_padding_is_the_reference(is_causal: bool, lowering: str) -> None:
    leaves = inputs(67)
    padding = torch.rand(2, 67) < 0.4
    out = DilatedAttention(LENGTHS, RATES, lowering=lowering)(
        *leaves, is_causal=is_causal, key_padding_mask=padding
    )
    program = visible(CAUSAL if is_causal else LONGNET)
    assert isinstance(program, Program)
    assert_same(out, reference(program, *leaves, data={"padding": padding}), leaves)


@pytest.mark.parametrize("is_causal", [False, True])
def test_right_padding_is_cropping(is_causal: bool) -> None:
    """A padded row has the results and gradients of a cropped one.

    The cropped row is computed alone, without padding.
    """
    lengths, n = [61, 1, 40, 17], 61
    attention = DilatedAttention(LENGTHS, RATES)
    leaves = inputs(n, batch=4)
    out = attention(*leaves, is_causal=is_causal, key_padding_mask=right_padding(lengths, n))
    for row, length in enumerate(lengths):
        alone = attention(*(x[row : row + 1, :length] for x in leaves), is_causal=is_causal)
        assert_same(out[row : row + 1, :length], alone, leaves, retain_graph=True)


def test_multihead_padding_is_cropping() -> None:
    lengths, n = [50, 9], 50
    attention = MultiheadDilatedAttention(32, 4, RATES, LENGTHS, dtype=torch.float64)
    x = torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True)
    out, _ = attention(x, x, x, key_padding_mask=right_padding(lengths, n))
    for row, length in enumerate(lengths):
        part = x[row : row + 1, :length]
        alone, _ = attention(part, part, part)
        learned = [x, *attention.parameters()]
        assert_same(out[row : row + 1, :length], alone, learned, retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_nothing_are_zero(dtype: torch.dtype) -> None:
    leaves = inputs(70, dtype)
    padding = torch.tensor([[True] * 70, [False] * 70])  # the complete first sequence is padding
    out = DilatedAttention(LENGTHS, RATES)(*leaves, key_padding_mask=padding)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not out[0].any()
    assert not any(grad[0].any() for grad in grads)
    assert all(x.isfinite().all() for x in (out, *grads))


def test_padded_queries_see_the_keys_that_are_not_padding() -> None:
    leaves = inputs(16)
    padding = right_padding([10, 16], 16)
    out = DilatedAttention((16,), (1,))(*leaves, key_padding_mask=padding)
    query, key, value = leaves
    weights = (torch.einsum("hd,khd->hk", query[0, 15], key[0, :10]) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(out[0, 15], torch.einsum("hk,khd->hd", weights, value[0, :10]))


# Multihead


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_is_projections_around_the_reference(bias: bool, layer_norm: bool) -> None:
    attention = MultiheadDilatedAttention(
        32, 4, RATES, LENGTHS, bias=bias, layer_norm=layer_norm, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    query, key, value = (
        torch.randn(2, 45, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    out, weights = attention(query, key, value, is_causal=True)
    assert weights is None

    state = dict(attention.named_parameters())

    def project(name: str, x: Tensor) -> Tensor:
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if bias else y

    projections = (("q_proj", query), ("k_proj", key), ("v_proj", value))
    heads = [project(name, x).reshape(2, 45, 4, 8) for name, x in projections]
    mixed = reference(CAUSAL, *heads).reshape(2, 45, 32)
    if layer_norm:
        centred = mixed - mixed.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        mixed = centred / deviation * state["norm.weight"] + state["norm.bias"]
    assert_same(out, project("out_proj", mixed), [query, key, value, *attention.parameters()])


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_keys(bias: bool, layer_norm: bool) -> None:
    attention = MultiheadDilatedAttention(32, 4, RATES, LENGTHS, bias=bias, layer_norm=layer_norm)
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    expected = [f"{name}.weight" for name in projections]
    expected += [f"{name}.bias" for name in projections] if bias else []
    expected += ["norm.weight", "norm.bias"] if layer_norm else []
    assert sorted(attention.state_dict()) == sorted(expected)
    assert not DilatedAttention(LENGTHS, RATES).state_dict()


def test_initial_weights_are_those_of_magneto() -> None:
    attention = MultiheadDilatedAttention(256, 4, RATES, LENGTHS, gamma_init=3.0)
    for projection, gain in (("q_proj", 1), ("k_proj", 1), ("v_proj", 3), ("out_proj", 3)):
        linear = attention.get_submodule(projection)
        assert isinstance(linear, nn.Linear)
        # Xavier: variance 2 / (fan_in + fan_out). The standard deviation of 65,536 draws is within
        # 1% of its value, by 3.6 sigma.
        assert linear.weight.std().item() == pytest.approx(gain / 16, rel=0.01)
        assert abs(linear.weight.mean().item()) < 4 * gain / 16 / 256
        assert not linear.bias.any()
    assert isinstance(attention.norm, nn.LayerNorm)
    assert (attention.norm.weight == 1).all()
    assert not attention.norm.bias.any()


def test_modules_on_meta_are_initialized_later() -> None:
    attention = MultiheadDilatedAttention(32, 4, RATES, LENGTHS, device="meta", dtype=torch.float64)
    assert all(parameter.is_meta for parameter in attention.parameters())
    attention.to_empty(device="cpu").reset_parameters()
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    assert attention(x, x, x)[0].isfinite().all()
