"""Masks of transformers' models beyond causal ones and windows.

Chunks, tensors of pairs, cross attention, and rows that see nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.turns import one_in
from tests.transformers_models import (
    LENGTHS,
    TEXT_SETTINGS,
    assert_same,
    assert_same_gradients,
    generated,
    inputs_of,
    model_of,
    packed,
    padded,
    pair_of,
    result_of,
)

LEAST = torch.finfo(torch.float32).min


def llama4(implementation: str) -> Any:
    """Llama 4 with a layer of chunks and a causal one.

    The chunks have 16 tokens.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        TEXT_SETTINGS,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=16,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 1],
        moe_layers=[],
        attn_implementation=implementation,
    )
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings)).eval()


def options_of(kind: str, length: int) -> dict[str, Any]:
    """Arguments of a call beside the tokens."""
    if kind == "padded":
        return {"attention_mask": padded("left", length)}
    if kind == "packed":
        return {"position_ids": packed(20, 5, length - 25), "use_cache": False}
    return {}


KINDS = ("packed", "padded", "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_those_of_eager_attention(kind: str) -> None:
    options = options_of(kind, 50)
    tokens = options.get("attention_mask", torch.ones(2, 50)).bool()

    def call(model: Any) -> Tensor:
        return result_of(model(**inputs_of("llama"), **options))[tokens]

    assert_same_gradients(llama4("compiled_dilated"), llama4("eager"), call)


@pytest.mark.parametrize("kind", one_in(3, list(KINDS)))
def test_chunks_of_ten_lengths_are_two_graphs(kind: str) -> None:
    torch._dynamo.reset()
    model, eager = llama4("compiled_dilated"), llama4("eager")
    backend = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    for length in LENGTHS:
        options = {**options_of(kind, length), "use_cache": False}
        tokens = options.get("attention_mask", torch.ones(2, length)).bool()
        inputs = inputs_of("llama", length)
        with torch.no_grad():
            out = result_of(compiled(**inputs, **options))
            expected = result_of(eager(**inputs, **options))
        assert_same(out[tokens], expected[tokens])
    assert 1 <= backend.frame_count <= 2


@pytest.mark.parametrize("cache", [None, "static"])
def test_chunks_are_generated_as_eager_attention_does(cache: str | None) -> None:
    options = {"cache_implementation": cache, "disable_compile": True}
    tokens = generated(llama4("compiled_dilated"), **options)
    assert torch.equal(tokens, generated(llama4("eager"), **options))


def test_a_program_over_chunks_that_may_be_packed_is_refused_in_a_graph() -> None:
    torch._dynamo.reset()
    model = cd.compile(llama4("eager"), attention=masks.causal())
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"packed sequences of .* and its chunks are one mask"):
        compiled(**inputs_of("llama"), use_cache=False)


# Tensors of one entry for each pair ------------------------------------------------------------


def causal_bias(length: int) -> Tensor:
    """A causal mask as a bias, (1, 1, length, length).

    It is 0 where a key is seen, and the least number elsewhere.
    """
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(1, 1, length, length).masked_fill(later, LEAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_a_tensor_of_pairs_is_added_to_the_scores(dtype: torch.dtype) -> None:
    model, eager = pair_of("llama")
    bias = causal_bias(50)
    mask = bias == 0 if dtype == torch.bool else bias

    def call(called: Any) -> Tensor:
        attention_mask = bias if called is eager else mask
        inputs = {**inputs_of("llama"), "attention_mask": attention_mask}
        return result_of(called(**inputs, use_cache=False))

    assert_same_gradients(model, eager, call)


def test_a_tensor_of_pairs_joins_a_program() -> None:
    program = masks.causal() & masks.window(9)
    model = cd.compile(model_of("llama", "eager"), attention=program)
    bias = causal_bias(50)
    bias[..., 3] = LEAST
    bias[..., 3, 3] = 0  # no row without a key
    far = torch.ones(50, 50, dtype=torch.bool).tril(-10)
    inputs = {**inputs_of("llama"), "use_cache": False}
    with torch.no_grad():
        out = result_of(model(**inputs, attention_mask=bias))
        joint = bias.masked_fill(far, LEAST)
        expected = result_of(model_of("llama", "eager")(**inputs, attention_mask=joint))
    assert_same(out, expected)
    assert "+ a bias" in repr(cd.sites(model))


# Cross attention without is_causal -------------------------------------------------------------


def mllama(implementation: str) -> Any:
    """The text half of Llama 3.2 Vision: layer 1 is cross attention."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        TEXT_SETTINGS,
        eos_token_id=3,
        cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation=implementation,
    )
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(**settings)
    model = transformers.MllamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        # Gates are closed at first: cross attention would add nothing.
        if "gate" in name and weight.numel() == 1:
            torch.nn.init.ones_(weight)
    return model


def of_images(length: int, images: int) -> dict[str, Tensor]:
    """States of images, and masks of text over images.

    The text's first five tokens see no image.
    """
    generator = torch.Generator().manual_seed(1)
    seen = torch.ones(2, 1, length, 1)
    seen[:, :, :5] = 0
    mask = torch.zeros(2, 1, length, images)
    mask[:, :, 5:, images // 2 :] = LEAST
    return {
        "cross_attention_states": torch.randn(2, images, 64, generator=generator),
        "cross_attention_mask": mask,
        "full_text_row_masked_out_mask": seen,
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_cross_attention_of_images_is_that_of_eager_attention(wrapped: bool) -> None:
    model = mllama("compiled_dilated")
    if wrapped:
        program = masks.causal() & masks.window(60)
        model = cd.compile(mllama("eager"), attention={"*.self_attn": program})
    inputs = {**inputs_of("llama"), **of_images(50, 24)}
    assert_same_gradients(model, mllama("eager"), lambda model: result_of(model(**inputs)))
    if wrapped:
        kinds = [site.kind for site in cd.sites(model)]
        assert kinds == ["MllamaTextSelfAttention", "MllamaTextCrossAttention"]
        assert "+ a bias" in repr(cd.sites(model))


def test_one_program_for_cross_attention_too_is_refused() -> None:
    message = "one program for all layers of MllamaForCausalLM would be that of its cross"
    with pytest.raises(ValueError, match=message):
        cd.compile(mllama("eager"), attention=masks.causal())


# Rows that see nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_rows_that_see_nothing_are_those_of_sdpa(name: str) -> None:
    """Attention of a row without a key is 0, as with sdpa.

    With eager it is the mean of values.
    """
    inputs = {**inputs_of(name), "attention_mask": padded("left")}
    model, sdpa = model_of(name, "compiled_dilated"), model_of(name, "sdpa")
    assert_same_gradients(model, sdpa, lambda model: result_of(model(**inputs)))
