"""Bad arguments and inputs of modules are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_dilated import DilatedAttention, MultiheadDilatedAttention
from tests.support.modules import LENGTHS, RATES


def random(*shape: int) -> Tensor:
    """A tensor of this shape, by default (2, 10, 4, 8)."""
    return torch.randn(shape or (2, 10, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"attention_dropout": 0.1},
            ValueError,
            "attention_dropout=0.1 cannot be honoured.*Pass 0.0.*torch.nn.Dropout",
        ),
        ({"attention_dropout": 2}, ValueError, "attention_dropout must be a number in"),
        ({"attention_dropout": None}, ValueError, "attention_dropout must be a number in"),
        (
            {"softmax_scale": "auto"},
            TypeError,
            "softmax_scale must be a finite number; got str 'auto'",
        ),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be a finite number; got inf"),
        ({"segment_lengths": 16}, TypeError, "segment_lengths must be a sequence"),
        ({"segment_lengths": (16,)}, ValueError, "must be of one length; got 1 and 2"),
        ({"dilation_rates": (1, 0)}, ValueError, r"dilation_rates\[1\] must be at least 1; got 0"),
        ({"heads": "some"}, ValueError, "heads must be one of"),
        ({"offsets": "none"}, ValueError, "offsets must be one of"),
        ({"lowering": "fast"}, ValueError, "lowering must be one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedAttention(**{"segment_lengths": LENGTHS, "dilation_rates": RATES} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dropout": 0.1}, ValueError, "dropout=0.1 cannot be honoured"),
        ({"embed_dim": 30}, ValueError, "embed_dim must be a multiple of num_heads; got 30 and 4"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"num_heads": 4.0}, TypeError, "num_heads must be an integer"),
        ({"gamma_init": "deepnet"}, ValueError, "gamma_init must be a finite number"),
        ({"bias": 1}, TypeError, "bias must be True or False"),
        ({"layer_norm": None}, TypeError, "layer_norm must be True or False"),
        ({"dilation_rates": (1,)}, ValueError, "must be of one length; got 2 and 1"),
    ],
)
def test_bad_multihead_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "embed_dim": 32,
        "num_heads": 4,
        "dilation_rates": RATES,
        "segment_lengths": LENGTHS,
    }
    with pytest.raises(error, match=message):
        MultiheadDilatedAttention(**good | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor; got list"),
        (
            {"key": random(2, 10, 32)},
            ValueError,
            r"key must be \(batch, tokens, heads, head_dim\); got shape \(2, 10, 32\)",
        ),
        (
            {"value": random(2, 9, 4, 8)},
            ValueError,
            "key and value must agree in batch, heads and tokens",
        ),
        ({"query": random(3, 10, 4, 8)}, ValueError, "query and key must have one batch size"),
        ({"query": random(2, 10, 4, 6)}, ValueError, "query and key must have one head_dim"),
        (
            {"query": random(2, 10, 6, 8)},
            ValueError,
            "the 6 query heads must be a multiple of the 4 key heads",
        ),
        ({"query": random().double()}, TypeError, "must have one dtype"),
        (
            {"query": random().long(), "key": random().long(), "value": random().long()},
            TypeError,
            "must be float16, bfloat16, float32 or float64",
        ),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
        (
            {"key_padding_mask": torch.zeros(2, 10)},
            TypeError,
            "key_padding_mask must be a bool tensor.*got torch.float32",
        ),
        (
            {"key_padding_mask": [[False]]},
            TypeError,
            "key_padding_mask must be a bool tensor.*got list",
        ),
        (
            {"key_padding_mask": torch.zeros(2, 9) > 0},
            ValueError,
            r"of the key, \(2, 10\); got \(2, 9\)",
        ),
        (
            {"key_padding_mask": torch.zeros(10) > 0},
            ValueError,
            r"of the key, \(2, 10\); got \(10,\)",
        ),
    ],
)
def test_bad_inputs(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedAttention(LENGTHS, RATES)(
            **{"query": random(), "key": random(), "value": random()} | arguments
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": "x"}, TypeError, "query must be a torch.Tensor; got str"),
        (
            {"query": random(10, 32)},
            ValueError,
            r"query must be \(batch, tokens, embed_dim=32\); got shape \(10, 32\)",
        ),
        (
            {"value": random(2, 10, 16)},
            ValueError,
            r"value must be \(batch, tokens, embed_dim=32\); got shape \(2, 10, 16\)",
        ),
        ({"need_weights": True}, ValueError, "need_weights=True asks for the attention weights"),
        (
            {"key_padding_mask": torch.zeros(2, 10)},
            TypeError,
            "key_padding_mask must be a bool tensor",
        ),
    ],
)
def test_bad_multihead_inputs(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    module = MultiheadDilatedAttention(32, 4, RATES, LENGTHS)
    x = random(2, 10, 32)
    with pytest.raises(error, match=message):
        module(**{"query": x, "key": x, "value": x} | arguments)
