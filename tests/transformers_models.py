"""Small random models of transformers, and comparisons with eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import compiled_dilated as cd

cd.hf.register()
transformers.logging.set_verbosity_error()

TOKENS = 128
# Lengths for tests that count graphs.
LENGTHS = (40, 50, 61, 77, 100, 123, 64, 128, 33, 200)
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
_ENDS = {"pad_token_id": 0, "eos_token_id": None}
TEXT_SETTINGS = {
    **_WIDTHS,
    **_LAYERS,
    **_ENDS,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
    "max_position_embeddings": 512,
}
_SLIDING = {"head_dim": 16, "sliding_window": 16}
_GEMMA2 = {**_SLIDING, "attn_logit_softcapping": 2.0}
_GEMMA3 = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_GPT_OSS = {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {
    **_ENDS,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": TOKENS,
    "bos_token_id": 1,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VIT = {**_WIDTHS, **_LAYERS, "image_size": 48, "patch_size": 8}


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """Settings of a config without some of them."""
    return {name: value for name, value in settings.items() if name not in names}


def _text(**changes: Any) -> dict[str, Any]:
    return {**TEXT_SETTINGS, **changes}


_OF_BERT = {**without(TEXT_SETTINGS, "num_key_value_heads", "eos_token_id"), **_BERT}

# Name: class, config, settings.
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT_SETTINGS),
    "mistral": ("MistralForCausalLM", "MistralConfig", _text(sliding_window=16)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _text(head_dim=16)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _text(**_GEMMA2)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _text(**_GEMMA3)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", _text(**_GPT_OSS)),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _OF_BERT),
    "vit": ("ViTModel", "ViTConfig", _VIT),
}


def model_of(name: str, implementation: str, **changes: Any) -> Any:
    """A model in eval mode; the same weights for every implementation."""
    kind, config, settings = {**CAUSAL, **ENCODERS}[name]
    torch.manual_seed(0)
    configured = getattr(transformers, config)(
        **{**settings, **changes}, attn_implementation=implementation
    )
    return getattr(transformers, kind)(configured).eval()


def pair_of(name: str, **changes: Any) -> tuple[Any, Any]:
    """A model with this library's attention, and one with transformers' eager attention."""
    return model_of(name, "compiled_dilated", **changes), model_of(name, "eager", **changes)


def t5(implementation: str) -> Any:
    """T5, whose layers add a learned bias of positions."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": TOKENS,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
        "attn_implementation": implementation,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).eval()


def inputs_of(name: str, length: int = 50, batch: int = 2) -> dict[str, Tensor]:
    """Arguments of a model."""
    generator = torch.Generator().manual_seed(length)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 48, 48, generator=generator)}
    return {"input_ids": torch.randint(1, TOKENS, (batch, length), generator=generator)}


def padded(side: str, length: int = 50) -> Tensor:
    """attention_mask (2, length); 7 places of the first sequence are padding."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(length - 7, length)] = 0
    return mask


def packed(*lengths: int) -> Tensor:
    """position_ids (2, sum of lengths) of sequences packed into one row."""
    return torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)


def result_of(output: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def gradients_by_name(model: Any, call: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The gradient of a weighted mean square of a result by each parameter.

    The weights differ: the mean square of what a layer norm returns is constant.
    """
    model.zero_grad()
    result = call(model).float()
    (torch.linspace(0.5, 1.5, result.shape[-1]) * result.square()).mean().backward()
    named = model.named_parameters()
    return {name: weight.grad for name, weight in named if weight.grad is not None}


def gradients_of(model: Any, call: Callable[[Any], Tensor]) -> Tensor:
    """All gradients of `gradients_by_name`, as one vector."""
    return torch.cat([grad.flatten() for grad in gradients_by_name(model, call).values()])


def generated(model: Any, **options: Any) -> Tensor:
    """Tokens of 20 greedy steps."""
    settings = {"max_new_tokens": 20, "do_sample": False, **options}
    tokens: Tensor = model.generate(**inputs_of("llama"), **settings)
    return tokens


def assert_same(result: Tensor, expected: Tensor, most: float = 5e-6) -> None:
    """Equal up to a relative error."""
    assert result.isfinite().all()
    largest = max(1.0, float(expected.detach().abs().max()))
    assert (result - expected).abs().max() <= most * largest


def assert_same_gradients(
    model: Any, expected: Any, call: Callable[[Any], Tensor], most: float = 5e-6
) -> None:
    """Equal results and gradients of two models.

    Each parameter's gradient is compared by itself: those of sinks are a small share of all. That
    of a key's bias is 0 but for rounding, which is a share of all.

    call: runs one of them.
    """
    assert_same(call(model), call(expected), most)
    results, gradients = gradients_by_name(model, call), gradients_by_name(expected, call)
    assert results.keys() == gradients.keys()
    whole = torch.cat([grad.flatten() for grad in gradients.values()]).norm()
    for name, gradient in gradients.items():
        error = (results[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-9 * whole, name
