"""Row-wise work in chunks against the work without chunks.

Results, gradients and measured peaks are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.rewrites.chunk import Chunk
from tests.graphs import Block, Gelu, Swiglu, measured_peak
from tests.hooked import Hook, captured, compiled, exported
from tests.support.accuracy import largest_error
from tests.support.turns import in_turn, one_in

WIDTH = 8


class Rms(nn.Module):
    """RMSNorm as in Llama's code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.float64)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).to(dtype)


class Residual(nn.Module):
    """A residual branch with a norm."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Packed(nn.Module):
    """A SwiGLU with gate and up in one linear."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_and_up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Scaled(nn.Module):
    """A scaled residual branch, a squared ReLU, methods instead of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.down(self.up(x).relu().square()).mul(0.5) + x


class Head(nn.Module):
    """Logits reduced to one number a row."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce, self.norm, self.logits = reduce, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.logits(self.norm(x)))


class Tied(nn.Module):
    """Two MLPs that share a weight, used twice in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Gelu(WIDTH), Gelu(WIDTH)
        self.second.up.weight = self.first.up.weight

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.first.up.weight), F.linear(x, self.first.up.weight)
        x = x + self.first.down(F.gelu(gate) * up)
        return x + self.second(x)


def sequential(activation: nn.Module, *after: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), activation, *after, nn.Linear(4 * WIDTH, WIDTH, bias=False)
    )


# Models, and how many regions of each are chunked.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gelu": (lambda: sequential(nn.GELU()), 1),
    "gelu tanh": (lambda: sequential(nn.GELU(approximate="tanh")), 1),
    "relu": (lambda: sequential(nn.ReLU()), 1),
    "relu in place": (lambda: sequential(nn.ReLU(inplace=True)), 1),
    "dropout of nothing": (lambda: sequential(nn.SiLU(), nn.Dropout(0.5).eval()), 1),
    "three linears": (lambda: sequential(nn.GELU(), nn.Linear(4 * WIDTH, 4 * WIDTH), nn.GELU()), 1),
    "swiglu": (lambda: Swiglu(WIDTH), 1),
    "packed swiglu": (Packed, 1),
    "layer norm": (lambda: Residual(nn.LayerNorm(WIDTH), Gelu(WIDTH)), 1),
    "rms norm": (lambda: Residual(nn.RMSNorm(WIDTH), Swiglu(WIDTH)), 1),
    "llama": (lambda: Residual(Rms(WIDTH), Swiglu(WIDTH)), 1),
    "norm after": (
        lambda: nn.Sequential(Residual(nn.Identity(), Gelu(WIDTH)), nn.LayerNorm(WIDTH)),
        1,
    ),
    "scaled": (Scaled, 1),
    "two of them": (
        lambda: nn.Sequential(*(Residual(nn.LayerNorm(WIDTH), Gelu(WIDTH)) for _ in range(2))),
        2,
    ),
    "tied": (Tied, 2),
    "blocks": (lambda: nn.Sequential(Block(Gelu(16), 16), Block(Gelu(16), 16)), 2),
    "argmax": (lambda: Head(lambda logits: logits.argmax(-1)), 1),
    "logsumexp": (lambda: Head(lambda logits: logits.logsumexp(-1, keepdim=True)), 1),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def width(name: str) -> int:
    return 16 if name == "blocks" else WIDTH


def assert_same(step: Callable[..., Any], model: nn.Module, x: Tensor) -> None:
    """Assert the same result and the same gradients of input and parameters."""
    out, expected = step(x), model(x)
    torch.testing.assert_close(out, expected)
    if expected.requires_grad:
        leaves = [tensor for tensor in (x, *model.parameters()) if tensor.requires_grad]
        grad = torch.randn_like(expected)
        grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        expected_grads = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
        torch.testing.assert_close(grads, expected_grads)


def random_input(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_dynamos_graph_agree(name: str) -> None:
    model = model_of(name)
    step, lines = captured(model, Chunk(rows=3))
    for length in (7, 8, 3, 1):
        assert_same(step, model, random_input(2, length, width(name)))
    # torch.compile captures a graph for each length that it cannot make dynamic.
    assert len(lines) % MODELS[name][1] == 0
    assert len(lines) >= MODELS[name][1]
    assert all("in chunks of 3 rows: " in line for line in lines)


@pytest.mark.parametrize("name", one_in(2, list(MODELS)))
def test_chunks_of_an_exported_graph_agree(name: str) -> None:
    model, x = model_of(name), torch.randn(2, 7, width(name), dtype=torch.float64)
    dynamic = ({1: torch.export.Dim("length", min=2)},)
    module, lines = exported(model, Chunk(rows=3), x, dynamic=dynamic)
    assert len(lines) == MODELS[name][1]
    for length in (7, 4, 20):
        assert_same(module, model, torch.randn(2, length, width(name), dtype=torch.float64))


# Multiples of the features, as many as there are rows; attention takes sequences of rows.
COINCIDING = (((1, 1),), ((1,),), ((4,),), ((8,),))
COINCIDE = in_turn([name for name in MODELS if name != "blocks"], COINCIDING)
COINCIDE += in_turn(["blocks"], COINCIDING[:1])


@pytest.mark.parametrize(("name", "multiples"), COINCIDE)
def test_rows_are_recognized_if_sizes_coincide(name: str, multiples: tuple[int, ...]) -> None:
    """Sizes do not identify a dim.

    There are as many rows as features, or as hidden features.
    """
    model, features = model_of(name), width(name)
    step, lines = captured(model, Chunk(rows=3), dynamic=False)
    lead = [multiple * features for multiple in multiples]
    assert_same(step, model, random_input(*lead, features))
    assert len(lines) == MODELS[name][1]


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_as_large_as_a_weight(training: bool) -> None:
    """A weight and its operand have the same shape, (256, 256)."""
    linears = (nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 64))
    model = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2]).double()
    step, lines = captured(model, Chunk(rows=100), dynamic=False)
    with torch.set_grad_enabled(training):
        assert_same(step, model, torch.randn(256, 64, dtype=torch.float64))
    assert len(lines) == 1


def test_rows_come_from_the_bytes_of_a_chunk() -> None:
    # Widths of hidden, activated and result; without a gradient, activated overwrites hidden.
    for training, values in ((True, 9), (False, 5)):
        for chunk_bytes, rows in ((1, 1), (values * WIDTH * 8, 1), (values * WIDTH * 8 * 5, 5)):
            step, lines = captured(model_of("gelu"), Chunk(chunk_bytes=chunk_bytes))
            with torch.set_grad_enabled(training):
                step(torch.randn(2, 3, WIDTH, dtype=torch.float64))
            assert f"in chunks of {rows} rows: linear, gelu, linear" in lines[0]


def test_frozen_parameters_get_no_gradient() -> None:
    model = model_of("layer norm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "mlp.up.bias")
    step, lines = captured(model, Chunk(rows=3))
    assert_same(step, model, random_input(2, 7, WIDTH))
    assert len(lines) == 1


class Rounded(nn.Module):
    """An MLP with integers between its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((9 * self.up(x)).to(torch.int32).to(x.dtype))


class Scored(Head):
    """The class of each row, times a learned factor."""

    def __init__(self) -> None:
        super().__init__(lambda logits: logits.argmax(-1, keepdim=True))
        self.factor = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype) * self.factor


@pytest.mark.parametrize(("model", "count"), [(Rounded, 0), (Scored, 1)])
def test_no_gradient_flows_through_integers(model: Callable[[], nn.Module], count: int) -> None:
    """Their operands get no gradient: neither zeros nor rounded ones."""
    torch.manual_seed(0)
    rounding = model().double()
    step, lines = captured(rounding, Chunk(rows=3))
    assert_same(step, rounding, random_input(2, 7, WIDTH))
    assert len(lines) == count


def test_weights_of_16_bits_sum_their_gradients_in_32() -> None:
    """Chunks of one row are the worst case.

    The limit is the error of bfloat16 without chunks.
    """
    exact = Gelu(WIDTH).double()
    plain = Gelu(WIDTH).bfloat16()
    plain.load_state_dict(exact.state_dict())
    exact.load_state_dict(plain.state_dict())
    x, grad = (torch.randn(64, WIDTH).bfloat16() for _ in range(2))
    step, lines = captured(plain, Chunk(rows=1))
    expected = torch.autograd.grad(exact(x.double()), [*exact.parameters()], grad.double())
    parameters = [*plain.parameters()]
    error = largest_error(torch.autograd.grad(step(x), parameters, grad), expected)
    plain_error = largest_error(torch.autograd.grad(plain(x), parameters, grad), expected)
    assert len(lines) == 1
    assert error <= 1.5 * plain_error


def test_chunks_compiled_by_inductor_agree() -> None:
    model = model_of("llama")
    step, lines = compiled(model, Chunk(rows=3))
    for length in (7, 2, 1):
        assert_same(step, model, random_input(2, length, WIDTH))
    primitives = "to, pow, mean, add, rsqrt, mul, to, mul, linear, silu, linear, mul, linear, add"
    assert any(primitives in line for line in lines)


@pytest.mark.slow
def test_a_package_of_aotinductor_agrees(tmp_path: Path) -> None:
    """The package needs `passes` imported: the operator is written in Python."""
    model, hook = model_of("layer norm"), Hook(Chunk(rows=3))
    with torch.no_grad():
        program = torch.export.export(
            model,
            (torch.randn(2, 7, WIDTH, dtype=torch.float64),),
            dynamic_shapes=({1: torch.export.Dim.AUTO},),
        )
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"pre_grad_custom_pass": hook},
        )
        run = torch._inductor.aoti_load_package(package)
        for length in (7, 2, 20):
            x = torch.randn(2, length, WIDTH, dtype=torch.float64)
            torch.testing.assert_close(run(x), model(x))
    assert len(hook.lines) == 1


@pytest.fixture
def one_thread() -> Any:
    """One thread: attention has a workspace for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TOKENS, FEATURES = 16384, 128
UNIT = TOKENS * FEATURES * 4


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("mlp", "plain"), [(Gelu, 6.0), (Swiglu, 10.0)])
def test_chunks_lower_the_peak_of_a_block(mlp: Callable[..., nn.Module], plain: float) -> None:
    model, x = Block(mlp(FEATURES), FEATURES, 2), torch.randn(1, TOKENS, FEATURES)
    for rewriting, most in ((None, plain + 0.1), (Chunk(rows=512), 4.1)):
        step, _ = compiled(model, rewriting)
        with torch.no_grad():
            step(x)
        measured = measured_peak(partial(step, x)) / UNIT
        assert (plain - 0.1 if rewriting is None else 0) < measured <= most


@pytest.mark.parametrize("mlp", [Gelu, pytest.param(Swiglu, marks=pytest.mark.slow)])
def test_chunks_lower_the_peak_of_a_training_step(mlp: Callable[..., nn.Module]) -> None:
    model = Residual(nn.LayerNorm(FEATURES), mlp(FEATURES))
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    step, lines = compiled(model, Chunk(rows=256), dynamic=False)

    def train() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(step(x).square().mean(), [x, *model.parameters()])

    train()
    assert len(lines) == 1
    assert measured_peak(train) <= 5.3 * UNIT


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": 0}, "rows must be at least 1; got 0"),
    ({"chunk_bytes": -5}, "chunk_bytes must be at least 1; got -5"),
    (
        {"rows": 1, "chunk_bytes": 1},
        "rows or chunk_bytes, not both; got Chunk(rows=1, chunk_bytes=1)",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Chunk(**options)
