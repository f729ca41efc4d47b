"""The modules compute what the reference computes, in their own layout, and behave as torch modules do."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import DilatedAttention, MultiheadDilatedAttention, Program
from compiled_dilated.attend import Attend
from compiled_dilated.modules import visible

LENGTHS, RATES = (16, 40), (1, 3)
LONGNET = cd.longnet(LENGTHS, RATES)
CAUSAL = cd.longnet(LENGTHS, RATES, causal=True)


def inputs(
    n: int,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
) -> list[Tensor]:
    """query, key, value (B, N, H, D) as leaves."""
    shapes = ((batch, n, each, 8) for each in (heads, kv_heads or heads, kv_heads or heads))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def truth(program: Program, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """The reference on (B, N, H, D)."""
    out = cd.reference(program, *(x.transpose(1, 2) for x in (query, key, value)), **kwargs)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def right_padding(lengths: list[int], n: int) -> Tensor:
    """(B, N), True from each length on."""
    return torch.arange(n) >= torch.tensor(lengths)[:, None]


def assert_same(
    out: Tensor,
    expected: Tensor,
    leaves: list[Tensor],
    tolerance: float = 1e-10,
    retain: bool = False,
) -> None:
    """Equal values and, for a random gradient of the output, equal gradients of the leaves. retain: out is used again."""
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad, retain_graph=retain)
    wanted = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# What users of the first port write, by position or by name.


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (
            DilatedAttention,
            "segment_lengths dilation_rates softmax_scale=None attention_dropout=0.0",
        ),
        (
            MultiheadDilatedAttention,
            "embed_dim num_heads dilation_rates segment_lengths dropout=0.0 bias=True layer_norm=True layer_norm_eps=1e-05 "
            "gamma_init=1.0 device=None dtype=None",
        ),
        (DilatedAttention.forward, "self query key value is_causal=False key_padding_mask=None"),
        (
            MultiheadDilatedAttention.forward,
            "self query key value is_causal=False key_padding_mask=None need_weights=False",
        ),
    ],
)
def test_signatures(module: Callable[..., Any], parameters: str) -> None:
    positional = [
        each
        for each in inspect.signature(module).parameters.values()
        if each.kind is not each.KEYWORD_ONLY
    ]
    shown = [
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in positional
    ]
    assert " ".join(shown) == parameters


@pytest.mark.parametrize("n", [1, 2, 37, 130])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dilated_attention_is_the_reference(n: int, is_causal: bool) -> None:
    leaves = inputs(n)
    out = DilatedAttention(LENGTHS, RATES)(*leaves, is_causal=is_causal)
    assert_same(out, truth(CAUSAL if is_causal else LONGNET, *leaves), leaves)


@pytest.mark.parametrize("heads", ["all", "split"])
@pytest.mark.parametrize("offsets", ["cyclic", "grouped"])
@pytest.mark.parametrize("lowering", ["auto", "dense", "strided", "tiled"])
def test_options_reach_the_program(heads: str, offsets: str, lowering: str) -> None:
    leaves = inputs(45, kv_heads=2)
    attention = DilatedAttention(
        LENGTHS, RATES, softmax_scale=0.5, offsets=offsets, heads=heads, lowering=lowering
    )
    program = cd.longnet(LENGTHS, RATES, offsets=offsets, heads=heads)
    assert attention.program(45) == program
    assert_same(attention(*leaves), truth(program, *leaves, scale=0.5), leaves)


def test_keys_of_another_length_and_width() -> None:
    query, key, value = torch.randn(2, 37, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, 5)
    out = DilatedAttention(LENGTHS, RATES)(query, key, value)
    assert out.shape == (2, 37, 4, 5)
    torch.testing.assert_close(
        out.double(), truth(LONGNET, query, key, value), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(0, 8, 4, 8), (2, 0, 4, 8), (2, 8, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = DilatedAttention(LENGTHS, RATES)(x, x, x)
    out.sum().backward()
    assert out.shape == shape
    assert x.grad is not None


def test_nothing_is_copied_on_the_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    compute = Attend.__call__
    monkeypatch.setattr(
        Attend,
        "__call__",
        lambda self, *given, **named: seen.extend(given) or compute(self, *given, **named),
    )
    given = inputs(20)
    DilatedAttention(LENGTHS, RATES)(*given)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in given]
    assert [x.shape for x in seen] == [(2, 4, 20, 8)] * 3


# Padding


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lowering", ["auto", "dense", "tiled"])
def test_padding_is_the_reference(is_causal: bool, lowering: str) -> None:
    leaves = inputs(67)
    padding = torch.rand(2, 67) < 0.4
    out = DilatedAttention(LENGTHS, RATES, lowering=lowering)(
        *leaves, is_causal=is_causal, key_padding_mask=padding
    )
    program = visible(CAUSAL if is_causal else LONGNET)
    assert_same(out, truth(program, *leaves, data={"padding": padding}), leaves)


@pytest.mark.parametrize("is_causal", [False, True])
def test_right_padding_is_cropping(is_causal: bool) -> None:
    """Every row of a padded batch equals the row computed alone, at its own length, and so do the gradients."""
    lengths, n = [61, 1, 40, 17], 61
    attention = DilatedAttention(LENGTHS, RATES)
    leaves = inputs(n, batch=4)
    out = attention(*leaves, is_causal=is_causal, key_padding_mask=right_padding(lengths, n))
    for row, length in enumerate(lengths):
        alone = attention(*(x[row : row + 1, :length] for x in leaves), is_causal=is_causal)
        assert_same(out[row : row + 1, :length], alone, leaves, retain=True)


def test_multihead_padding_is_cropping() -> None:
    lengths, n = [50, 9], 50
    attention = MultiheadDilatedAttention(32, 4, RATES, LENGTHS, dtype=torch.float64)
    x = torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True)
    out, _ = attention(x, x, x, key_padding_mask=right_padding(lengths, n))
    for row, length in enumerate(lengths):
        part = x[row : row + 1, :length]
        assert_same(
            out[row : row + 1, :length],
            attention(part, part, part)[0],
            [x, *attention.parameters()],
            retain=True,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_nothing_are_zero(dtype: torch.dtype) -> None:
    leaves = inputs(70, dtype)
    padding = torch.tensor([[True] * 70, [False] * 70])  # nothing of the first sequence is left
    out = DilatedAttention(LENGTHS, RATES)(*leaves, key_padding_mask=padding)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not out[0].any()
    assert not any(grad[0].any() for grad in grads)
    assert all(x.isfinite().all() for x in (out, *grads))


def test_padded_queries_get_what_they_see() -> None:
    leaves = inputs(16)
    padding = right_padding([10, 16], 16)
    out = DilatedAttention((16,), (1,))(*leaves, key_padding_mask=padding)
    query, key, value = leaves
    weights = (torch.einsum("hd,khd->hk", query[0, 15], key[0, :10]) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(out[0, 15], torch.einsum("hk,khd->hd", weights, value[0, :10]))


# Multihead


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_is_projections_around_the_reference(bias: bool, layer_norm: bool) -> None:
    attention = MultiheadDilatedAttention(
        32, 4, RATES, LENGTHS, bias=bias, layer_norm=layer_norm, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    query, key, value = (
        torch.randn(2, 45, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    out, weights = attention(query, key, value, is_causal=True)
    assert weights is None

    state = dict(attention.named_parameters())

    def project(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(
            f"{name}.bias", torch.zeros(32, dtype=torch.float64)
        )

    heads = [
        project(name, x).reshape(2, 45, 4, 8)
        for name, x in (("q_proj", query), ("k_proj", key), ("v_proj", value))
    ]
    mixed = truth(CAUSAL, *heads).reshape(2, 45, 32)
    if layer_norm:
        centred = mixed - mixed.mean(-1, keepdim=True)
        mixed = (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["norm.weight"]
            + state["norm.bias"]
        )
    assert_same(out, project("out_proj", mixed), [query, key, value, *attention.parameters()])


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_keys(bias: bool, layer_norm: bool) -> None:
    attention = MultiheadDilatedAttention(32, 4, RATES, LENGTHS, bias=bias, layer_norm=layer_norm)
    kinds = ["weight", "bias"] if bias else ["weight"]
    expected = [
        f"{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj", "out_proj") for kind in kinds
    ]
    expected += ["norm.weight", "norm.bias"] if layer_norm else []
    assert sorted(attention.state_dict()) == sorted(expected)
    assert not DilatedAttention(LENGTHS, RATES).state_dict()


def test_weights_start_as_magneto_says() -> None:
    attention = MultiheadDilatedAttention(256, 4, RATES, LENGTHS, gamma_init=3.0)
    for projection, gain in (("q_proj", 1), ("k_proj", 1), ("v_proj", 3), ("out_proj", 3)):
        linear = attention.get_submodule(projection)
        assert isinstance(linear, nn.Linear)
        # Xavier: variance 2 / (fan_in + fan_out). 65,536 draws have a standard deviation within 1% of it, by 3.6 sigma.
        assert linear.weight.std().item() == pytest.approx(gain / 16, rel=0.01)
        assert abs(linear.weight.mean().item()) < 4 * gain / 16 / 256
        assert not linear.bias.any()
    assert isinstance(attention.norm, nn.LayerNorm)
    assert (attention.norm.weight == 1).all()
    assert not attention.norm.bias.any()


def test_made_on_meta_and_filled_later() -> None:
    attention = MultiheadDilatedAttention(32, 4, RATES, LENGTHS, device="meta", dtype=torch.float64)
    assert all(parameter.is_meta for parameter in attention.parameters())
    attention.to_empty(device="cpu").reset_parameters()
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    assert attention(x, x, x)[0].isfinite().all()


# As torch modules


@pytest.fixture
def module() -> MultiheadDilatedAttention:
    return MultiheadDilatedAttention(32, 4, RATES, LENGTHS, gamma_init=0.5)


def test_copies_and_pickles_compute_the_same(module: MultiheadDilatedAttention) -> None:
    x = torch.randn(2, 37, 32)
    expected = module(x, x, x)[0]
    other = MultiheadDilatedAttention(32, 4, RATES, LENGTHS)
    other.load_state_dict(module.state_dict())
    for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(each(x, x, x)[0], expected)


def test_pickle_runs_in_another_process(
    module: MultiheadDilatedAttention, fresh_python: Any, tmp_path: Path
) -> None:
    x = torch.randn(2, 37, 32)
    torch.save((module, x, module(x, x, x)[0]), tmp_path / "module.pt")
    code = (
        "import sys, torch; module, x, expected = torch.load(sys.argv[1], weights_only=False);"
        "torch.testing.assert_close(module(x, x, x)[0], expected)"
    )
    run = fresh_python("-c", code, str(tmp_path / "module.pt"))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moves_to_a_dtype(module: MultiheadDilatedAttention, dtype: torch.dtype) -> None:
    x = torch.randn(2, 37, 32)
    expected = module(x, x, x)[0]
    moved = module.half() if dtype == torch.float16 else module.to(dtype)
    out = moved(*[x.to(dtype)] * 3)[0]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_autocast(module: MultiheadDilatedAttention) -> None:
    x = torch.randn(2, 37, 32)
    expected = module(x, x, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, x, x)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in module.parameters()
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(module: MultiheadDilatedAttention, mode: Any) -> None:
    x = torch.randn(2, 37, 32)
    with mode():
        out = module(x, x, x)[0]
    assert not out.requires_grad
    torch.testing.assert_close(out, module(x, x, x)[0])


def test_compiles_without_a_break(module: MultiheadDilatedAttention) -> None:
    """One graph for the first length and one for all others, padding and causal included; gradients too."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    for n in (37, 64, 101, 130):
        x = torch.randn(2, n, 32, requires_grad=True)
        padding = right_padding([n, n // 2], n)
        out = compiled(x, x, x, is_causal=True, key_padding_mask=padding)[0]
        assert_same(
            out,
            module(x, x, x, is_causal=True, key_padding_mask=padding)[0],
            [x, *module.parameters()],
            2e-5,
        )
    assert graphs.frame_count <= 2


def test_exports_with_any_length(module: MultiheadDilatedAttention) -> None:
    x, padding = torch.randn(2, 37, 32), right_padding([37, 20], 37)
    tokens = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = {
        "query": tokens,
        "key": tokens,
        "value": tokens,
        "is_causal": None,
        "key_padding_mask": tokens,
    }
    exported = torch.export.export(
        module, (x, x, x, False, padding), dynamic_shapes=shapes
    ).module()
    for n in (37, 50):
        x, padding = torch.randn(3, n, 32), right_padding([n, n // 2, 3], n)
        torch.testing.assert_close(
            exported(x, x, x, False, padding), module(x, x, x, False, padding)
        )


def test_prints_its_arguments() -> None:
    assert (
        repr(DilatedAttention((8,), (2,)))
        == "DilatedAttention(segment_lengths=(8,), dilation_rates=(2,))"
    )
    printed = repr(DilatedAttention((8,), (2,), 0.5, heads="split", lowering="dense"))
    assert (
        printed
        == "DilatedAttention(segment_lengths=(8,), dilation_rates=(2,), softmax_scale=0.5, lowering='dense', heads='split')"
    )


# Bad input


def q(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 10, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"attention_dropout": 0.1},
            ValueError,
            "attention_dropout=0.1 cannot be honoured.*Pass 0.0.*torch.nn.Dropout",
        ),
        ({"attention_dropout": 2}, ValueError, "attention_dropout must be a number in"),
        ({"attention_dropout": None}, ValueError, "attention_dropout must be a number in"),
        (
            {"softmax_scale": "auto"},
            TypeError,
            "softmax_scale must be a finite number; got str 'auto'",
        ),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be a finite number; got inf"),
        ({"segment_lengths": 16}, TypeError, "segment_lengths must be a sequence"),
        ({"segment_lengths": (16,)}, ValueError, "must be of one length; got 1 and 2"),
        ({"dilation_rates": (1, 0)}, ValueError, r"dilation_rates\[1\] must be at least 1; got 0"),
        ({"heads": "some"}, ValueError, "heads must be one of"),
        ({"offsets": "none"}, ValueError, "offsets must be one of"),
        ({"lowering": "fast"}, ValueError, "lowering must be one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedAttention(**{"segment_lengths": LENGTHS, "dilation_rates": RATES} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dropout": 0.1}, ValueError, "dropout=0.1 cannot be honoured"),
        ({"embed_dim": 30}, ValueError, "embed_dim must be a multiple of num_heads; got 30 and 4"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"num_heads": 4.0}, TypeError, "num_heads must be an integer"),
        ({"gamma_init": "deepnet"}, ValueError, "gamma_init must be a finite number"),
        ({"bias": 1}, TypeError, "bias must be True or False"),
        ({"layer_norm": None}, TypeError, "layer_norm must be True or False"),
        ({"dilation_rates": (1,)}, ValueError, "must be of one length; got 2 and 1"),
    ],
)
def test_bad_multihead_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {"embed_dim": 32, "num_heads": 4, "dilation_rates": RATES, "segment_lengths": LENGTHS}
    with pytest.raises(error, match=message):
        MultiheadDilatedAttention(**good | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor; got list"),
        (
            {"key": q(2, 10, 32)},
            ValueError,
            r"key must be \(batch, tokens, heads, head_dim\); got shape \(2, 10, 32\)",
        ),
        (
            {"value": q(2, 9, 4, 8)},
            ValueError,
            "key and value must agree in batch, heads and tokens",
        ),
        ({"query": q(3, 10, 4, 8)}, ValueError, "query and key must have one batch size"),
        ({"query": q(2, 10, 4, 6)}, ValueError, "query and key must have one head_dim"),
        (
            {"query": q(2, 10, 6, 8)},
            ValueError,
            "the 6 query heads must be a multiple of the 4 key heads",
        ),
        ({"query": q().double()}, TypeError, "must have one dtype"),
        (
            {"query": q().long(), "key": q().long(), "value": q().long()},
            TypeError,
            "must be float16, bfloat16, float32 or float64",
        ),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
        (
            {"key_padding_mask": torch.zeros(2, 10)},
            TypeError,
            "key_padding_mask must be a bool tensor.*got torch.float32",
        ),
        (
            {"key_padding_mask": [[False]]},
            TypeError,
            "key_padding_mask must be a bool tensor.*got list",
        ),
        (
            {"key_padding_mask": torch.zeros(2, 9) > 0},
            ValueError,
            r"of the key, \(2, 10\); got \(2, 9\)",
        ),
        (
            {"key_padding_mask": torch.zeros(10) > 0},
            ValueError,
            r"of the key, \(2, 10\); got \(10,\)",
        ),
    ],
)
def test_bad_inputs(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedAttention(LENGTHS, RATES)(**{"query": q(), "key": q(), "value": q()} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": "x"}, TypeError, "query must be a torch.Tensor; got str"),
        (
            {"query": q(10, 32)},
            ValueError,
            r"query must be \(batch, tokens, embed_dim=32\); got shape \(10, 32\)",
        ),
        (
            {"value": q(2, 10, 16)},
            ValueError,
            r"value must be \(batch, tokens, embed_dim=32\); got shape \(2, 10, 16\)",
        ),
        ({"need_weights": True}, ValueError, "need_weights=True asks for the attention weights"),
        (
            {"key_padding_mask": torch.zeros(2, 10)},
            TypeError,
            "key_padding_mask must be a bool tensor",
        ),
    ],
)
def test_bad_multihead_inputs(
    module: MultiheadDilatedAttention,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    x = q(2, 10, 32)
    with pytest.raises(error, match=message):
        module(**{"query": x, "key": x, "value": x} | arguments)


def test_a_saved_state_is_plain_tensors(module: MultiheadDilatedAttention) -> None:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file, weights_only=True)) == set(module.state_dict())
