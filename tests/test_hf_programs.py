"""Programs for the layers of transformers' models.

They replace or join masks, and are saved and printed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.programs import as_program
from tests.transformers_models import (
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

PROGRAMS: dict[str, Any] = {
    "longnet": cd.longnet((16, 64), (1, 4), causal=True),
    "window": cd.masks.window(9, 0),
    "window and sinks": masks.causal() & (masks.window(16) | masks.sinks(4)),
    "full causal": masks.causal(),
}


def with_program(name: str, attention: Any) -> Any:
    return cd.compile(model_of(name, "eager"), attention=attention)


def bias_of(program: cd.Program, length: int, heads: int) -> Tensor:
    """The mask that eager attention adds to scores, (1, heads, length, length).

    The log of how many branches link a pair.
    """
    count = torch.zeros(1, heads, length, length)
    q, kv = torch.arange(length)[:, None], torch.arange(length)[None]
    for branch in program.branches:
        for head in branch.head_range(heads):
            allowed = branch.mask_at(head, heads).allows(torch.tensor(0), torch.tensor(head), q, kv)
            count[0, head] += torch.as_tensor(allowed).expand(length, length)
    return count.log().clamp(min=torch.finfo(torch.float32).min)


def joined(bias: Tensor, visible: Tensor) -> Tensor:
    """The bias where a key is visible, the least number elsewhere."""
    return torch.where(visible, bias, torch.finfo(bias.dtype).min)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_program_takes_the_place_of_the_models_structure(name: str, program: Any) -> None:
    registered, eager = pair_of(name)
    model = cd.compile(registered, attention=program)
    mask = bias_of(as_program(program), 50, 4)

    def call(called: Any) -> Tensor:
        options = {"attention_mask": mask} if called is eager else {}
        return result_of(called(**inputs_of(name), **options, use_cache=False))

    assert_same_gradients(model, eager, call)


def test_a_program_is_joined_with_padding() -> None:
    registered, eager = pair_of("llama")
    model = cd.compile(registered, attention=PROGRAMS["longnet"])
    padding = padded("left")
    mask = joined(bias_of(as_program(PROGRAMS["longnet"]), 50, 4), padding[:, None, None] == 1)
    inputs = inputs_of("llama")
    with torch.no_grad():
        out = result_of(model(**inputs, attention_mask=padding))
        expected = result_of(eager(**inputs, attention_mask=mask))
    # Results at padding have no meaning.
    assert_same(out[0, 7:], expected[0, 7:])
    assert_same(out[1], expected[1])


def test_a_program_is_joined_with_packed_sequences() -> None:
    registered, eager = pair_of("llama")
    model = cd.compile(registered, attention=PROGRAMS["longnet"])
    documents = torch.arange(50) < 20
    mask = joined(bias_of(as_program(PROGRAMS["longnet"]), 50, 4), documents[:, None] == documents)
    inputs = inputs_of("llama") | {"position_ids": packed(20, 30)}
    with torch.no_grad():
        out = result_of(model(**inputs, use_cache=False))
        expected = result_of(eager(**inputs, attention_mask=mask, use_cache=False))
    assert_same(out, expected)


def test_generate_with_a_program_is_its_forward_token_by_token() -> None:
    model = with_program("llama", PROGRAMS["window and sinks"])
    x = inputs_of("llama")["input_ids"]
    tokens = generated(model)
    for _ in range(20):
        with torch.no_grad():
            x = torch.cat([x, result_of(model(x, use_cache=False))[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, x)


def test_programs_by_layer() -> None:
    window = PROGRAMS["window"]
    by_pattern = with_program("llama", {"*.layers.0.*": window})
    by_function = with_program("llama", lambda layer: window if layer.index == 0 else None)
    everywhere = with_program("llama", window)
    with torch.no_grad():
        models = (by_pattern, by_function, everywhere)
        first, second, third = [result_of(model(**inputs_of("llama"))) for model in models]
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)
    # The second layer is computed here too, by the model's own mask.
    table = cd.sites(by_pattern)
    assert [row.to_json()["program"] is not None for row in table] == [True, True]
    assert [site.program is None for site in table] == [False, True]


def test_the_table_of_sites_counts_pairs() -> None:
    model = with_program("gemma3", None)
    assert repr(cd.sites(model)).count("not called yet") == 2
    with torch.no_grad():
        model(**inputs_of("gemma3", 130))
    sliding, full = [site.to_json() for site in cd.sites(model)]
    assert sliding["model"] == f"window(15, {2**30}) & causal()"
    assert full["model"] == "causal()"
    # Two sequences of four heads; the query at position i sees at most 16 keys, or all i + 1.
    of_sequence = sum(range(1, 131))
    assert full["pairs"] >= 8 * of_sequence
    assert sliding["pairs"] < full["pairs"] < full["pairs_eager"] == 8 * 130 * 130
    assert not sliding["at_most"]
    # Products with keys and with values of width 16: a product and a sum for each number.
    assert full["flops_eager"] == 4 * 16 * full["pairs_eager"]
    assert full["flops"] == 4 * 16 * full["pairs"]
    assert full["bytes_eager"] == 4 * full["pairs_eager"]
    assert 0 < full["bytes"] < full["bytes_eager"]
    assert "GFLOP" in repr(cd.sites(model))
    assert "<=" not in repr(cd.sites(model))


def test_the_table_of_sites_bounds_pairs_that_depend_on_data() -> None:
    model = with_program("llama", masks.causal() & masks.window(9))
    inputs = inputs_of("llama", 400)
    with torch.no_grad():
        model(**inputs, use_cache=False)
        without_documents, _ = [site.to_json() for site in cd.sites(model)]
        model(**inputs, position_ids=packed(100, 300), use_cache=False)
    row, _ = [site.to_json() for site in cd.sites(model)]
    assert "documents(ids='position_ids')" in row["program"]
    assert row["at_most"]
    # No more than without documents; far fewer than all pairs.
    assert row["pairs"] == without_documents["pairs"] < 0.2 * row["pairs_eager"]
    assert "-> <= " in repr(cd.sites(model))
    assert "reads data that only a call has" in repr(cd.sites(model))


@pytest.mark.slow
def test_the_trainer_trains(tmp_path: Any) -> None:
    class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            ids = inputs_of("llama", 60 + index, 1)["input_ids"][0][:60]
            return {"input_ids": ids, "labels": ids}

    losses = []
    for implementation in ("compiled_dilated", "eager"):
        arguments = transformers.TrainingArguments(
            tmp_path / implementation,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
        )
        model = model_of("llama", implementation)
        trainer = transformers.Trainer(model, arguments, train_dataset=Text())
        trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    ours, eager = losses
    assert len(ours) == 4
    assert ours == pytest.approx(eager, rel=1e-3)
    assert ours[-1] < ours[0]


def test_a_wrapped_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model = with_program("llama", PROGRAMS["longnet"])
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    loaded = cd.compile(loaded, attention=PROGRAMS["longnet"])
    inputs = inputs_of("llama")
    with torch.no_grad():
        assert torch.equal(result_of(loaded(**inputs)), result_of(model(**inputs)))
