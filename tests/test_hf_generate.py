"""generate() of transformers' models: tokens and scores equal those of eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.transformers_models import CAUSAL, assert_same, inputs_of, padded, pair_of


def assert_same_steps(model: Any, eager: Any, **options: Any) -> None:
    """Equal tokens of 20 steps, and equal scores of each step.

    The scores of a random model differ long before its tokens do.
    """
    outputs = []
    for called in (model, eager):
        settings = {"max_new_tokens": 20, "do_sample": False, **options}
        output = called.generate(
            **inputs_of("llama"), **settings, return_dict_in_generate=True, output_scores=True
        )
        outputs.append(output)
    ours, expected = outputs
    assert torch.equal(ours.sequences, expected.sequences)
    assert_same(torch.stack(ours.scores), torch.stack(expected.scores), most=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_steps_are_the_same(name: str, padding: str, cache: str | None) -> None:
    model, eager = pair_of(name)
    mask = padded("left") if padding == "left" else torch.ones(2, 50, dtype=torch.long)
    options = {"attention_mask": mask, "cache_implementation": cache, "disable_compile": True}
    assert_same_steps(model, eager, **options)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams_are_the_same(name: str) -> None:
    model, eager = pair_of(name)
    assert_same_steps(
        model, eager, attention_mask=padded("left"), num_beams=3, num_return_sequences=2
    )


def test_scores_see_a_padding_that_is_one_shorter() -> None:
    _, eager = pair_of("llama")
    shorter = padded("left")
    shorter[0, 6] = 1
    scores = []
    for mask in (padded("left"), shorter):
        output = eager.generate(
            **inputs_of("llama"),
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores.append(output.scores[0])
    with pytest.raises(AssertionError):
        assert_same(scores[0], scores[1], most=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_compiled_decode_gives_the_same_steps(name: str) -> None:
    torch._dynamo.reset()
    model, eager = pair_of(name)
    options = {"attention_mask": padded("left"), "cache_implementation": "static"}
    eager.generation_config.disable_compile = True
    assert_same_steps(model, eager, **options)
