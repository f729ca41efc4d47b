"""Masks as conditions on positions, and is_causal=True in their place.

They are checked pair by pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import passes
from passes import Causal
from passes.rewrites.rows.calls import example_value
from passes.rewrites.rows.positions import Sum, conditions
from tests.graphs import measured_peak

Q, K = 7, 11


def positions(queries: int = Q, keys: int = K) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None], torch.arange(keys)[None, :]


def from_transformers() -> Tensor:
    """The causal mask of transformers.masking_utils."""
    q, k = torch.arange(Q) + 0, torch.arange(K) + 0
    return (k[None, None, None, :] <= q[None, None, :, None]).expand(1, -1, Q, K)


def conjunction(first: Tensor, second: Tensor) -> Tensor:
    """The conjunction of two masks, begun with a constant as in transformers."""
    return first.new_ones((), dtype=torch.bool) & first & second


CAUSAL: dict[str, Callable[[], Tensor]] = {
    "compared": lambda: positions()[1] <= positions()[0],
    "the other way round": lambda: positions()[0] >= positions()[1],
    "strictly": lambda: positions()[1] < positions()[0] + 1,
    "by their difference": lambda: positions()[0] - positions()[1] >= 0,
    "not what is ahead": lambda: ~(positions()[1] > positions()[0]),
    "transformers": from_transformers,
    "and a window as long": lambda: conjunction(
        positions()[1] <= positions()[0], positions()[1] > positions()[0] - Q
    ),
    "tril": lambda: torch.ones(Q, K, dtype=torch.bool).tril(),
    "tril of full": lambda: torch.tril(torch.full((Q, K), True)).bool(),
    "not triu": lambda: torch.triu(torch.ones(Q, K, dtype=torch.bool), diagonal=1).logical_not(),
    "viewed": lambda: torch.arange(Q).view(-1, 1) >= torch.arange(K).reshape(1, K),
    "unsqueezed": lambda: (
        torch.arange(K).unsqueeze(0) <= torch.arange(Q, dtype=torch.int32).unsqueeze(-1).long()
    ),
    "from three on": lambda: torch.arange(3, 3 + K)[None] <= torch.arange(3, 3 + Q)[:, None],
}
NOT_CAUSAL: dict[str, Callable[[], Tensor]] = {
    "itself left out": lambda: positions()[1] < positions()[0],
    "one ahead": lambda: positions()[1] <= positions()[0] + 1,
    "window": lambda: conjunction(
        positions()[1] <= positions()[0], positions()[1] > positions()[0] - 3
    ),
    "ahead alone": lambda: positions()[1] >= positions()[0],
    "every second": lambda: torch.arange(0, 2 * K, 2)[None] <= positions()[0],
    "everything": lambda: torch.ones(Q, K, dtype=torch.bool),
    "nothing": lambda: torch.full((Q, K), False),
    "the first key": lambda: (torch.arange(1)[None] <= positions()[0] - 3).expand(Q, K),
    "of one query": lambda: (positions()[1] <= torch.arange(1)[:, None]).expand(Q, K),
    "below a diagonal": lambda: torch.ones(Q, K, dtype=torch.bool).tril(2),
    "a triangle and its diagonal": lambda: torch.ones(Q, K, dtype=torch.bool).tril().triu(-2),
    "blocks": lambda: positions()[1] // 4 == positions()[0] // 4,
    "either": lambda: (positions()[1] <= positions()[0]) | (positions()[1] < 2),
    "by heads": lambda: (
        positions()[1][None] <= positions()[0][None] + torch.arange(2)[:, None, None]
    ),
    "turned": lambda: (positions(K, Q)[1] <= positions(K, Q)[0]).t(),
    "halves": lambda: positions()[1] * 0.5 <= positions()[0],
}


def changed_in_place() -> Tensor:
    mask = torch.ones(Q, K, dtype=torch.bool).tril()
    mask[0].fill_(True)
    return mask


def changed_by_a_view() -> Tensor:
    mask = torch.ones(Q, K, dtype=torch.bool)
    mask.view(-1)[:4].zero_()
    return mask.tril()


WRITTEN: dict[str, Callable[[], Tensor]] = {
    "changed in place": changed_in_place,
    "changed by a view": changed_by_a_view,
}


class Attend(nn.Module):
    def __init__(self, mask: Callable[[], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(), scale=0.3)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 2, Q, 4), torch.randn(2, 2, K, 4), torch.randn(2, 2, K, 4)


def dynamo(model: nn.Module) -> GraphModule:
    graphs: list[GraphModule] = []

    def backend(module: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs())
    return graphs[0]


def exported(model: nn.Module) -> GraphModule:
    return torch.export.export(model, inputs()).graph_module


def mask_of(module: GraphModule) -> Any:
    """The mask argument of a graph's only attention."""
    (call,) = (node for node in module.graph.nodes if "scaled_dot_product" in str(node.target))
    return call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask")


def value_at(total: Sum, index: tuple[int, ...]) -> int:
    """The value of a sum at an index.

    Axes count from 1, the last.
    """
    value = total.constant
    for axis, step in total.steps.items():
        value += step * index[-axis]
    return value


@pytest.mark.parametrize("traced", [dynamo, exported])
@pytest.mark.parametrize("name", [*CAUSAL, *NOT_CAUSAL, *WRITTEN])
def test_conditions_hold_where_the_mask_does(
    name: str, traced: Callable[[nn.Module], GraphModule]
) -> None:
    make = {**CAUSAL, **NOT_CAUSAL, **WRITTEN}[name]
    module = traced(Attend(make))
    mask = mask_of(module)
    # 1. Pair by pair, if the mask can be read.
    sums = conditions(mask)
    if sums is not None:
        dense = make().expand(*example_value(mask).shape)
        for index in itertools.product(*map(range, dense.shape)):
            assert bool(dense[index]) == all(value_at(total, index) >= 0 for total in sums)
    # 2. The pass replaces causal masks only, and the result stays.
    lines = Causal()(module.graph)
    assert len(lines) == (name in CAUSAL)
    assert (mask_of(module) is None) == (name in CAUSAL)
    module.recompile()
    (out,) = module(*inputs())
    torch.testing.assert_close(out, Attend(make)(*inputs()))


class Model(nn.Module):
    """Attention with a mask computed from positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        place = torch.arange(x.shape[1])
        mask = place[:, None] >= place
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_step_allocates_no_mask(dynamic: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model()
    step = passes.compile(model, passes=[Causal()], dynamic=dynamic)
    for tokens in (512, 300):
        x = torch.randn(1, tokens, 32)
        with torch.no_grad():
            torch.testing.assert_close(step(x), model(x))
            assert measured_peak(partial(step, x)) < 9 * x.nbytes  # a mask of floats takes 16
        grads = [
            torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
            for run in (step, model)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
