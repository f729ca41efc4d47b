"""Models of transformers: logits and gradients equal those of eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.transformers_models import (
    CAUSAL,
    ENCODERS,
    TEXT_SETTINGS,
    assert_same,
    assert_same_gradients,
    generated,
    gradients_of,
    inputs_of,
    model_of,
    packed,
    padded,
    pair_of,
    result_of,
    t5,
    without,
)


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_results_and_gradients_are_those_of_eager_attention(name: str) -> None:
    inputs = inputs_of(name)
    assert_same_gradients(*pair_of(name), lambda model: result_of(model(**inputs)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_padding_is_hidden(name: str, side: str) -> None:
    tokens = padded(side)

    def call(model: Any) -> Tensor:
        return result_of(model(**inputs_of(name), attention_mask=tokens))[tokens.bool()]

    assert_same_gradients(*pair_of(name), call)


# transformers' gpt-oss lets packed sequences see each other.
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3"])
def test_packed_sequences_do_not_see_each_other(name: str) -> None:
    model, eager = pair_of(name)
    inputs = {**inputs_of(name), "position_ids": packed(20, 5, 25)}
    out = result_of(model(**inputs, use_cache=False))
    assert_same(out, result_of(eager(**inputs, use_cache=False)))
    second = result_of(model(inputs["input_ids"][:, 20:25], use_cache=False))
    assert_same(out[:, 20:25], second)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 130])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_any_length(name: str, length: int) -> None:
    model, eager = pair_of(name)
    inputs = inputs_of(name, length)
    with torch.no_grad():
        assert_same(result_of(model(**inputs)), result_of(eager(**inputs)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_autocast_is_no_farther_from_the_exact_result_than_eager_attention(name: str) -> None:
    model, eager = pair_of(name)
    with torch.no_grad():
        exact = result_of(eager(**inputs_of(name)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, rounded = result_of(model(**inputs_of(name))), result_of(eager(**inputs_of(name)))
    assert (out - exact).square().mean() <= 1.5 * (rounded - exact).square().mean()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = model_of(name, "compiled_dilated").train()

    def call(model: Any) -> Tensor:
        return result_of(model(**inputs_of(name), use_cache=False))

    expected = gradients_of(model, call)
    model.gradient_checkpointing_enable()
    # The experts of gpt-oss vary from call to call in their last bits, with eager attention too.
    most = 1e-6 * expected.norm() if name == "gpt-oss" else 0.0
    assert (gradients_of(model, call) - expected).norm() <= most


def test_t5_with_its_bias_of_positions() -> None:
    model, eager = t5("compiled_dilated"), t5("eager")
    mask = padded("right")
    labels = inputs_of("llama", 21)["input_ids"]
    inputs = {**inputs_of("llama"), "attention_mask": mask, "labels": labels}
    assert_same_gradients(model, eager, lambda model: result_of(model(**inputs)), most=1e-5)
    tokens = generated(model, attention_mask=mask)
    assert torch.equal(tokens, generated(eager, attention_mask=mask))


def modern_bert(implementation: str) -> Any:
    """ModernBERT, with windows without a direction."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        without(TEXT_SETTINGS, "num_key_value_heads"),
        num_hidden_layers=3,
        local_attention=8,
        bos_token_id=1,
        cls_token_id=1,
        sep_token_id=2,
        attn_implementation=implementation,
    )
    return transformers.ModernBertModel(transformers.ModernBertConfig(**settings)).eval()


def test_a_window_without_a_direction_is_one_in_a_graph_too() -> None:
    torch._dynamo.reset()
    model, eager = modern_bert("compiled_dilated"), modern_bert("eager")
    inputs = inputs_of("llama")
    with torch.no_grad():
        expected = result_of(eager(**inputs))
        assert_same(result_of(model(**inputs)), expected)
        compiled: Any = torch.compile(model, backend="aot_eager")
        assert_same(result_of(compiled(**inputs)), expected)
