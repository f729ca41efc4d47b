"""Programs that read data, in transformers' models: model(input_ids, data={name: tensor})."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping.graphs import exportable
from tests.transformers_models import (
    CAUSAL,
    ENCODERS,
    LENGTHS,
    assert_same,
    assert_same_gradients,
    generated,
    inputs_of,
    model_of,
    padded,
    pair_of,
    result_of,
)

PROGRAM = masks.causal() & masks.documents(ids="docs") & masks.padding("hidden")
# The prompt and all new tokens of `generated`.
ALL_TOKENS = 70


def data_of(tokens: int = 50) -> dict[str, Tensor]:
    """Two sequences of documents, of which the first tokens are not hidden."""
    places = torch.arange(tokens)
    lengths = torch.tensor([[9], [14]])
    return {"docs": places // lengths, "hidden": places % lengths % 5 == 3}


def mask_of(data: dict[str, Tensor], seen: Tensor | None = None) -> Tensor:
    """The program as the mask that eager attention adds to scores, (2, 1, tokens, tokens).

    seen: (2, tokens), the attention_mask of a call.
    """
    docs = data["docs"]
    allowed = docs[:, :, None] == docs[:, None, :]
    allowed &= torch.ones(docs.shape[1], docs.shape[1], dtype=torch.bool).tril()
    allowed &= ~data["hidden"][:, None]
    if seen is not None:
        allowed &= seen.bool()[:, None]
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


def wrapped(name: str = "llama", attention: Any = PROGRAM) -> Any:
    return cd.compile(model_of(name, "eager"), attention=attention)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_data_of_a_call_joins_its_padding(name: str, checkpointed: bool) -> None:
    model, eager = wrapped(name), model_of(name, "eager")
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen, data = padded("right"), data_of()

    def call(called: Any) -> Tensor:
        options: dict[str, Any] = {"attention_mask": mask_of(data, seen)}
        if called is model:
            options = {"attention_mask": seen, "data": data}
        logits = result_of(called(**inputs_of(name), **options, use_cache=False))
        return logits[seen.bool()]

    assert_same_gradients(model, eager, call)


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_data_reaches_the_layers_of_every_model(name: str) -> None:
    tokens = 37 if name == "vit" else 50
    model = wrapped(name, masks.causal() & masks.documents(ids="docs"))
    one = torch.zeros(1, tokens, dtype=torch.long)
    many = torch.arange(tokens)[None] // 12
    with torch.no_grad():
        results = [result_of(model(**inputs_of(name), data={"docs": docs})) for docs in (one, many)]
    # The first of the documents sees as much of itself as of all tokens.
    assert_same(results[0][:, :12], results[1][:, :12])
    assert not torch.allclose(results[0], results[1], atol=1e-3)


def test_the_module_of_a_package_takes_data_by_position() -> None:
    model, inputs = wrapped(), inputs_of("llama")["input_ids"]
    data = data_of()
    with exportable(model, (inputs, data["docs"], data["hidden"]), ()) as module, torch.no_grad():
        result = result_of(module(inputs, data["docs"], data["hidden"]))
        assert torch.equal(result, result_of(model(inputs, data=data)))


def test_a_layer_reads_its_own_data_alone() -> None:
    by_layer = wrapped(attention={"*.0.*": PROGRAM, "*.1.*": masks.causal()})
    plain = wrapped(attention={"*.0.*": PROGRAM})
    with torch.no_grad():
        calls = [model(**inputs_of("llama"), data=data_of()) for model in (by_layer, plain)]
    out, same = map(result_of, calls)
    assert torch.equal(out, same)
    table = [site.to_json() for site in cd.sites(by_layer)]
    assert [row["at_most"] for row in table] == [True, False]


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_takes_the_data_of_all_tokens(cache: str | None) -> None:
    model = wrapped()
    x, data = inputs_of("llama")["input_ids"], data_of(ALL_TOKENS)
    tokens = generated(model, data=data, cache_implementation=cache, disable_compile=True)
    for _ in range(20):
        with torch.no_grad():
            logits = result_of(model(x, data=data, use_cache=False))
        x = torch.cat([x, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, x)


def test_generate_with_beams_takes_repeated_rows() -> None:
    model = wrapped()
    one_row = {name: x[:1] for name, x in data_of(ALL_TOKENS).items()}
    repeated = {name: x.repeat_interleave(6, 0) for name, x in one_row.items()}
    tokens = [generated(model, num_beams=3, data=data) for data in (one_row, repeated)]
    assert torch.equal(*tokens)


def test_ten_lengths_with_data_are_two_graphs() -> None:
    torch._dynamo.reset()
    model = wrapped()
    backend = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    for length in LENGTHS:
        inputs = {**inputs_of("llama", length), "data": data_of(length), "use_cache": False}
        with torch.no_grad():
            assert_same(result_of(compiled(**inputs)), result_of(model(**inputs)))
    assert 1 <= backend.frame_count <= 2


def test_a_copy_takes_data_and_a_model_wrapped_anew_takes_none() -> None:
    model = wrapped()
    inputs = {**inputs_of("llama"), "data": data_of()}
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        expected = result_of(model(**inputs))
        cd.compile(model, attention=masks.causal())
        assert torch.equal(result_of(duplicate(**inputs)), expected)
        assert not torch.equal(result_of(model(**inputs_of("llama"))), expected)
    assert "forward" not in vars(model)


class Dropping(torch.nn.Module):
    """A layer that hands no keywords on."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("data", None)
        return self.layer(hidden_states, attention_mask=attention_mask, **kwargs)


def dropping() -> Any:
    model = wrapped()
    model.model.layers[0] = Dropping(model.model.layers[0])
    return model


SHORT = r"data\['docs'\] has 50 tokens, and the cache of model.layers.0.self_attn 51. generate\(\)"
BEAMS = (
    r"data\['docs'\] has 2 rows, and model.layers.0.self_attn a batch of 6. For beams .*\(3, 0\)"
)
# A call, and its error with the message.
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (
        lambda: wrapped()(**inputs_of("llama")),
        ValueError,
        r"the programs of LlamaForCausalLM read the data tensors \['docs', 'hidden'\]; got \[\]",
    ),
    "another name": (
        lambda: wrapped()(**inputs_of("llama"), data={**data_of(), "doc": data_of()["docs"]}),
        ValueError,
        r"got \['doc', 'docs', 'hidden'\]. Pass data={name: tensor} with exactly those",
    ),
    "no dict": (
        lambda: wrapped()(**inputs_of("llama"), data=data_of()["docs"]),
        TypeError,
        "data must be a dict of tensors by name; got Tensor",
    ),
    "no tensor": (
        lambda: wrapped()(**inputs_of("llama"), data={**data_of(), "docs": [0, 1]}),
        TypeError,
        r"data\['docs'\] must be a bool or integer tensor; got list",
    ),
    "without a program of data": (
        lambda: wrapped(attention=masks.causal())(**inputs_of("llama"), data=data_of()),
        ValueError,
        r"the programs of LlamaForCausalLM read the data tensors \[\]; got \['docs', 'hidden'\]",
    ),
    "without a program": (
        lambda: pair_of("llama")[0](**inputs_of("llama"), data=data_of()),
        ValueError,
        r"no program of LlamaAttention reads data; got \['docs', 'hidden'\]. Pass the model",
    ),
    "a part of the model": (
        lambda: wrapped().model(**inputs_of("llama")),
        ValueError,
        "the data docs, hidden did not reach model.layers.0.self_attn: LlamaForCausalLM does not",
    ),
    "a layer without keywords": (
        lambda: dropping()(**inputs_of("llama"), data=data_of()),
        ValueError,
        r"did not reach model.layers.0.self_attn: .* does not hand on keywords \(\*\*kwargs\)",
    ),
    "the prompt's alone": (lambda: generated(wrapped(), data=data_of()), ValueError, SHORT),
    "beams": (
        lambda: generated(wrapped(), data=data_of(ALL_TOKENS), num_beams=3),
        ValueError,
        BEAMS,
    ),
    "the name of an argument": (
        lambda: wrapped(attention=masks.causal() & masks.padding("attention_mask")),
        ValueError,
        r"reads the data 'attention_mask', which is an argument of the model",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_data_is_refused(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
