"""Rings simulated in one process against the reference: forward, lse and gradients, over the one table of cases.

Every step of every rank is executed, from the messages that it would receive. What the ledger counts is what the plan said.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.attend import Attend
from compiled_dilated.programs import as_program
from compiled_dilated.ring.plans import RingPlan, layouts_of
from tests.cases import CASES, Case, Inputs, by_name
from tests.strategies import programs
from tests.support.results import (
    assert_same,
    dead_rows_are_zero,
    dense_attention,
    no_worse_than_dense,
    run,
    truth,
)

RANKS = (1, 2, 3, 4, 8, 16)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A ring of few tokens is many small kernels, for each of which two threads wait longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ring(case: Case, n: int, ranks: int, layout: str = "auto") -> Attend:
    return cd.compile(case.program(n), ranks=ranks, layout=layout)


# All cases: at three ranks in every run, at every number of them and more lengths where there is time

LENGTH_OF = {case: next((n for n in case.lengths if n >= 129), case.lengths[-1]) for case in CASES}


@pytest.mark.parametrize("case", [case for case in CASES if LENGTH_OF[case] <= 331], ids=str)
def test_every_case(case: Case) -> None:
    n = LENGTH_OF[case]
    inputs, want = truth(case, n, torch.float64)
    assert_same(run(ring(case, n, 3, "contiguous"), inputs), want)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_at_every_number_of_ranks(case: Case, ranks: int) -> None:
    for n in case.lengths:
        inputs, want = truth(case, n, torch.float64)
        assert_same(run(ring(case, n, ranks), inputs), want)


FEW = (
    "causal",
    "window dilated causal",
    "congruent causal",
    "documents by lengths, causal",
    "padding and documents",
    "from_mod per head",
    "causal and window or sinks",
    "nothing",
    "longnet split causal, uneven",
    "longnet, rates that divide nothing",
    "rows dead in every branch",
    "branches of different orders",
    "values wider than keys",
    "hilbert window shifted",
    "neighborhood of a part of its grid",
)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [(name, ranks) for name in FEW for ranks in (1, 2, 4, 8) if name != "from_mod per head"]
    + [(name, 16) for name in ("causal", "padding and documents", "longnet split causal, uneven")],
)
def test_number_of_ranks(name: str, ranks: int) -> None:
    """Fewer tokens than ranks among them."""
    for n in (1, 37):
        inputs, want = truth(by_name(name), n, torch.float64)
        assert_same(
            run(ring(by_name(name), n, ranks, "auto" if ranks == 2 else "zigzag"), inputs), want
        )


@pytest.mark.parametrize("name", FEW)
def test_every_layout(name: str) -> None:
    case, n = by_name(name), 66
    inputs, want = truth(case, n, torch.float64)
    for layout in layouts_of(as_program(case.program(n)), n, 4):
        assert_same(run(ring(case, n, 4, layout.name.split()[0].split("(")[0]), inputs), want)


@settings(max_examples=8)
@given(
    drawn=programs(),
    ranks=st.integers(1, 5),
    layout=st.sampled_from(("contiguous", "zigzag", "striped")),
)
def test_any_program(drawn: tuple[Program, int], ranks: int, layout: str) -> None:
    program, n = drawn
    generator = torch.Generator().manual_seed(n)
    shapes = ((1, 3, n, 4), (1, 3, n, 4), (1, 3, n, 5), (1, 3, n, 5), (1, 3, n))
    q, k, v, grad_out, grad_lse = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    inputs = Inputs(
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), {}, grad_out, grad_lse
    )
    want = run(lambda *x, **options: cd.reference(program, *x, **options), inputs)
    assert_same(run(cd.compile(program, ranks=ranks, layout=layout), inputs), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "padding of everything",
        "longnet causal",
        "rows dead in one branch",
        "one key head",
    ],
)
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    case, n = by_name(name), 127
    inputs, want = truth(case, n, dtype, with_lse=False)
    got, theirs = (
        run(ring(case, n, 4, "zigzag"), inputs, with_lse=False),
        dense_attention(as_program(case.program(n)), inputs, want),
    )
    assert (got.out.dtype, got.lse.dtype) == (dtype, torch.float32)
    dead_rows_are_zero(got, want)
    no_worse_than_dense("out", got.out, theirs.out, want.out)
    no_worse_than_dense("lse", got.lse, theirs.lse, want.lse)
    for x, dense, exact in zip(got.grads, theirs.grads, want.grads, strict=True):
        no_worse_than_dense("a gradient", x, dense, exact)


# Options of a call


def far_and_by_head(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score * (1 + 0.1 * h) - 0.01 * (q - kv) ** 2 + 0.3 * (q % 7) * (kv % 3) + b


@pytest.mark.parametrize(
    ("name", "layout"),
    [("causal", "contiguous"), ("causal", "zigzag"), ("window dilated causal", "striped"), ("longnet split", "residue"),
     ("hilbert window", "hilbert")],
)  # fmt: skip
def test_score_mod_reads_global_positions_and_heads(name: str, layout: str) -> None:
    case, n = by_name(name), 60
    inputs, program = case.inputs(n, torch.float64), case.program(n)
    options: dict[str, Any] = {"score_mod": far_and_by_head, "scale": 0.2}
    want = run(lambda *x, **more: cd.reference(program, *x, **more), inputs, **options)
    assert_same(run(ring(case, n, 3, layout), inputs, **options), want)


def test_sinks_of_logits() -> None:
    inputs, program = by_name("causal").inputs(70, torch.float64), masks.causal()
    logits = torch.randn(4, dtype=torch.float64)
    want = run(lambda *x, **more: cd.reference(program, *x, **more), inputs, sink_logits=logits)
    assert_same(run(cd.compile(program, ranks=3), inputs, sink_logits=logits), want)


# What torch does with it

LONGNET = cd.longnet((16, 48), (1, 3), causal=True)


def tensors(*leading: int, n: int = 60) -> list[Tensor]:
    return [torch.randn(*leading, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_inside_torch_compile(layout: str) -> None:
    attend = cd.compile(LONGNET, ranks=4, layout=layout)
    x = [each.requires_grad_() for each in tensors(2)]
    want = attend(*x)
    got = torch.compile(lambda *x: attend(*x), fullgraph=True, backend="aot_eager")(*x)
    assert torch.equal(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), x),
        torch.autograd.grad(want.sum(), x),
        rtol=1e-10,
        atol=1e-10,
    )


def test_transforms_of_torch_func() -> None:
    attend, single, many = cd.compile(LONGNET, ranks=3), cd.compile(LONGNET), tensors(3, 2)
    torch.testing.assert_close(
        torch.func.vmap(attend)(*many), torch.func.vmap(single)(*many), rtol=1e-10, atol=1e-10
    )

    def gradients(f: Attend) -> Any:
        return torch.func.grad(lambda q, k, v: f(q, k, v).square().sum(), (0, 1, 2))(
            *(x[0] for x in many)
        )

    torch.testing.assert_close(gradients(attend), gradients(single), rtol=1e-10, atol=1e-10)


def test_two_runs_give_the_same_bits() -> None:
    case = by_name("longnet causal")
    inputs, attend = case.inputs(129, torch.float32), ring(case, 129, 4, "zigzag")
    first, second = run(attend, inputs), run(attend, inputs)
    for one, other in zip(
        (first.out, first.lse, *first.grads), (second.out, second.lse, *second.grads), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(first.frozen[0], first.out)


def test_a_copy_computes_the_same() -> None:
    attend = cd.compile(LONGNET, ranks=4, layout="zigzag")
    x = tensors(1)
    copy = pickle.loads(pickle.dumps(attend))
    assert (
        repr(copy)
        == repr(attend)
        == f"compile({LONGNET!r}, Ring(4, layout='zigzag', transport=simulated))"
    )
    assert torch.equal(copy(*x), attend(*x))


def test_nothing_leaks_backwards_in_any_layout() -> None:
    q, k, v = tensors(1, n=61)
    for layout in ("contiguous", "zigzag", "striped", "residue"):
        attend = cd.compile(LONGNET, ranks=4, layout=layout)
        before = attend(q, k, v)
        changed = [torch.cat([x[:, :, :40], -x[:, :, 40:] + 1], dim=2) for x in (q, k, v)]
        assert torch.equal(attend(*changed)[:, :, :40], before[:, :, :40])


# What the plan says, and what is done


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "residue"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_ledger_equals_the_plan(ranks: int, layout: str) -> None:
    attend, x = (
        cd.compile(LONGNET, ranks=ranks, layout=layout),
        [each.requires_grad_() for each in tensors(2)],
    )
    plan = attend.plan(*x)
    out = attend(*x)
    for _ in range(2):  # a backward receives what a forward does
        assert attend.ring is not None
        ledger = attend.ring.ledger
        assert ledger.received_bytes == sum(load.received_bytes for load in plan.loads)
        assert ledger.messages == sum(load.messages for load in plan.loads)
        assert ledger.steps == sum(load.steps for load in plan.loads)
        out.sum().backward(retain_graph=True)


def planned(layout: str = "auto", ranks: int = 4, n: int = 100) -> RingPlan:
    return cd.plan(LONGNET, (2, 4, n, 8), kv_heads=2, ranks=ranks, layout=layout)


@pytest.mark.parametrize("layout", ["auto", "contiguous", "zigzag", "striped", "residue"])
@pytest.mark.parametrize(("n", "ranks"), [(100, 4), (3, 5), (17, 16)])
def test_positions_partition_the_tokens(layout: str, n: int, ranks: int) -> None:
    plan = planned(layout, ranks, n)
    assert torch.cat(
        [plan.positions(rank) for rank in range(ranks)]
    ).sort().values.tolist() == list(range(n))


def test_positions_along_a_curve() -> None:
    plan = cd.plan(masks.neighborhood((8, 8), 2), (1, 1, 64, 8), ranks=4, layout="hilbert")
    quarters = [
        sorted({(at // 8 // 4, at % 8 // 4) for at in plan.positions(rank).tolist()})
        for rank in range(4)
    ]
    assert sorted(quarters) == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]


def test_the_plan_weighs_layouts_and_says_why() -> None:
    plan = planned()
    told = json.loads(json.dumps(plan.to_json()))
    assert (told["ranks"], told["layout"], told["kv_heads"]) == (4, plan.schedule.layout.name, 2)
    assert [row["layout"] for row in told["layouts"] if row["chosen"]] == [told["layout"]]
    assert [row["layout"] for row in told["layouts"]] == [
        "contiguous",
        "zigzag",
        "striped",
        "residue 3",
    ]
    text = plan.explain()
    assert str(plan) == text
    assert f"chosen    {told['layout']}: the slowest rank, bound by what it " in text
    assert "over 4 ranks" in text
    assert "as asked" in planned("zigzag").explain()


def test_the_layout_follows_the_mask() -> None:
    """Windows stay where they are, causal work is evened out."""
    shape = (1, 8, 65536, 64)
    assert (
        cd.plan(masks.causal() & masks.window(1024), shape, ranks=8).schedule.layout.name
        == "contiguous"
    )
    assert cd.plan(masks.causal(), shape, ranks=8).schedule.layout.name in ("zigzag", "striped")
