"""Unsupported features of transformers' models are refused by name.

The error has a way out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import compiled_dilated as cd
from compiled_dilated import masks
from tests.transformers_models import (
    TEXT_SETTINGS,
    inputs_of,
    model_of,
    t5,
    without,
)


def test_a_mask_of_the_wrong_shape_is_refused() -> None:
    model = model_of("llama", "compiled_dilated")
    message = r"got a mask of shape \(1, 1, 50, 9\); expected .* = \(2, 4, 50, 50\), or 1 in"
    with pytest.raises(ValueError, match=message):
        model(**inputs_of("llama"), attention_mask=torch.zeros(1, 1, 50, 9))
    with pytest.raises(ValueError, match=r"attention_mask must be .*; got shape \(2, 50, 50\)"):
        model(**inputs_of("llama"), attention_mask=torch.ones(2, 50, 50))


def test_attention_under_another_name_without_masks_is_refused() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from compiled_dilated.hf import attention, masking

    model = model_of("llama", "compiled_dilated")
    expected = model(**inputs_of("llama")).logits
    AttentionInterface.register("by_hand", attention.attention)
    AttentionMaskInterface.register("by_hand_masked", masking.mask)
    AttentionInterface.register("by_hand_masked", attention.attention)
    model.set_attn_implementation("by_hand")
    message = r"'by_hand' without a mask function: .*\.hf\.register\(\)"
    with pytest.raises(ValueError, match=message):
        model(**inputs_of("llama"))
    model.set_attn_implementation("by_hand_masked")
    assert torch.equal(model(**inputs_of("llama")).logits, expected)


def test_dropout_and_weights_are_refused() -> None:
    dropout = {"attention_probs_dropout_prob": 0.1}
    bert = model_of("bert", "compiled_dilated", **dropout).train()
    message = r"no dropout of attention weights; BertSelfAttention asks for 0.1"
    with pytest.raises(ValueError, match=message):
        bert(**inputs_of("bert"))
    llama = model_of("llama", "compiled_dilated")
    with pytest.raises((ValueError, NotImplementedError), match="attentions"):
        llama(**inputs_of("llama"), output_attentions=True)


def test_unknown_masks_are_refused_by_name() -> None:
    from transformers.masking_utils import create_causal_mask

    config = model_of("llama", "compiled_dilated").config
    embeds = torch.zeros(1, 8, 64)

    def of_images(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv < 3

    with pytest.raises(NotImplementedError, match="or_mask_function"):
        create_causal_mask(config, embeds, None, None, or_mask_function=of_images)
    blocks = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="does not know the mask function or_masks"):
        create_causal_mask(config, embeds, None, None, block_sequence_ids=blocks)


# attention=, and the error with its message.
BAD_ATTENTION: dict[str, tuple[Any, type[Exception], str]] = {
    "sees later keys": (
        cd.local_window(16),
        ValueError,
        r"model.layers.0.self_attn is causal, and its program shows later keys",
    ),
    "pattern": (
        {"*.attention.*": masks.causal()},
        ValueError,
        r"no layer matches '\*.attention.\*'. The layers: model.layers.0",
    ),
    "pattern of another type": (
        {3: masks.causal()},
        TypeError,
        r"patterns must be text",
    ),
    "number": (
        7,
        TypeError,
        r"must be a program, a mask, a function of a layer or {pattern: program}; got int 7",
    ),
    "result of a function": (
        lambda layer: "causal",
        TypeError,
        r"attention of model.layers.0.self_attn must be a program, a mask or None; got str",
    ),
}


def test_heads_that_a_model_lacks_are_named_before_it_changes() -> None:
    model = model_of("bert", "eager")
    program = cd.Program((cd.Branch(masks.documents(ids="d"), heads=(0, 99)),))
    with pytest.raises(ValueError, match="heads"):
        cd.compile(model, attention=program)
    assert model.config._attn_implementation == "eager"
    model(**inputs_of("bert"))


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_bad_attention_is_named_before_the_model_changes(case: str) -> None:
    attention, error, message = BAD_ATTENTION[case]
    model = model_of("llama", "eager")
    with pytest.raises(error, match=message):
        cd.compile(model, attention=attention)
    assert model.config._attn_implementation == "eager"


def test_a_program_over_a_sliding_cache_is_refused() -> None:
    program = masks.causal() & (masks.window(16) | masks.sinks(4))
    model = cd.compile(model_of("mistral", "eager"), attention=program)
    message = r"the sliding cache of model.layers.0.self_attn has dropped keys"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs_of("mistral"), max_new_tokens=5, do_sample=False)


def test_a_program_that_sees_later_keys_is_refused_by_the_mask_of_a_call() -> None:
    """CLIP's layers do not say that they are causal; its mask does."""
    settings = without(TEXT_SETTINGS, "num_key_value_heads", "eos_token_id")
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings, eos_token_id=127))
    cd.compile(clip, attention=masks.window(3))
    message = r"the mask of .* is causal, and its program shows later keys"
    with pytest.raises(ValueError, match=message):
        clip(**inputs_of("llama"))


def test_one_program_for_a_model_with_cross_attention_is_refused() -> None:
    message = "one program for all layers of T5ForConditionalGeneration would be that of its cross"
    with pytest.raises(ValueError, match=message):
        cd.compile(t5("eager"), attention=masks.causal())
    window = masks.causal() & masks.window(4)
    model = cd.compile(t5("eager"), attention={"decoder.*.SelfAttention": window})
    assert sum(site.program is not None for site in cd.sites(model)) == 2


def test_models_that_add_their_mask_to_scores_are_refused() -> None:
    """BLOOM's attention is not transformers' AttentionInterface."""
    settings: dict[str, Any] = {"hidden_size": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128}
    settings["attn_implementation"] = "compiled_dilated"
    config = transformers.BloomConfig(**settings)
    with pytest.raises(TypeError, match=r"computes with its mask, .* is no tensor. Use attn_impl"):
        transformers.BloomForCausalLM(config)(**inputs_of("llama"))


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.3.0", "5.3.1.dev0"])
def test_an_older_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    message = rf"needs transformers >= 5.4; got {version}. Install a newer one: pip install"
    with pytest.raises(ImportError, match=message):
        cd.hf.register()


@pytest.mark.parametrize("version", ["5.4.0", "5.10.4", "6.0.0.dev0"])
def test_a_newer_transformers_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    cd.hf.register()
