"""Small models of transformers with random weights, by name; eager and ours have the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

TOKENS = 128
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_BERT = {
    "num_key_value_heads": None,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_VIT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}

# Name: class, config, settings.
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_TEXT, "sliding_window": 16}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_TEXT, "head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_TEXT, "head_dim": 16, "sliding_window": 16, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_TEXT, **_GEMMA3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, **_NO_DROPOUT}),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_TEXT,
            "head_dim": 16,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": (
        "BertModel",
        "BertConfig",
        {key: value for key, value in {**_TEXT, **_BERT}.items() if value is not None},
    ),
    "vit": ("ViTModel", "ViTConfig", _VIT),
}


def model_of(name: str, implementation: str, **changes: Any) -> Any:
    """The model in eval mode; the same weights for every implementation."""
    kind, config, settings = {**CAUSAL, **ENCODERS}[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(
        **{**settings, **changes}, attn_implementation=implementation
    )
    return getattr(transformers, kind)(made).eval()


def pair_of(name: str, **changes: Any) -> tuple[Any, Any]:
    """Ours, and transformers' eager attention."""
    return model_of(name, "compiled_dilated", **changes), model_of(name, "eager", **changes)


def inputs_of(name: str, length: int = 50, batch: int = 2) -> dict[str, Tensor]:
    """Arguments of the model."""
    generator = torch.Generator().manual_seed(length)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 48, 48, generator=generator)}
    return {"input_ids": torch.randint(1, TOKENS, (batch, length), generator=generator)}


def result_of(output: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def gradients_of(model: Any, call: Callable[[Any], Tensor]) -> Tensor:
    """All gradients of the mean square of a result, as one vector."""
    model.zero_grad()
    call(model).float().square().mean().backward()
    return torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    )
