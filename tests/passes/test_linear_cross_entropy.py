"""The loss without logits against the loss with them.

Both operators compute it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from passes.rewrites.linear_cross_entropy import LinearCrossEntropy, by_torch
from passes.rewrites.rows.losses import linear_cross_entropy
from passes.versions import HAS_LINEAR_CROSS_ENTROPY
from tests.graphs import measured_peak
from tests.hooked import captured, compiled, exported
from tests.support.accuracy import largest_error

WIDTH, CLASSES = 8, 11
HAS_TORCHS = pytest.mark.skipif(
    not HAS_LINEAR_CROSS_ENTROPY, reason="torch 2.11 has no such operator"
)
OPERATORS = [pytest.param(True, id="own"), pytest.param(False, id="torch's", marks=HAS_TORCHS)]


class Model(nn.Module):
    """A head and its loss.

    shifted: each token predicts the next, as in transformers' code
    convert: logits to float32
    weighted: with weights of classes
    options: of F.cross_entropy
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        bias: bool = False,
        shifted: bool = False,
        convert: bool = False,
        weighted: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES, bias)
        self.shifted, self.convert, self.options = shifted, convert, options
        self.register_buffer("class_weight", torch.rand(CLASSES) if weighted else None)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.head(x)
        logits = logits.float() if self.convert else logits
        if self.shifted:
            logits, target = logits[..., :-1, :].contiguous(), target[..., 1:].contiguous()
        return F.cross_entropy(
            logits.view(-1, CLASSES), target.view(-1), weight=self.class_weight, **self.options
        )


BY_BOTH: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "bias": True},
    "none": {"reduction": "none"},
    "ignoring": {"ignore_index": 3, "bias": True},
    "weighted": {"weighted": True, "ignore_index": 3},
    "shifted": {"shifted": True},
}
WEIGHTED = {"weighted": True, "ignore_index": 3, "bias": True}
BY_OWN: dict[str, dict[str, Any]] = {
    "smoothed": {"label_smoothing": 0.1},
    "smoothed and weighted": {"label_smoothing": 0.3, **WEIGHTED},
    "smoothed by token": {"label_smoothing": 0.1, "reduction": "none", "ignore_index": 3},
}


def batch(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    target = torch.randint(CLASSES, (2, length))
    target[0, :2] = -100
    return torch.randn(2, length, WIDTH, dtype=dtype, requires_grad=True), target


def gradients(loss: Tensor, x: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [x, *model.parameters()], torch.ones_like(loss))


@pytest.mark.parametrize("own", OPERATORS)
@pytest.mark.parametrize("name", BY_BOTH | BY_OWN)
def test_loss_and_gradients_are_the_same(name: str, own: bool) -> None:
    model = Model(**(BY_BOTH | BY_OWN)[name]).double()
    step, lines = captured(model, LinearCrossEntropy(rows=3, own=own))
    for length in (7, 4, 5):
        x, target = batch(length)
        target = target.clamp(min=0) if "ignore_index" in model.options else target
        loss, expected = step(x, target), model(x, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, x, model), gradients(expected, x, model))
    assert all("without its logits, 3 tokens at a time of 11 classes" in line for line in lines)
    assert bool(lines) == (own or name in BY_BOTH)


@pytest.mark.parametrize("own", OPERATORS)
@pytest.mark.parametrize("shifted", [True, False])
def test_classes_are_recognized_if_sizes_coincide(own: bool, shifted: bool) -> None:
    """As many tokens as classes and features.

    Static sizes do not identify a dim.
    """

    def loss_of(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        if shifted:
            logits, target = logits[..., :-1, :].contiguous(), target[..., 1:].contiguous()
        return F.cross_entropy(logits.view(-1, len(weight)), target.view(-1))

    @settings(max_examples=12)
    @given(st.tuples(*[st.integers(2, 3)] * 4))
    @example((3, 3, 3, 3))
    def check(sizes: tuple[int, ...]) -> None:
        sequences, tokens, features, classes = sizes
        x = torch.randn(sequences, tokens, features, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(classes, features, dtype=torch.float64, requires_grad=True)
        target = torch.randint(classes, (sequences, tokens))
        step, lines = captured(loss_of, LinearCrossEntropy(rows=2, own=own), dynamic=False)
        loss, expected = step(x, weight, target), loss_of(x, weight, target)
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, [x, weight])
        torch.testing.assert_close(grads, torch.autograd.grad(expected, [x, weight]))
        assert len(lines) == 1

    check()


@pytest.mark.parametrize("name", [*BY_BOTH, *BY_OWN])
def test_the_own_operators_derivative_is_that_of_finite_differences(name: str) -> None:
    options: dict[str, Any] = {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0}
    options |= (BY_BOTH | BY_OWN)[name]
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    )
    target, class_weight = torch.tensor([3, 0, 10, 3, 7]), torch.rand(CLASSES, dtype=torch.float64)

    settings = (options["reduction"], options["ignore_index"], options["label_smoothing"], False, 2)
    weights = class_weight if "weighted" in options else None

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, bias, weights, *settings)

    assert torch.autograd.gradcheck(loss, (x, weight, bias), fast_mode=True)
    torch.library.opcheck(
        linear_cross_entropy,
        (x, weight, target, None, None, "mean", 3, 0.1, False, 2),
        test_utils="test_faketensor",
    )


@pytest.mark.parametrize("own", OPERATORS)
def test_a_loss_of_ignored_tokens_only_is_as_in_torch(own: bool) -> None:
    """The mean of no tokens is NaN."""
    x, weight, target = torch.randn(4, WIDTH), torch.randn(CLASSES, WIDTH), torch.full((4,), -100)
    operands = (x, weight, target, None, None)
    for reduction in ("mean", "sum", "none"):
        if own:
            loss = linear_cross_entropy(*operands, reduction, -100, 0.0, False, 2)
        else:
            loss = by_torch(*operands, reduction, -100, 2)
        expected = F.cross_entropy(x @ weight.t(), target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)


def test_converted_logits_keep_a_loss_in_32_bits() -> None:
    model = Model(convert=True).bfloat16()
    step, lines = captured(model, LinearCrossEntropy(rows=3, own=True))
    x, target = batch(7, torch.bfloat16)
    loss, plain_loss = step(x, target), model(x, target)
    assert loss.dtype == torch.float32
    assert len(lines) == 1
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    # The gradients' errors against float64, without logits and with them.
    exact = Model(convert=False).double()
    exact.load_state_dict(model.state_dict())
    x_exact = x.detach().double().requires_grad_()
    expected = gradients(exact(x_exact, target), x_exact, exact)
    error = largest_error(gradients(loss, x, model), expected)
    plain_error = largest_error(gradients(plain_loss, x, model), expected)
    assert error <= 1.5 * plain_error


@pytest.mark.parametrize("own", OPERATORS)
def test_an_exported_loss_is_the_same(own: bool) -> None:
    model = Model(bias=True).double()
    x, target = batch(7)
    module, lines = exported(model, LinearCrossEntropy(rows=3, own=own), x, target)
    torch.testing.assert_close(module(x, target), model(x, target))
    assert len(lines) == 1


def logits_too(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits, target), logits


def capped(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).tanh(), target)


def probabilities(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), F.one_hot(target, CLASSES).to(x.dtype))


def of_images(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x[None], weight).transpose(1, 2), target[None])


def some_classes(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight)[:, :5], target % 5)


def legacy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target, size_average=False)


def written_between(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    x = x.clone()
    logits = F.linear(x, weight)
    x.zero_()
    return F.cross_entropy(logits, target)


def autocast(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(F.linear(x.float(), weight.float()), target)


@pytest.mark.parametrize("own", OPERATORS)
@pytest.mark.parametrize(
    "function",
    [logits_too, capped, probabilities, of_images, some_classes, legacy, written_between, autocast],
    ids=lambda function: function.__name__,
)
@pytest.mark.filterwarnings("ignore:size_average")
def test_other_losses_are_left_alone(function: Callable[..., Any], own: bool) -> None:
    """Static sizes: a weight that is an argument has dynamic ones, which the pass leaves alone."""
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    weight, target = torch.randn(CLASSES, WIDTH, dtype=torch.float64), torch.arange(6)
    step, lines = captured(function, LinearCrossEntropy(rows=3, own=own), dynamic=False)
    expected = function(x, weight, target)
    torch.testing.assert_close(step(x, weight, target), expected, rtol=0, atol=0)
    assert lines == []


TOKENS, FEATURES, VOCABULARY = 4096, 128, 4096


@HAS_TORCHS
@pytest.mark.parametrize("own", OPERATORS)
def test_the_peak_of_a_training_step_is_that_of_torchs_operator(own: bool) -> None:
    """Compiled by inductor with dynamic lengths, against torch's operator called by hand."""
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    target = torch.randint(VOCABULARY, (TOKENS,))
    head = nn.Linear(FEATURES, VOCABULARY, bias=False)

    def with_logits(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(x), target)

    def by_hand(x: Tensor, target: Tensor) -> Tensor:
        return by_torch(x, head.weight, target, None, None, "mean", -100, 256)

    def train(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(loss(x, target), (x, head.weight))

    step, lines = compiled(with_logits, LinearCrossEntropy(rows=256, own=own))
    torch.testing.assert_close(train(step), train(with_logits))
    peak = measured_peak(partial(train, by_hand))
    assert len(lines) == 1
    assert measured_peak(partial(train, step)) <= 1.05 * peak
    assert peak < 0.25 * measured_peak(partial(train, with_logits))


@pytest.mark.slow
def test_a_loss_compiled_by_inductor_is_the_same() -> None:
    """With a module's float, which torch.compile first passes as a tensor."""
    model = Model(label_smoothing=0.1, bias=True).double()
    step, lines = compiled(model, LinearCrossEntropy(rows=3, own=True))
    for length in (7, 4, 2):
        x, target = batch(length)
        loss, expected = step(x, target), model(x, target)
        torch.testing.assert_close(gradients(loss, x, model), gradients(expected, x, model))
    assert len(lines) >= 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": 0}, "rows must be at least 1; got 0"),
    ({"chunk_bytes": 0}, "chunk_bytes must be at least 1; got 0"),
    (
        {"rows": 1, "chunk_bytes": 1},
        "rows or chunk_bytes, not both; got LinearCrossEntropy(rows=1, chunk_bytes=1, own=None)",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearCrossEntropy(**options)


def test_own_is_the_default_if_torch_has_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.rewrites.linear_cross_entropy.HAS_LINEAR_CROSS_ENTROPY", False)
    with pytest.raises(ValueError, match="own=False asks for torch's operator, which torch"):
        LinearCrossEntropy(own=False)
    step, lines = captured(Model(label_smoothing=0.1), LinearCrossEntropy(rows=3))
    step(*batch(4, torch.float32))
    assert len(lines) == 1
