"""Simulated rings against the reference, over the table of cases.

Forward, lse and gradients are compared.

Every step of every rank is executed, from the messages that it would receive.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from functools import partial
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
from tests.comparing import assert_close, leaves, normal
from tests.strategies import programs
from tests.support.results import (
    assert_same,
    dead_rows_are_zero,
    dense_attention,
    no_worse_than_dense,
    run,
    truth,
)
from tests.support.turns import in_turn

RANKS = (1, 2, 3, 4, 8, 16)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Kernels on few tokens are faster with one thread than with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ring(case: Case, n: int, ranks: int, layout: str = "auto") -> Attend:
    return cd.compile(case.program(n), ranks=ranks, layout=layout)


# Half of the cases: three ranks in every run; all, with more ranks and lengths, in slow runs


def length_of(case: Case) -> int:
    """The first length of at least 129 tokens, or the last one."""
    long = [n for n in case.lengths if n >= 129]
    return long[0] if long else case.lengths[-1]


LENGTH_OF = {case: length_of(case) for case in CASES}


SHORT = [case for case in CASES if LENGTH_OF[case] <= 331]


@pytest.mark.parametrize("case", SHORT[::2], ids=str)
def test_every_second_case(case: Case) -> None:
    """Run every second case; `FEW` of the rest run below, all of them in slow runs."""
    n = LENGTH_OF[case]
    inputs, expected = truth(case, n, torch.float64)
    assert_same(run(ring(case, n, 3, "contiguous"), inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_at_every_number_of_ranks(case: Case, ranks: int) -> None:
    """The lengths come in turn, so that every number of ranks meets every length."""
    n = case.lengths[(CASES.index(case) + RANKS.index(ranks)) % len(case.lengths)]
    inputs, expected = truth(case, n, torch.float64)
    assert_same(run(ring(case, n, ranks), inputs), expected)


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
    [
        *in_turn([name for name in FEW if name != "from_mod per head"], (1, 2, 4, 8), count=2),
        *(("causal", 16), ("longnet split causal, uneven", 16)),
    ],
)
def test_any_number_of_ranks_gives_the_reference(name: str, ranks: int) -> None:
    """With fewer tokens than ranks too."""
    case, layout = by_name(name), "auto" if ranks == 2 else "zigzag"
    for n in (1, 37):
        inputs, expected = truth(case, n, torch.float64)
        assert_same(run(ring(case, n, ranks, layout), inputs), expected)


@pytest.mark.parametrize("name", FEW)
def test_every_layout_gives_the_reference(name: str) -> None:
    case, n = by_name(name), 66
    inputs, expected = truth(case, n, torch.float64)
    for layout in layouts_of(as_program(case.program(n)), n, 4):
        # "residue 3" and "hilbert(8, 8)" are named "residue" and "hilbert".
        layout_name = layout.name.split()[0].split("(")[0]
        assert_same(run(ring(case, n, 4, layout_name), inputs), expected)


def test_the_plan_of_a_ring_refuses_what_a_call_does() -> None:
    attend = cd.compile(masks.causal(), ranks=2)
    q, k = normal((1, 2, 4, 8), (1, 2, 9, 8))
    for work in (attend, attend.plan):
        with pytest.raises(ValueError, match="a ring deals out one sequence; got 4 queries"):
            work(q, k, k)
        with pytest.raises(ValueError, match="one sequence; got 9 queries at offset 3"):
            work(k, k, k, q_offset=3)


@settings(max_examples=8)
@given(
    drawn=programs(),
    ranks=st.integers(1, 5),
    layout=st.sampled_from(("contiguous", "zigzag", "striped")),
)
def test_any_program(drawn: tuple[Program, int], ranks: int, layout: str) -> None:
    program, n = drawn
    shapes = (1, 3, n, 4), (1, 3, n, 4), (1, 3, n, 5), (1, 3, n, 5), (1, 3, n)
    q, k, v, grad_out, grad_lse = normal(*shapes, seed=n)
    for x in (q, k, v):
        x.requires_grad_()
    inputs = Inputs(q, k, v, {}, grad_out, grad_lse)
    expected = run(partial(cd.reference, program), inputs)
    assert_same(run(cd.compile(program, ranks=ranks, layout=layout), inputs), expected)


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
    inputs, exact = truth(case, n, dtype, with_lse=False)
    result = run(ring(case, n, 4, "zigzag"), inputs, with_lse=False)
    dense = dense_attention(as_program(case.program(n)), inputs, exact)
    assert (result.out.dtype, result.lse.dtype) == (dtype, torch.float32)
    dead_rows_are_zero(result, exact)
    no_worse_than_dense("out", result.out, dense.out, exact.out)
    no_worse_than_dense("lse", result.lse, dense.lse, exact.lse)
    for grad, dense_grad, exact_grad in zip(result.grads, dense.grads, exact.grads, strict=True):
        no_worse_than_dense("a gradient", grad, dense_grad, exact_grad)


# Options of a call


def far_and_by_head(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score * (1 + 0.1 * h) - 0.01 * (q - kv) ** 2 + 0.3 * (q % 7) * (kv % 3) + b


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("causal", "contiguous"),
        ("causal", "zigzag"),
        ("window dilated causal", "striped"),
        ("longnet split", "residue"),
        ("hilbert window", "hilbert"),
    ],
)
def test_score_mod_reads_global_positions_and_heads(name: str, layout: str) -> None:
    case, n = by_name(name), 60
    inputs, program = case.inputs(n, torch.float64), case.program(n)
    options: dict[str, Any] = {"score_mod": far_and_by_head, "scale": 0.2}
    expected = run(partial(cd.reference, program), inputs, **options)
    assert_same(run(ring(case, n, 3, layout), inputs, **options), expected)


def test_sink_logits_join_the_denominator() -> None:
    inputs, program = by_name("causal").inputs(70, torch.float64), masks.causal()
    logits = torch.randn(4, dtype=torch.float64)
    expected = run(partial(cd.reference, program), inputs, sink_logits=logits)
    assert_same(run(cd.compile(program, ranks=3), inputs, sink_logits=logits), expected)


# torch.compile, torch.func, copies

LONGNET = cd.longnet((16, 48), (1, 3), causal=True)


def tensors(*leading: int, n: int = 60) -> list[Tensor]:
    return [torch.randn(*leading, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_inside_torch_compile(layout: str) -> None:
    attend = cd.compile(LONGNET, ranks=4, layout=layout)
    inputs = leaves(*tensors(2))
    eager = attend(*inputs)
    compiled = torch.compile(lambda *x: attend(*x), fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(compiled, eager)
    eager_grads = torch.autograd.grad(eager.sum(), inputs)
    assert_close(torch.autograd.grad(compiled.sum(), inputs), eager_grads)


def test_transforms_of_torch_func() -> None:
    attend, single, many = cd.compile(LONGNET, ranks=3), cd.compile(LONGNET), tensors(3, 2)
    assert_close(torch.func.vmap(attend)(*many), torch.func.vmap(single)(*many))
    entry = [x[0] for x in many]

    def gradients(function: Attend) -> Any:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return function(q, k, v).square().sum()

        return torch.func.grad(loss, (0, 1, 2))(*entry)

    assert_close(gradients(attend), gradients(single))


def test_two_runs_give_the_same_bits() -> None:
    case = by_name("longnet causal")
    inputs, attend = case.inputs(129, torch.float32), ring(case, 129, 4, "zigzag")
    first, second = run(attend, inputs), run(attend, inputs)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
    for grad, grad_again in zip(first.grads, second.grads, strict=True):
        assert torch.equal(grad, grad_again)
    assert torch.equal(first.frozen[0], first.out)


def test_a_copy_computes_the_same() -> None:
    attend = cd.compile(LONGNET, ranks=4, layout="zigzag")
    q, k, v = tensors(1)
    copy = pickle.loads(pickle.dumps(attend))
    code = f"compile({LONGNET!r}, Ring(4, layout='zigzag', transport=simulated))"
    assert repr(copy) == repr(attend) == code
    assert torch.equal(copy(q, k, v), attend(q, k, v))


def test_nothing_leaks_backwards_in_any_layout() -> None:
    q, k, v = tensors(1, n=61)
    for layout in ("contiguous", "zigzag", "striped", "residue"):
        attend = cd.compile(LONGNET, ranks=4, layout=layout)
        before = attend(q, k, v)
        changed = [torch.cat([x[:, :, :40], -x[:, :, 40:] + 1], dim=2) for x in (q, k, v)]
        assert torch.equal(attend(*changed)[:, :, :40], before[:, :, :40])


# Plans, and their execution


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "residue"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_ledger_equals_the_plan(ranks: int, layout: str) -> None:
    attend = cd.compile(LONGNET, ranks=ranks, layout=layout)
    inputs = leaves(*tensors(2))
    plan, out = attend.plan(*inputs), attend(*inputs)
    for _ in range(2):  # first of the forward, then of a backward, which receives as much
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
    positions = torch.cat([plan.positions(rank) for rank in range(ranks)])
    assert sorted(positions.tolist()) == list(range(n))


def test_positions_along_a_curve() -> None:
    plan = cd.plan(masks.neighborhood((8, 8), 2), (1, 1, 64, 8), ranks=4, layout="hilbert")
    # Each rank has one quarter of the grid of 8 x 8.
    quarters = []
    for rank in range(4):
        rows, columns = plan.positions(rank) // 8, plan.positions(rank) % 8
        (quarter,) = set(zip((rows // 4).tolist(), (columns // 4).tolist(), strict=True))
        quarters.append(quarter)
    assert sorted(quarters) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_plan_weighs_layouts_and_gives_its_reason() -> None:
    plan = planned()
    record = json.loads(json.dumps(plan.to_json()))
    assert (record["ranks"], record["kv_heads"]) == (4, 2)
    assert record["layout"] == plan.schedule.layout.name
    assert [row["layout"] for row in record["layouts"] if row["chosen"]] == [record["layout"]]
    names = [row["layout"] for row in record["layouts"]]
    assert names == ["contiguous", "zigzag", "striped", "residue 3"]
    text = plan.explain()
    assert str(plan) == text
    assert f"chosen    {record['layout']}: the slowest rank, bound by what it " in text
    assert "over 4 ranks" in text
    assert "as asked" in planned("zigzag").explain()


def test_the_layout_follows_the_mask() -> None:
    """Contiguous for windows, which have few messages; even work for causal masks."""
    shape, window = (1, 8, 65536, 64), masks.causal() & masks.window(1024)
    assert cd.plan(window, shape, ranks=8).schedule.layout.name == "contiguous"
    assert cd.plan(masks.causal(), shape, ranks=8).schedule.layout.name in ("zigzag", "striped")
