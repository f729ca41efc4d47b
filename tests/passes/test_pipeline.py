"""Steps under a memory budget: choices, peaks, reports, bad input."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import passes
from compiled_dilated.measure import peak_bytes
from passes import BudgetError, Chunk, LinearCrossEntropy, Pass, Spill
from passes.analysis import costs
from passes.planning import budgets, choose
from passes.planning.candidates import Passes, candidates
from passes.planning.choose import Choice
from passes.planning.estimates import Estimate
from passes.planning.tracing import Captured, Traced, capture, trace
from tests.caches import empty_inductor_caches
from tests.compiling import Loss, train
from tests.graphs import WIDTH, Block, Gelu, measured_peak
from tests.support.user_passes import Twice, Unfrozen, WithOptions

aten = torch.ops.aten
SPILL = Spill(least_bytes=2**12)
# Candidates.
TRAINING: list[list[Any]] = [[], [SPILL]]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return Loss(Gelu())


@pytest.fixture(autouse=True)
def without_earlier_graphs() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def estimates() -> tuple[Estimate, ...]:
    """The estimates of an MLP's training step under TRAINING, at 1024 tokens."""
    x = torch.empty(1024, 64, device="meta")
    return passes.estimate(mlp(), [x], train=True, passes=TRAINING)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("6GiB", 6 * 2**30),
        ("512 MB", 512 * 10**6),
        ("0.5GiB", 2**29),
        (" 7 B ", 7),
        ("1.5 KiB", 1536),
        ("2TB", 2 * 10**12),
    ],
)
def test_budgets_are_parsed(text: int | str, size: int) -> None:
    assert budgets.parse("memory_budget", text) == size


def test_a_budget_is_kept_at_every_length(estimates: tuple[Estimate, ...]) -> None:
    """Peaks are within the budget by the allocator's events.

    A length for which the plan does not fit raises before it runs.
    """
    model = mlp()
    parameters = list(model.parameters())
    for estimate in estimates:
        torch._dynamo.reset()
        budget = estimate.peak_bytes
        step = passes.compile(model, memory_budget=budget, dynamic=True, passes=estimate.passes)
        for tokens in (1024, 700, 333, 1001, 64, 2):
            x = torch.randn(tokens, 64)
            input_bytes = x.nbytes + sum(parameter.nbytes for parameter in parameters)
            train(step, parameters, x)
            peak = measured_peak(partial(train, step, parameters, x)) + input_bytes
            assert peak <= 1.03 * budget
        message = r"at least .* for sizes \{'s\d+': 1100\} under the plan made for earlier ones"
        with pytest.raises(BudgetError, match=message):
            step(torch.randn(1100, 64))


def test_the_fastest_candidate_that_fits_is_chosen_and_the_least_budget_named(
    estimates: tuple[Estimate, ...],
) -> None:
    plain, spilled = estimates
    assert (plain.passes, spilled.passes) == ((), (SPILL,))
    assert plain.seconds < spilled.seconds
    assert plain.peak_bytes > spilled.peak_bytes

    def chosen(budget: int | None) -> Choice:
        choose = passes.pipeline(budget, TRAINING).choose
        return capture(mlp(), [torch.empty(1024, 64, device="meta")], choose, train=True)

    assert chosen(None).chosen == plain
    assert chosen(plain.peak_bytes).chosen == plain
    assert chosen(plain.peak_bytes - 1).chosen == spilled
    assert chosen(spilled.peak_bytes).chosen == spilled
    message = rf"memory_budget must be at least {spilled.peak_bytes:,} bytes .*Spill.*Raise it"
    with pytest.raises(BudgetError, match=message) as info:
        chosen(spilled.peak_bytes - 1)
    assert info.value.least_bytes == spilled.peak_bytes


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("budget", [None, 1, 2**28, 2**40])
def test_no_candidate_is_offered_twice(train: bool, budget: int | None) -> None:
    offered = list(itertools.chain(*candidates(train, budget)))
    assert len(offered) == len(set(offered))


@pytest.mark.parametrize("train", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_least_budget_in_the_message_suffices(train: bool) -> None:
    """Chunks grow with the budget, and must not exceed that one."""
    x = torch.empty(1, 2**15, WIDTH, device="meta")

    def choose(budget: int) -> Choice:
        return capture(Block(Gelu()), [x], passes.pipeline(budget).choose, train=train)

    with pytest.raises(BudgetError) as info:
        choose(1)
    least = info.value.least_bytes
    assert choose(least).chosen.peak_bytes <= least
    with pytest.raises(BudgetError, match=f"at least {least:,} bytes"):
        choose(least - 1)


def test_estimated_peaks_are_measured(estimates: tuple[Estimate, ...]) -> None:
    model, x = mlp(), torch.randn(1024, 64)
    parameters = list(model.parameters())
    step = passes.compile(model, passes=[SPILL], dynamic=False)
    grads = [grad.double() for grad in train(step, parameters, x)]
    exact = copy.deepcopy(model).double()
    expected = list(train(exact, list(exact.parameters()), x.double()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-7)
    measured = measured_peak(partial(train, step, parameters, x))
    assert measured == pytest.approx(estimates[1].added_bytes, rel=0.03)


class Checkpointed(nn.Module):
    """A subgraph, which passes are called with first, and do not change."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(Twice(), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("model", "budget", "expected"),
    [
        (Loss(), "1GiB", [""]),
        (mlp(), "1GiB", [""]),
        (nn.Sequential(Checkpointed(), mlp()), "1GiB", [""]),
        (mlp(), "1MiB", ["", "Chunk", "Spill", "Chunk Spill", "Chunk Spill Materialize Reorder"]),
    ],
)
def test_only_candidates_that_may_win_are_traced(
    model: nn.Module, budget: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No idle passes, no needless spills or orders.

    No spills if the budget is large, no orders if anything else fits.
    """
    names: list[str] = []

    def recorded(graph: Captured, passes: Passes) -> Traced:
        names.append(" ".join(type(member).__name__ for member in passes))
        return trace(graph, passes)

    monkeypatch.setattr(choose, "trace", recorded)
    x, pipeline = torch.empty(4096, WIDTH, requires_grad=True), passes.pipeline(budget)
    with empty_inductor_caches(), contextlib.suppress(BudgetError):
        capture(model, [x], pipeline.choose, train=True, dynamic=False)
    assert names == expected


class Head(nn.Module):
    """An MLP and a wide head with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Gelu(), nn.Linear(64, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        target = torch.zeros(len(x), dtype=torch.int64)
        return nn.functional.cross_entropy(self.head(x + self.mlp(x)), target)


def test_estimates_include_the_workspace_of_operators_in_chunks() -> None:
    """What they allocate inside is in no graph."""
    torch.manual_seed(0)
    model, x = Head(), torch.randn(2048, 64)
    parameters = list(model.parameters())
    chunked: list[Pass] = [Chunk(rows=256), LinearCrossEntropy(chunk_bytes=2**20)]
    estimates = passes.estimate(model, [x], train=True, passes=[[], chunked])
    plain, estimate = sorted(estimates, key=lambda estimate: -estimate.peak_bytes)
    step = passes.compile(model, passes=chunked, dynamic=False)
    train(step, parameters, x)
    measured = measured_peak(partial(train, step, parameters, x))
    assert measured == pytest.approx(estimate.added_bytes, rel=0.01)
    assert estimate.added_bytes < plain.added_bytes / 4


def test_estimating_takes_no_memory_for_the_inputs() -> None:
    """Sixteen million tokens, 4 GiB."""
    estimates: list[Estimate] = []
    inputs = [torch.empty(2**24, 64, device="meta")]

    def estimate() -> None:
        estimates.extend(passes.estimate(mlp(), inputs, train=False, passes=[()]))

    resident_bytes = peak_bytes(estimate)
    assert estimates[0].peak_bytes > 2**34
    assert resident_bytes < 2**29


def test_the_report_has_peaks_changes_and_lines() -> None:
    x = torch.randn(1024, 64)
    step = passes.compile(mlp(), memory_budget="1GiB", passes=[SPILL], dynamic=False)
    train(step, list(step.parameters()), x)
    report = passes.report(step, [x])
    assert report.measured_bytes == pytest.approx(report.choices[0].chosen.added_bytes, rel=0.05)
    parts = ("graph 0, training: predicted peak ", "no pass", "(inputs)", "is spilled to disk")
    for part in (*parts, "graphs.py:", "measured: "):
        assert part in str(report)
    (graph,) = report.to_json()["graphs"]
    assert graph["chosen"]["peak_bytes"] < graph["plain"]["peak_bytes"]
    assert graph["chosen"]["keeps_bits"]
    assert graph["changes"][0]["lines"]


def conflicting() -> None:
    passes.inductor_configs([WithOptions({"debug": 1}), WithOptions({"debug": 2})])


def budgeted(budget: int | str) -> Callable[[], Any]:
    return partial(passes.compile, Twice(), memory_budget=budget)


UNITS = (
    "memory_budget must be a number and one of B, KiB, KB, MiB, MB, GiB, GB, TiB, TB, "
    "as '6GiB' or '512 MB'"
)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: passes.compile(Twice()), ValueError,
     "memory_budget or passes must be given; got neither"),
    (budgeted(0), ValueError, "memory_budget must be at least 1 byte; got 0"),
    (budgeted(-5), ValueError, "memory_budget must be at least 1 byte; got -5"),
    (budgeted("0 MiB"), ValueError, "memory_budget must be at least 1 byte; got '0 MiB'"),
    (budgeted("6 Gib"), ValueError, f"{UNITS}; got '6 Gib'"),
    (budgeted("-1GiB"), ValueError, f"{UNITS}; got '-1GiB'"),
    (budgeted("much"), ValueError, f"{UNITS}; got 'much'"),
    (lambda: passes.compile(Twice(), passes=[Spill]), TypeError,  # type: ignore[list-item]
     "passes[0] must be a pass, with stage"),
    (lambda: passes.compile(Twice(), passes=[SPILL, print]), TypeError,  # type: ignore[list-item]
     "passes[1] must be a pass, with stage"),
    (lambda: passes.compile(Twice(), passes=[], extra=[Unfrozen()]), TypeError,
     "extra[0] must be a frozen dataclass"),
    (lambda: passes.compile(Twice(), passes=[WithOptions({})]), TypeError,
     "passes[0] must be hashable; got WithOptions(options={})"),
    (conflicting, ValueError, "sets debug=2, another pass 1"),
    (lambda: passes.report(Twice()), ValueError, "step must come from passes.compile; got Twice"),
    (lambda: passes.report(passes.compile(Twice(), passes=[])), ValueError,
     "step must have been called once"),
    (lambda: costs.register(aten.mm, print), TypeError,  # type: ignore[arg-type]
     "op must be an operator's overload"),
    (lambda: passes.estimate(lambda x: 3, [torch.ones(2)], train=False), ValueError,
     "model must compute with tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        act()
