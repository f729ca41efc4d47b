"""Masks of transformers' models beyond causal ones and windows: chunks, tensors of pairs, cross attention, hidden rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from transformers_models import CAUSAL, gradients_of, inputs_of, model_of, pair_of, result_of  # noqa: E402

import compiled_dilated as cd  # noqa: E402
from compiled_dilated import masks  # noqa: E402

cd.hf.register()


def assert_same(ours: Tensor, theirs: Tensor, most: float = 5e-6) -> None:
    assert ours.isfinite().all()
    assert (ours - theirs).abs().max() <= most * max(1.0, float(theirs.detach().abs().max()))


def llama4(implementation: str) -> Any:
    """Llama 4, whose first layer sees chunks of 16 tokens and whose second sees all before."""
    torch.manual_seed(0)
    settings = {
        key: value for key, value in CAUSAL["llama"][2].items() if key != "num_hidden_layers"
    }
    config = transformers.Llama4TextConfig(
        **settings,
        num_hidden_layers=2,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=16,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 1],
        moe_layers=[],
        attn_implementation=implementation,
    )
    return transformers.Llama4ForCausalLM(config).eval()


PACKED = torch.cat([torch.arange(n) for n in (20, 5, 25)])[None].expand(2, -1)
LEFT = torch.ones(2, 50, dtype=torch.long)
LEFT[0, :7] = 0
CALLS: dict[str, dict[str, Any]] = {
    "whole": {},
    "padded": {"attention_mask": LEFT},
    "packed": {"position_ids": PACKED, "use_cache": False},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_chunks_are_those_of_eager_attention(options: dict[str, Any]) -> None:
    ours, theirs = llama4("compiled_dilated"), llama4("eager")
    tokens = options.get("attention_mask", torch.ones(2, 50)).bool()

    def call(model: Any) -> Tensor:
        return result_of(model(**inputs_of("llama"), **options))[tokens]

    assert_same(call(ours), call(theirs))
    truth = gradients_of(theirs, call)
    assert (gradients_of(ours, call) - truth).norm() <= 1e-5 * truth.norm()


def test_chunks_in_compiled_graphs() -> None:
    """Ten lengths, whole, padded and packed, in at most two graphs of each way of calling."""
    ours, theirs = llama4("compiled_dilated"), llama4("eager")

    def options_of(kind: str, length: int) -> dict[str, Any]:
        if kind == "padded":
            mask = torch.ones(2, length, dtype=torch.long)
            mask[0, :7] = 0
            return {"attention_mask": mask}
        if kind == "packed":
            lengths = (20, length - 20)
            return {
                "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
            }
        return {}

    for kind in CALLS:
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(ours, fullgraph=True, backend=backend)
        for length in (40, 50, 61, 77, 100, 123, 64, 128, 33, 200):
            options = {**options_of(kind, length), "use_cache": False}
            seen = options.get("attention_mask", torch.ones(2, length)).bool()
            with torch.no_grad():
                out, truth = (
                    result_of(model(**inputs_of("llama", length), **options))
                    for model in (compiled, theirs)
                )
            assert_same(out[seen], truth[seen])
        assert backend.frame_count <= 2, kind


@pytest.mark.parametrize("cache", [None, "static"])
def test_chunks_are_generated_as_eager_attention_does(cache: str | None) -> None:
    options = {
        "max_new_tokens": 20,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    ours, theirs = (
        llama4(each).generate(**inputs_of("llama"), **options)
        for each in ("compiled_dilated", "eager")
    )
    assert torch.equal(ours, theirs)


def test_a_program_over_chunks_that_may_be_packed_is_refused_in_a_graph() -> None:
    torch._dynamo.reset()
    ours = cd.compile(llama4("eager"), attention=masks.causal())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"packed sequences of .* and its chunks are one mask"):
        compiled(**inputs_of("llama"), use_cache=False)


# Tensors of one entry for each pair -------------------------------------------------------------------------------------------


def causal_bias(length: int) -> Tensor:
    """(1, 1, length, length): 0 where a key is seen, the least number where it is not."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(1, 1, length, length).masked_fill(later, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("implementation", ["float", "bool"])
def test_a_tensor_of_pairs_is_added_to_the_scores(implementation: str) -> None:
    ours, theirs = pair_of("llama")
    bias = causal_bias(50)
    mask = bias if implementation == "float" else bias == 0

    def call(model: Any) -> Tensor:
        own = mask if model is ours else bias
        return result_of(model(**inputs_of("llama"), attention_mask=own, use_cache=False))

    assert_same(call(ours), call(theirs))
    truth = gradients_of(theirs, call)
    assert (gradients_of(ours, call) - truth).norm() <= 1e-5 * truth.norm()


def test_a_tensor_of_pairs_joins_a_program() -> None:
    ours = cd.compile(model_of("llama", "eager"), attention=masks.causal() & masks.window(9))
    hidden = causal_bias(50)
    hidden[..., 3] = torch.finfo(torch.float32).min
    hidden[..., 3, 3] = 0  # no row without a key
    near = torch.ones(50, 50, dtype=torch.bool).tril(-10)
    both = hidden.masked_fill(near, torch.finfo(torch.float32).min)
    theirs = model_of("llama", "eager")
    with torch.no_grad():
        out = result_of(ours(**inputs_of("llama"), attention_mask=hidden, use_cache=False))
        assert_same(
            out, result_of(theirs(**inputs_of("llama"), attention_mask=both, use_cache=False))
        )
    assert "+ a bias" in repr(cd.sites(ours))


# Cross attention that does not say is_causal ----------------------------------------------------------------------------------


def mllama(implementation: str) -> Any:
    """The text half of Llama 3.2 Vision: layer 1 is cross attention."""
    torch.manual_seed(0)
    settings = {key: value for key, value in CAUSAL["llama"][2].items() if key != "eos_token_id"}
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **settings,
        eos_token_id=3,
        cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation=implementation,
    )
    model = transformers.MllamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if (
            "gate" in name and weight.numel() == 1
        ):  # closed at first: cross attention would add nothing
            torch.nn.init.ones_(weight)
    return model


def of_images(length: int, images: int) -> dict[str, Tensor]:
    """States that the text sees, and a mask by which its first five tokens see none of them."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, images, 64, generator=generator)
    seen = torch.ones(2, 1, length, 1)
    seen[:, :, :5] = 0
    mask = torch.zeros(2, 1, length, images)
    mask[:, :, 5:, images // 2 :] = torch.finfo(torch.float32).min
    return {
        "cross_attention_states": states, "cross_attention_mask": mask, "full_text_row_masked_out_mask": seen,
    }  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
def test_cross_attention_of_images_is_computed(wrapped: bool) -> None:
    ours = mllama("compiled_dilated")
    if wrapped:
        ours = cd.compile(
            mllama("eager"), attention={"*.self_attn": masks.causal() & masks.window(60)}
        )
    theirs = mllama("eager")

    def call(model: Any) -> Tensor:
        return result_of(model(**inputs_of("llama"), **of_images(50, 24)))

    assert_same(call(ours), call(theirs))
    truth = gradients_of(theirs, call)
    assert (gradients_of(ours, call) - truth).norm() <= 1e-5 * truth.norm()
    if wrapped:
        assert [site.kind for site in cd.sites(ours)] == [
            "MllamaTextSelfAttention",
            "MllamaTextCrossAttention",
        ]
        assert "+ a bias" in repr(cd.sites(ours))


def test_one_program_for_cross_attention_too_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="one program for all layers of MllamaForCausalLM would be that of its cross",
    ):
        cd.compile(mllama("eager"), attention=masks.causal())


# Rows that see nothing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_rows_that_see_nothing_are_those_of_sdpa(name: str) -> None:
    """Attention of a row without a key is 0, as transformers' sdpa has it; eager has the mean of all values there."""
    ours, theirs = model_of(name, "compiled_dilated"), model_of(name, "sdpa")

    def call(model: Any) -> Tensor:
        return result_of(model(**inputs_of(name), attention_mask=LEFT))

    assert_same(call(ours), call(theirs))
    truth = gradients_of(theirs, call)
    assert (gradients_of(ours, call) - truth).norm() <= 1e-5 * truth.norm()


# Versions ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.3.0", "5.3.1.dev0"])
def test_an_older_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(
        ImportError,
        match=rf"needs transformers >= 5.4; got {version}. Install a newer one: pip install",
    ):
        cd.hf.register()


@pytest.mark.parametrize("version", ["5.4.0", "5.10.4", "6.0.0.dev0"])
def test_a_newer_transformers_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    cd.hf.register()
