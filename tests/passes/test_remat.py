"""Recomputation: cuts, gradients, and peaks, against checkpoints and torch's own budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch.fx import Graph, Interpreter
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from passes.protocol import Pass, Stage
from passes.rewrites.checkpoint_cuts import Value, values_to_keep
from passes.rewrites.remat import Choice, Remat, choices
from tests.compiling import Loss, inference, joint
from tests.graphs import WIDTH, Block, Gelu, Swiglu, measured_peak
from tests.support.turns import in_turn


def saved_bytes(values: list[Value], cuts: tuple[int, ...]) -> int:
    """Bytes of the values that are used across a cut."""
    total = 0
    for value in values:
        if any(value.first < cut <= value.last for cut in cuts):
            total += value.size
    return total


def fits(values: list[Value], steps: int, cuts: tuple[int, ...], bound: int) -> bool:
    """Whether pieces of several steps make at most `bound` bytes each."""
    for start, end in itertools.pairwise((0, *cuts, steps)):
        piece_bytes = sum(value.size for value in values if start <= value.first < end)
        if end - start > 1 and piece_bytes > bound:
            return False
    return True


def all_cuts(steps: int) -> Iterator[tuple[int, ...]]:
    for count in range(steps):
        yield from itertools.combinations(range(1, steps), count)


# Size, first step and duration of a value.
ANY_VALUE = st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(0, 6))


@given(st.lists(ANY_VALUE, max_size=8), st.integers(1, 7), st.integers(0, 30))
def test_no_cuts_save_less(numbers: list[tuple[int, int, int]], steps: int, bound: int) -> None:
    values: list[Value] = []
    for size, first, duration in numbers:
        first %= steps
        values.append(Value(size, first, min(first + duration, steps - 1)))
    fitting = [cuts for cuts in all_cuts(steps) if fits(values, steps, cuts, bound)]
    least = min(saved_bytes(values, cuts) for cuts in fitting)
    assert sum(values[number].size for number in values_to_keep(values, steps, bound)) == least


class Tied(nn.Module):
    """A weight that is used twice, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.frozen(self.shared(x).relu()).sin()).exp()


@torch.library.custom_op("remat::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


@square.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(context: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    context.save_for_backward(*inputs)


def _differentiate(context: Any, grad: Tensor) -> Tensor:
    return 2 * grad * context.saved_tensors[0]


square.register_autograd(_differentiate, setup_context=_save)


class Custom(nn.Module):
    """Two MLPs with a custom operator between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Gelu(), Gelu()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.ops.remat.square(self.first(x)).cos())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: Loss(Block(Gelu()), Block(Swiglu())),
    "tied and frozen": lambda: Loss(Tied(), Tied()),
    "custom operator": lambda: Loss(Custom()),
}


def gradients_of(choice: Choice, inputs: list[Tensor]) -> list[Any]:
    """Loss and gradients of a choice's two halves, node by node.

    inputs: of the joint graph; the last is the gradient of the loss
    """
    forward, backward = choice.halves
    *primals, tangent = inputs
    # 1. The forward: its results and inputs by name.
    (returned,) = forward.graph.find_nodes(op="output")[0].args
    names = [node.name for node in (*forward.graph.find_nodes(op="placeholder"), *returned)]
    results = Interpreter(forward).run(*primals)
    values = dict(zip(names, (*primals, *results), strict=True))
    # 2. The backward takes some of them, and the tangent.
    placeholders = backward.graph.find_nodes(op="placeholder")
    operands = [values.get(node.name, tangent) for node in placeholders]
    return [results[0], *Interpreter(backward).run(*operands)]


@pytest.mark.parametrize(("name", "tokens"), in_turn(list(MODELS), (37, 1)))
def test_every_choice_gives_the_results_of_the_joint_graph(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    module = joint(MODELS[name]().double(), x)
    inputs = [
        torch.randn(node.meta["val"].shape, dtype=torch.float64) / 8
        for node in module.graph.find_nodes(op="placeholder")
    ]
    expected = pytree.tree_leaves(Interpreter(module).run(*inputs), lambda leaf: leaf is None)
    options = choices(module)
    assert len(options) > 3
    for choice in options:
        results = gradients_of(choice, inputs)
        # None is the gradient of an input that needs none.
        assert [value is None for value in results] == [value is None for value in expected]
        computed = [value for value in results if value is not None]
        joint_results = [value for value in expected if value is not None]
        torch.testing.assert_close(computed, joint_results, rtol=1e-12, atol=1e-12)


def test_custom_operators_run_once() -> None:
    for choice in choices(joint(MODELS["custom operator"](), torch.randn(1, 64, WIDTH))):
        assert not [node for node in choice.recomputed if "square" in str(node.target)]


@dataclass
class Option:
    """Replaces a choice: its cost and its peak are given."""

    cost: int
    saved_bytes: int
    peak_bytes: int


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8
    ),
    st.integers(0, 45),
    st.integers(0, 45),
)
def test_a_smaller_budget_takes_no_more_memory(
    numbers: list[tuple[int, int, int]], first_budget: int, second_budget: int
) -> None:
    options: list[Any] = [Option(cost, saved, saved + more) for cost, saved, more in numbers]
    small, large = sorted((first_budget, second_budget))
    low, high = Remat(small)._best(options), Remat(large)._best(options)
    assert low.peak_bytes <= high.peak_bytes
    # No more than torch's own choice or the budget, and the fastest that fits it.
    assert high.peak_bytes <= max(options[0].peak_bytes, large)
    costs = [option.cost for option in options if option.peak_bytes <= large]
    assert high.cost == min(costs, default=high.cost)


def annotated(graph: Graph) -> list[str]:
    """The nodes with a policy for the partitioner."""
    return [node.name for node in graph.nodes if "recompute" in node.meta]


def test_a_large_budget_changes_nothing_and_a_line_says_that_a_small_one_is_exceeded() -> None:
    torch.manual_seed(0)
    module = joint(MODELS["tied and frozen"](), torch.randn(1, 512, WIDTH))
    assert Remat(10**9)(module.graph) == ()
    assert not annotated(module.graph)
    (line,) = Remat(0)(module.graph)
    assert "no choice takes less" in line
    assert annotated(module.graph)


def test_inference_is_left_alone() -> None:
    graph = inference(nn.Sequential(Gelu()), torch.randn(1, 64, WIDTH)).graph
    assert Remat(0)(graph) == ()
    assert not annotated(graph)


def test_it_is_a_pass() -> None:
    assert isinstance(Remat(1), Pass)
    assert Remat(1).stage is Stage.JOINT
    assert eval(repr(Remat(7))) == Remat(7) != Remat(8)


@pytest.mark.parametrize(
    ("budget", "error"),
    [(-1, ValueError), (1.5, TypeError), ("6GiB", TypeError), (True, TypeError)],
)
def test_bad_budgets_are_named(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"budget_bytes must be (at least 0|a whole number); got"):
        Remat(budget)


@dataclass(frozen=True)
class Step:
    """A training step: its peak, its gradients, the lines of the pass."""

    peak_bytes: int
    gradients: list[Tensor]
    lines: list[str]


def step(
    model: nn.Module,
    x: Tensor,
    *,
    budget: int | None = None,
    lengths: tuple[int, ...] = (),
    **options: Any,
) -> Step:
    """Compile and run a training step.

    budget: for the pass; None for a step without it
    lengths: of x, to run after its own; their gradients follow the first
    options: of torch.compile
    """
    lines: list[str] = []

    def recompute(graph: Graph) -> None:
        if budget is not None:
            lines.extend(Remat(budget)(graph))

    def run(x: Tensor) -> None:
        model.zero_grad()
        torch.manual_seed(1)
        with torch.enable_grad():
            compiled(x).backward()

    def gradients() -> list[Tensor]:
        grads = [parameter.grad for parameter in model.parameters()]
        return [grad for grad in grads if grad is not None]

    torch._dynamo.reset()
    configs: dict[str, Any] = {"joint_custom_post_pass": recompute, "force_disable_caches": True}
    if budget is not None:
        configs |= Remat(0).options
    with config.patch(configs):
        compiled = torch.compile(model, **options)
        run(x)
        model.zero_grad()
        peak_bytes = measured_peak(lambda: run(x))
        grads = gradients()
        for length in lengths:
            run(x[:, :length])
            grads += gradients()
    return Step(peak_bytes, grads, lines)


class Dropping(nn.Module):
    """An MLP with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(self.up(x).sin(), 0.3))


def test_random_numbers_are_not_recomputed() -> None:
    module = joint(Loss(Dropping(), Dropping()), torch.randn(1, 64, WIDTH), dynamic=True)
    seeds = {node.name for node in module.graph.nodes if "seeds" in node.name}
    assert seeds
    for choice in choices(module):
        assert not {node.name for node in choice.recomputed} & seeds


@pytest.mark.slow
def test_recomputed_dropout_drops_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.rewrites.remat._SHARES", (0.5,))
    monkeypatch.setattr(Remat, "_best", lambda self, options: options[-1])
    torch.manual_seed(0)
    model, x = Loss(Dropping(), Dropping()), torch.randn(1, 301, WIDTH)
    plain, recomputed = step(model, x), step(model, x, budget=0)
    assert len(recomputed.lines) == 1
    assert recomputed.peak_bytes < plain.peak_bytes
    torch.testing.assert_close(recomputed.gradients, plain.gradients, rtol=0, atol=0)


class PerBlock(nn.Module):
    """A checkpoint for each block."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.slow
def test_four_layers_peak_below_checkpoints_and_torchs_budget() -> None:
    """Peaks in units of x, below those of torch.

    A checkpoint per block takes 28.0, torch's best budget 45.4.
    """
    torch.manual_seed(0)
    blocks, x = [Block(Gelu(128), 128) for _ in range(4)], torch.randn(1, 4096, 128)
    recomputed = step(Loss(*blocks), x, budget=28 * x.nbytes)
    per_block = step(Loss(PerBlock(*blocks)), x)
    with functorch_config.patch(activation_memory_budget=0.1):
        built_in = step(Loss(*blocks), x)
    assert recomputed.peak_bytes < 28.0 * x.nbytes
    assert recomputed.peak_bytes < per_block.peak_bytes
    assert recomputed.peak_bytes < built_in.peak_bytes
    torch.testing.assert_close(recomputed.gradients, per_block.gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_fewer_products_are_recomputed_than_by_checkpoints_per_block() -> None:
    torch.manual_seed(0)
    blocks, x = [Block(Gelu(128), 128) for _ in range(4)], torch.randn(1, 4096, 128)
    module = joint(Loss(*blocks), x)
    with config.patch(dict(Remat(0).options)):
        best = Remat(28 * x.nbytes)._best(choices(module))
    forward, _ = best.halves
    assert sum("mm" in node.name for node in forward.graph.nodes) == 16
    assert sum("mm" in node.name for node in best.recomputed) <= 12
