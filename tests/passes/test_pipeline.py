"""Budgets kept, plans that a warm cache does not lose, a user's own pass, the report, and bad input."""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

import compiled_dilated as cd
import passes
from passes import BudgetError, Chunk, LinearCrossEntropy, Spill, Stage
from passes.analysis import costs
from passes.planning import budgets, choose, inductor_hooks
from passes.planning.choose import Choice, Estimate
from passes.planning.tracing import Captured, capture, trace
from tests import compiling
from tests.graphs import WIDTH, Block, Gelu, Llama, Swiglu, Unet, Vit, measured_peak

aten = torch.ops.aten
SPILL = Spill(least_bytes=2**12)
TRAINING: list[list[Any]] = [[], [SPILL]]


@dataclass(frozen=True)
class Doubled:
    """A user's own pass: x * 2 becomes x + x, the same bits."""

    runs: ClassVar[list[str]] = []
    stage: ClassVar[Stage] = Stage.LOWERED
    keeps_bits: ClassVar[bool] = True

    def __call__(self, graph: Graph) -> Sequence[str]:
        found = [
            node
            for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor)
            if node.args[1] == 2
        ]
        for node in found:
            node.target, node.args = aten.add.Tensor, (node.args[0], node.args[0])
        self.runs.append(str(graph))
        return [f"{node.name} is a sum" for node in found]


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cos() * 2


class Loss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Gelu(), Loss())


def train(step: Callable[..., Any], parameters: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return torch.autograd.grad(step(x), parameters)


@pytest.fixture(autouse=True)
def new_start() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def estimates() -> tuple[Estimate, ...]:
    """Of the training candidates above, at 1024 tokens."""
    return passes.estimate(
        mlp(), [torch.empty(1024, 64, device="meta")], train=True, passes=TRAINING
    )


@pytest.mark.parametrize(
    ("written", "size"),
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
def test_budgets_are_read(written: int | str, size: int) -> None:
    assert budgets.parse("memory_budget", written) == size


def test_a_budget_is_kept_at_every_length(estimates: tuple[Estimate, ...]) -> None:
    """By the allocator's own events. A length for which the plan does not fit is refused before anything runs."""
    model = mlp()
    parameters = list(model.parameters())
    for estimate in estimates:
        torch._dynamo.reset()
        budget = estimate.peak_bytes
        step = passes.compile(model, memory_budget=budget, dynamic=True, passes=estimate.passes)
        for tokens in (1024, 700, 333, 1001, 64, 2):
            x = torch.randn(tokens, 64)
            inputs = x.nbytes + sum(each.nbytes for each in parameters)
            train(step, parameters, x)
            assert measured_peak(partial(train, step, parameters, x)) + inputs <= 1.03 * budget
        with pytest.raises(
            BudgetError,
            match=r"at least .* for sizes \{'s\d+': 1100\} under the plan made for earlier ones",
        ):
            step(torch.randn(1100, 64))


def test_the_cheapest_that_fits_is_chosen_and_the_least_budget_is_told(
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
    wanted = rf"memory_budget must be at least {spilled.peak_bytes:,} bytes .*Spill.*Raise it"
    with pytest.raises(BudgetError, match=wanted) as info:
        chosen(spilled.peak_bytes - 1)
    assert info.value.least_bytes == spilled.peak_bytes


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("budget", [None, 1, 2**28, 2**40])
def test_no_candidate_is_offered_twice(train: bool, budget: int | None) -> None:
    offered = [each for group in choose.candidates(train, budget) for each in group]
    assert len(offered) == len(set(offered))


@pytest.mark.parametrize("train", [True, False])
def test_the_least_budget_that_is_told_does(train: bool) -> None:
    """Chunks are longer under a larger budget, and must not make of the told one a budget that is too small."""
    x = torch.empty(1, 2**18, WIDTH, device="meta")

    def choose(budget: int) -> Choice:
        return capture(Block(Gelu()), [x], passes.pipeline(budget).choose, train=train)

    with pytest.raises(BudgetError) as info:
        choose(1)
    least = info.value.least_bytes
    assert choose(least).chosen.peak_bytes <= least
    with pytest.raises(BudgetError, match=f"at least {least:,} bytes"):
        choose(least - 1)


def test_estimates_are_what_a_step_takes(estimates: tuple[Estimate, ...]) -> None:
    model, x = mlp(), torch.randn(1024, 64)
    parameters = list(model.parameters())
    step = passes.compile(model, passes=[SPILL], dynamic=False)
    got = train(step, parameters, x)
    for one, other in zip(
        got, train(model.double(), list(model.parameters()), x.double()), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)
    model.float()
    assert measured_peak(partial(train, step, parameters, x)) == pytest.approx(
        estimates[1].added_bytes, rel=0.03
    )


class Kept(nn.Module):
    """A graph within the graph, which passes see first, and where they find nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(Twice(), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("model", "budget", "expected"),
    [
        (Loss(), "1GiB", [""]),
        (mlp(), "1GiB", ["", "Chunk"]),
        (nn.Sequential(Kept(), mlp()), "1GiB", ["", "Chunk"]),
        (mlp(), "1MiB", ["", "Chunk", "Spill", "Chunk Spill", "Chunk Spill Materialize Reorder"]),
    ],
)
def test_only_candidates_that_may_win_are_traced(
    model: nn.Module, budget: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None whose passes are idle, no spills where memory is plenty, no orders where anything else fits."""
    seen = []

    def counted(graph: Captured, passes: choose.Passes) -> choose.Traced:
        seen.append(" ".join(type(each).__name__ for each in passes))
        return trace(graph, passes)

    monkeypatch.setattr(choose, "trace", counted)
    step = passes.compile(model, memory_budget=budget, dynamic=False)
    with fresh_cache(), contextlib.suppress(BudgetError):
        step(torch.randn(4096, WIDTH, requires_grad=True))
    assert seen == expected


class Head(nn.Module):
    """An MLP and a wide head with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Gelu(), nn.Linear(64, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        target = torch.zeros(len(x), dtype=torch.int64)
        return nn.functional.cross_entropy(self.head(x + self.mlp(x)), target)


def test_operators_in_chunks_are_rehearsed() -> None:
    """What they hold inside stands in no graph."""
    torch.manual_seed(0)
    model, x = Head(), torch.randn(2048, 64)
    parameters, chunked = (
        list(model.parameters()),
        [Chunk(rows=256), LinearCrossEntropy(chunk_bytes=2**20)],
    )
    plain, found = sorted(
        passes.estimate(model, [x], train=True, passes=[[], chunked]),
        key=lambda each: -each.peak_bytes,
    )
    step = passes.compile(model, passes=chunked, dynamic=False)
    train(step, parameters, x)
    assert measured_peak(partial(train, step, parameters, x)) == pytest.approx(
        found.added_bytes, rel=0.01
    )
    assert found.added_bytes < plain.added_bytes / 4


def test_estimating_takes_no_memory_for_the_inputs() -> None:
    """Sixteen million tokens, 4 GiB, of which no byte is touched."""
    from compiled_dilated.measure import peak_bytes

    found: list[Estimate] = []
    inputs = [torch.empty(2**24, 64, device="meta")]
    taken = peak_bytes(
        lambda: found.extend(passes.estimate(mlp(), inputs, train=False, passes=[()]))
    )
    assert found[0].peak_bytes > 2**34
    assert taken < 2**29


def test_a_users_own_pass_runs_and_a_warm_cache_keeps_the_report() -> None:
    x = torch.randn(64, 64)
    with fresh_cache():
        texts, runs = [], []
        for _ in range(2):
            torch._dynamo.reset()
            Doubled.runs.clear()
            with torch.no_grad():
                step = passes.compile(Twice(), passes=[], extra=[Doubled()], dynamic=False)
                torch.testing.assert_close(step(x), x.cos() * 2)
            texts.append(str(passes.report(step)))
            runs.append(len(Doubled.runs))
    assert runs == [2, 1]  # once for the plan, and once in inductor, if it compiles
    assert texts[0] == texts[1]
    assert "Doubled()\n  mul is a sum" in texts[0]


def test_the_name_in_the_cache_tells_options_and_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    names = {
        inductor_hooks.identity(each)
        for each in ((), (Spill(),), (SPILL,), (Doubled(),), (SPILL, Doubled()))
    }
    assert len(names) == 5
    assert inductor_hooks.identity((SPILL,)) == inductor_hooks.identity((Spill(least_bytes=2**12),))
    before, copy = inductor_hooks.identity((Doubled(),)), tmp_path / "copy.py"
    copy.write_text("# another source")
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(copy))
    assert inductor_hooks.identity((Doubled(),)) != before


def test_the_report_tells_peaks_changes_and_lines() -> None:
    x = torch.randn(1024, 64)
    step = passes.compile(mlp(), memory_budget="1GiB", passes=[SPILL], dynamic=False)
    train(step, list(step.parameters()), x)
    report = passes.report(step, [x])
    assert report.measured_bytes == pytest.approx(report.choices[0].chosen.added_bytes, rel=0.05)
    text = str(report)
    for expected in (
        "graph 0, training: predicted peak ",
        "no pass",
        "(inputs)",
        "waits on disk",
        "graphs.py:",
        "measured: ",
    ):
        assert expected in text
    (graph,) = report.to_json()["graphs"]
    assert graph["chosen"]["peak_bytes"] < graph["plain"]["peak_bytes"]
    assert graph["chosen"]["keeps_bits"]
    assert graph["changes"][0]["lines"]


@pytest.mark.slow
def test_a_package_of_aotinductor_has_the_passes(tmp_path: Any) -> None:
    x = torch.randn(64, 64)
    Doubled.runs.clear()
    program = torch.export.export(
        Twice(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
    )
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "m.pt2"),
        inductor_configs=passes.inductor_configs([Doubled()]),
    )
    assert len(Doubled.runs) == 1
    run = torch._inductor.aoti_load_package(path)
    for tokens in (64, 7):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(run(x), x.cos() * 2)


def tokens(count: int) -> Tensor:
    return torch.randn(1, count, WIDTH)


def images(count: int) -> Tensor:
    """About as many patches of 8 x 8 as tokens are asked for."""
    return torch.randn(max(2, count // 64), 3, 64, 64).contiguous(memory_format=torch.channels_last)


def stack(numbers: random.Random) -> nn.Module:
    return compiling.Loss(
        *(numbers.choice((Gelu, Swiglu))() for _ in range(numbers.randrange(1, 4)))
    )


def blocks(numbers: random.Random) -> nn.Module:
    return compiling.Loss(
        *(Block(numbers.choice((Gelu, Swiglu))()) for _ in range(numbers.randrange(1, 4)))
    )


def longnet(numbers: random.Random) -> nn.Module:
    attend = cd.compile(cd.longnet((numbers.choice((128, 200)), 512), (1, 2), causal=True))
    return compiling.Loss(
        *(
            Block(numbers.choice((Gelu, Swiglu))(), attend=attend)
            for _ in range(numbers.randrange(1, 4))
        )
    )


# A model, the inputs of a size for it, the largest size, and how many runs: of images of new sizes torch compiles each anew.
RANDOM: dict[
    str, tuple[Callable[[random.Random], nn.Module], Callable[[int], Tensor], int, int]
] = {
    "mlps": (stack, tokens, 3000, 20),
    "blocks": (blocks, tokens, 3000, 20),
    "longnet": (longnet, tokens, 3000, 20),
    "llama": (lambda _: compiling.Loss(Llama()), tokens, 1500, 20),
    "vit": (lambda _: compiling.Loss(Vit()), images, 2000, 20),
    "unet": (
        lambda _: compiling.Loss(Unet()).to(memory_format=torch.channels_last),
        images,
        2000,
        6,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RANDOM)
def test_random_models_lengths_and_budgets(name: str, seed: int) -> None:
    """Two hundred runs and more in all: none takes more than 1.03 of its budget."""
    numbers = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    make, inputs, most, wanted = RANDOM[name]
    model = make(numbers)
    parameters, ran, first = list(model.parameters()), 0, inputs(most // 2)
    peaks = [each.peak_bytes for each in passes.estimate(model, [first], train=True)]
    while ran < wanted:
        torch._dynamo.reset()
        budget = numbers.randrange(min(peaks), 2 * max(peaks))
        step = passes.compile(model, memory_budget=budget, dynamic=True)
        train(step, parameters, first)
        for _ in range(7):
            x = inputs(numbers.randrange(2, most))
            held = x.nbytes + sum(each.nbytes for each in parameters)
            try:
                train(step, parameters, x)
            except BudgetError:
                continue
            assert measured_peak(partial(train, step, parameters, x)) + held <= 1.03 * budget
            ran += 1


@dataclass
class Thawed:
    stage: ClassVar[Stage] = Stage.LOWERED
    keeps_bits: ClassVar[bool] = True

    def __call__(self, graph: Graph) -> Sequence[str]:
        return []


@dataclass(frozen=True)
class Wanting:
    options: dict[str, Any]
    stage: ClassVar[Stage] = Stage.LOWERED
    keeps_bits: ClassVar[bool] = True

    def __call__(self, graph: Graph) -> Sequence[str]:
        return []


def test_options_that_a_pass_wants_are_set() -> None:
    found = passes.inductor_configs([Wanting({"allow_buffer_reuse": False}), Doubled()])
    assert found["allow_buffer_reuse"] is False
    assert set(found) == {"allow_buffer_reuse", "post_grad_custom_post_pass"}


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: passes.compile(Twice()), ValueError, "memory_budget or passes must be given; got neither"),
    *(
        (partial(passes.compile, Twice(), memory_budget=bad), error, f"memory_budget must be {wanted}; got {bad!r}")
        for bad, error, wanted in (
            (0, ValueError, "at least 1 byte"),
            (-5, ValueError, "at least 1 byte"),
            ("0 MiB", ValueError, "at least 1 byte"),
            ("6 Gib", ValueError, "a number and one of B, KiB, KB, MiB, MB, GiB, GB, TiB, TB, as '6GiB' or '512 MB'"),
            ("-1GiB", ValueError, "a number and one of B, KiB, KB, MiB, MB, GiB, GB, TiB, TB, as '6GiB' or '512 MB'"),
            ("much", ValueError, "a number and one of B, KiB, KB, MiB, MB, GiB, GB, TiB, TB, as '6GiB' or '512 MB'"),
        )
    ),
    (lambda: passes.compile(Twice(), passes=[Spill]), TypeError, "passes[0] must be a pass, with stage"),
    (lambda: passes.compile(Twice(), passes=[SPILL, print]), TypeError, "passes[1] must be a pass, with stage"),
    (lambda: passes.compile(Twice(), passes=[], extra=[Thawed()]), TypeError, "extra[0] must be a frozen dataclass"),
    (lambda: passes.compile(Twice(), passes=[Wanting({})]), TypeError, "passes[0] must be hashable; got Wanting(options={})"),
    (lambda: passes.inductor_configs([Wanting({"debug": 1}), Wanting({"debug": 2})]), ValueError, "wants debug=2, another"),
    (lambda: passes.report(Twice()), ValueError, "step must come from passes.compile; got Twice"),
    (lambda: passes.report(passes.compile(Twice(), passes=[])), ValueError, "step must have been called once"),
    (lambda: costs.register(aten.mm, print), TypeError, "op must be an operator's overload"),  # type: ignore[arg-type]
    (lambda: passes.estimate(lambda x: 3, [torch.ones(2)], train=False), ValueError, "model must compute with tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        act()
