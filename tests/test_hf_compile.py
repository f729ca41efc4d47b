"""torch.compile around transformers' models: eager attention's results in two graphs at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_dilated as cd
from tests.transformers_models import (
    LENGTHS,
    assert_same,
    gradients_of,
    inputs_of,
    model_of,
    packed,
    padded,
    pair_of,
    result_of,
)


def graphs_over_lengths(model: Any, expected: Any, call: Callable[[Any, int], Tensor]) -> int:
    """The number of graphs for ten lengths, with another model's results."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for length in LENGTHS:
        assert_same(call(compiled, length), call(expected, length))
    return backend.frame_count


def options_of(name: str) -> dict[str, Any]:
    """BERT has no cache to switch off."""
    return {} if name == "bert" else {"use_cache": False}


@pytest.mark.parametrize(
    "name",
    [
        *("gemma2", "bert"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt-oss", "llama", "mistral")),
    ],
)
def test_ten_lengths_are_two_graphs(name: str) -> None:
    def call(model: Any, length: int) -> Tensor:
        with torch.no_grad():
            return result_of(model(**inputs_of(name, length), **options_of(name)))

    assert graphs_over_lengths(*pair_of(name), call) <= 2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_ten_padded_lengths_are_two_graphs(name: str) -> None:
    def call(model: Any, length: int) -> Tensor:
        mask = padded("left", length)
        inputs = {**inputs_of(name, length), **options_of(name), "attention_mask": mask}
        with torch.no_grad():
            return result_of(model(**inputs))[mask.bool()]

    assert graphs_over_lengths(*pair_of(name), call) <= 2


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_training_over_ten_lengths_is_two_graphs(name: str) -> None:
    def call(model: Any, length: int) -> Tensor:
        inputs = {**inputs_of(name, length), "use_cache": False}
        return gradients_of(model, lambda model: result_of(model(**inputs)))

    assert graphs_over_lengths(*pair_of(name), call) <= 2


def test_a_model_with_a_program_over_ten_lengths_is_two_graphs() -> None:
    program = cd.longnet((16, 64), (1, 4), causal=True)
    model, eager = (cd.compile(model_of("llama", "eager"), attention=program) for _ in range(2))

    def call(model: Any, length: int) -> Tensor:
        with torch.no_grad():
            return result_of(model(**inputs_of("llama", length), use_cache=False))

    assert graphs_over_lengths(model, eager, call) <= 2


def test_packed_sequences_of_any_lengths() -> None:
    torch._dynamo.reset()
    model, eager = pair_of("mistral")
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in ((20, 5, 25), (1, 1, 48), (50,)):
        inputs = {
            **inputs_of("mistral"),
            "position_ids": packed(*lengths),
            "use_cache": False,
        }
        with torch.no_grad():
            assert_same(result_of(compiled(**inputs)), result_of(eager(**inputs)))
