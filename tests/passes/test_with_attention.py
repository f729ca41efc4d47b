"""Blocks with the attention of compiled_dilated under StreamQKV, and their estimates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
import passes
from compiled_dilated import masks
from passes import Chunk, StreamQKV
from tests import compiling
from tests.graphs import Gelu, measured_peak
from tests.hooked import captured, compiled
from tests.support.turns import in_turn

WIDTH, HEADS = 32, 4
PROGRAMS: dict[str, Any] = {
    "longnet": cd.longnet((8, 16, 32), (1, 2, 4), causal=True),
    "longnet of split heads": cd.longnet((8, 32), (1, 2), heads="split"),
    "window": masks.window(5) & masks.causal(),
    "window or sinks": masks.causal() & (masks.window(4) | masks.sinks(2)),
    "documents": masks.documents(lengths=(20, 3, 70)) & masks.causal(),
    "everything": masks.full(),
}
LEFT_ALONE: dict[str, Callable[[], Callable[..., Any]]] = {
    "along a curve": lambda: cd.compile(cd.hilbert_window((8, 8), 2)),
    "in ranks": lambda: cd.compile(PROGRAMS["longnet"], ranks=2),
    "with a score_mod": lambda: partial(
        cd.compile(masks.causal()), score_mod=lambda score, b, h, q, kv: score + q - kv
    ),
    "by another lowering": lambda: cd.compile(masks.causal(), lowering="tiled"),
    "with an offset": lambda: partial(cd.compile(masks.causal()), q_offset=3),
    "with its lse": lambda: WithLse(),
}


class WithLse:
    """An attention whose second result is used."""

    def __init__(self) -> None:
        self.attend = cd.compile(masks.causal())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = self.attend(q, k, v, return_lse=True)
        return out + lse[..., None]


class Layer(nn.Module):
    """A transformer block with an attention of (q, k, v)."""

    def __init__(
        self, attend: Callable[..., Any], width: int = WIDTH, kv_heads: int = HEADS
    ) -> None:
        super().__init__()
        self.attend, self.head_dim = attend, width // HEADS
        self.before, self.between, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), Gelu(width)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, kv_heads * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            linear(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


@torch.no_grad()
@pytest.mark.parametrize(("name", "kv_heads"), in_turn(list(PROGRAMS), (4, 2)))
def test_chunks_of_queries_agree(name: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    model = Layer(cd.compile(PROGRAMS[name]), kv_heads=kv_heads).double().eval()
    step, lines = captured(model, StreamQKV(rows=7), dynamic=False)
    x = torch.randn(2, 93, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(step(x), model(x), rtol=1e-10, atol=1e-10)
    assert len(lines) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_attention_of_all_queries_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    model, x = Layer(LEFT_ALONE[name]()).eval(), torch.randn(1, 64, WIDTH)
    step, lines = captured(model, StreamQKV(rows=7), dynamic=False)
    torch.testing.assert_close(step(x), model(x))
    assert lines == []


@torch.no_grad()
def test_a_block_peaks_at_three_activations() -> None:
    """Keys, values and the result are three activations."""
    attend = cd.compile(cd.longnet((512, 1024), (1, 2), causal=True))
    model, x = Layer(attend, 128).eval(), torch.randn(1, 8192, 128)
    step, lines = compiled(model, StreamQKV(rows=128), dynamic=False)
    step(x)
    assert len(lines) == 1
    assert measured_peak(partial(step, x)) <= 3.3 * x.nbytes


@torch.no_grad()
def test_estimates_of_a_streamed_block_include_its_cached_bias() -> None:
    """The peak has the bias, the time the visible pairs.

    Only the first call allocates the bias.
    """
    model, x = Layer(cd.compile(PROGRAMS["window or sinks"]), 128).eval(), torch.randn(1, 4096, 128)
    candidate = StreamQKV(rows=512)
    estimates = passes.estimate(model, [x], train=False, passes=[(), (candidate,)])
    plain, streamed = sorted(estimates, key=lambda estimate: estimate.changed)
    step = passes.compile(model, passes=[candidate], dynamic=False)
    torch.testing.assert_close(step(x), model(x))
    measured = measured_peak(partial(step, x))
    assert streamed.changed
    assert streamed.seconds <= 1.2 * plain.seconds
    # The positions and heads from which a bias is computed are not counted.
    index_bytes = 4096
    assert measured <= streamed.added_bytes + index_bytes
    assert streamed.added_bytes <= measured + 8 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longnet", "window"])
def test_peaks_of_training_are_predicted(name: str) -> None:
    """Peaks have the workspace of attention's backward.

    They have no gradient of an unused lse. The default suite measures blocks with attention under
    a budget: test_wrapping_budget.py.
    """
    program = cd.longnet((512, 1024), (1, 2), causal=True) if name == "longnet" else PROGRAMS[name]
    model, x = compiling.Loss(Layer(cd.compile(program), 128)), torch.randn(1, 8192, 128)
    parameters = list(model.parameters())
    estimate = passes.estimate(model, [x], train=True, passes=[(Chunk(rows=512),)])[-1]
    step = passes.compile(model, passes=[Chunk(rows=512)], dynamic=False)

    def train() -> None:
        with torch.enable_grad():
            torch.autograd.grad(step(x), parameters)

    train()
    assert 0.97 <= estimate.added_bytes / measured_peak(train) <= 1.15
