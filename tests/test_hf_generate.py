"""generate() of transformers' models: the tokens equal those of eager attention."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.transformers_models import CAUSAL, generated, padded, pair_of


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_are_the_same(name: str, padding: str, cache: str | None) -> None:
    model, eager = pair_of(name)
    mask = padded("left") if padding == "left" else torch.ones(2, 50, dtype=torch.long)
    options = {"attention_mask": mask, "cache_implementation": cache, "disable_compile": True}
    assert torch.equal(generated(model, **options), generated(eager, **options))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams_are_the_same(name: str) -> None:
    model, eager = pair_of(name)
    options = {"attention_mask": padded("left"), "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generated(model, **options), generated(eager, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_compiled_decode_gives_the_same_tokens(name: str) -> None:
    torch._dynamo.reset()
    model, eager = pair_of(name)
    options = {"attention_mask": padded("left"), "cache_implementation": "static"}
    expected = generated(eager, **options, disable_compile=True)
    assert torch.equal(generated(model, **options), expected)
