"""Every lowering against the reference: forward, lse and gradients, over the one table of cases.

In float64 they agree to 1e-10 of the largest entry. In lower precision, where rounding decides, the error against the reference
of the same (rounded) inputs is at most twice that of torch's dense attention over the same pairs in the same precision, plus one
rounding of the result: no number here was turned until the tests passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks, operators, orders
from compiled_dilated.lowerings import dense, tiled
from compiled_dilated.lowerings.tiling import costs
from compiled_dilated.programs import as_program
from tests import caches
from tests.cases import CASES, LOWERINGS, Case, by_name, in_order
from tests.support.results import (
    assert_same,
    dead_rows_are_zero,
    dense_attention,
    no_worse_than_dense,
    run,
    truth,
)


def lowerings_of(case: Case, lowerings: tuple[str, ...] = LOWERINGS) -> tuple[str, ...]:
    """Those that compute the case; what strided refuses has a test of its own."""
    return tuple(lowering for lowering in lowerings if lowering != "strided" or not case.refused)


def everywhere() -> list[Any]:
    """(case, length, lowering). Dense does not change with every length."""
    seldom = {"dense": (1, 129)}
    return [
        pytest.param(case, n, lowering, id=f"{case}-{n}-{lowering}")
        for case in CASES
        for n in case.lengths
        for lowering in lowerings_of(case)
        if n > 331 or n in seldom.get(lowering, case.lengths)
    ]


@pytest.mark.parametrize(("case", "n", "lowering"), everywhere())
def test_float64(case: Case, n: int, lowering: str) -> None:
    inputs, want = truth(case, n, torch.float64)
    assert_same(run(cd.compile(case.program(n), lowering=lowering), inputs), want)


@pytest.mark.parametrize("case", [case for case in CASES if case.refused], ids=str)
def test_strided_refuses_with_a_reason(case: Case) -> None:
    for n in case.lengths:
        inputs = case.inputs(n, torch.float32)
        with pytest.raises(ValueError, match=r"lowering 'strided' refuses for branch \d") as error:
            cd.compile(case.program(n), lowering="strided")(
                inputs.q, inputs.k, inputs.v, data=inputs.data
            )
        assert case.refused is not None
        assert case.refused in str(error.value)
        assert "Use lowering='tiled' or 'auto'" in str(error.value)


# Queries and keys that are not the same tokens

SHAPES = [
    (1, 300, 299),
    (1, 300, 0),
    (5, 300, 290),
    (300, 129, 0),
    (64, 331, 100),
    (130, 70, 70),
    (3, 1, 0),
]
CROSSED = (
    "full",
    "causal",
    "window",
    "window asymmetric",
    "window dilated, reach no multiple",
    "window causal",
    "windows of two dilations",
    "segments",
    "segments window causal",
    "congruent causal",
    "congruent cyclic",
    "congruent window dilated",
    "congruent in segments",
    "documents by lengths",
    "documents by lengths, window",
    "documents by ids, causal",
    "padding causal",
    "sinks",
    "prefix",
    "global tokens",
    "dilated blocks",
    "tiles",
    "from_mod within",
    "from_mod per head",
    "neighborhood shifted",
    "causal and window or sinks",
    "not segments, causal",
    "longnet causal",
    "longnet, rates that divide nothing",
    "longnet split",
    "rows dead in one branch",
    "masks of unlike lowerings",
    "values wider than keys",
)


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize(("q_len", "kv_len", "q_offset"), SHAPES)
def test_cross_attention_and_offsets(name: str, q_len: int, kv_len: int, q_offset: int) -> None:
    case = by_name(name)
    assert case.crossed
    n = max(q_offset + q_len, kv_len)
    inputs, want = truth(case, n, torch.float64, shape=(q_len, kv_len, q_offset))
    for lowering in lowerings_of(case):
        assert_same(
            run(cd.compile(case.program(n), lowering=lowering), inputs, q_offset=q_offset), want
        )


# Every mask in every order

MASKS = [
    case
    for case in CASES
    if case.crossed and 129 in case.lengths and isinstance(case.program(129), masks.Mask)
]


@pytest.mark.parametrize(
    "order", [orders.residue(5), orders.residue(4, period=30), orders.hilbert(3, 43)], ids=repr
)
@pytest.mark.parametrize("case", MASKS, ids=str)
def test_an_order_changes_nothing(case: Case, order: orders.Order) -> None:
    inputs, want = truth(case, 129, torch.float64)
    assert_same(run(cd.compile(in_order(case.program(129), order), lowering="tiled"), inputs), want)


@pytest.mark.parametrize(
    "order", [orders.hilbert(8, 48), orders.hilbert(4, 8, 12), orders.residue(6)], ids=repr
)
@pytest.mark.parametrize("lowering", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_causal_mask_does_not_leak_in_any_order(
    order: orders.Order, lowering: str, dtype: torch.dtype
) -> None:
    """To the last bit: what comes after a token takes no part in its sums, wherever the order puts it."""
    attend = cd.compile(in_order(masks.causal() & masks.window(200), order), lowering=lowering)
    inputs = by_name("causal").inputs(384, dtype)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    before, lse_before = attend(q, k, v, return_lse=True)
    for token in (1, 47, 200, 383):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, token:] = -2 * x[:, :, token:] + 1
        after, lse_after = attend(*changed, return_lse=True)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert torch.equal(lse_after[:, :, :token], lse_before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


# Lower precision

LOW = (
    "causal",
    "window causal",
    "segments",
    "congruent cyclic",
    "documents by ids",
    "padding of everything",
    "neighborhood dilated, shifted",
    "window or sinks",
    "no sinks",
    "nothing",
    "longnet causal",
    "longnet, rates that divide nothing",
    "longnet with padding",
    "one mask three times",
    "one key head",
    "rows dead in one branch",
    "rows dead in every branch",
    "masks of unlike lowerings",
    "hilbert window",
    "branches of different orders",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 127, 300])
@pytest.mark.parametrize("name", LOW)
def test_lower_precision(name: str, n: int, dtype: torch.dtype) -> None:
    compare_with_dense(by_name(name), n, dtype, LOWERINGS)


def compare_with_dense(case: Case, n: int, dtype: torch.dtype, lowerings: tuple[str, ...]) -> None:
    inputs, want = truth(case, n, dtype, with_lse=False)
    program = as_program(case.program(n))
    theirs = dense_attention(program, inputs, want)
    for lowering in lowerings_of(case, lowerings):
        got = run(cd.compile(program, lowering=lowering), inputs, with_lse=False)
        assert got.out.dtype == dtype
        assert got.lse.dtype == torch.float32
        dead_rows_are_zero(got, want)
        results = {"out": (got.out, theirs.out, want.out), "lse": (got.lse, theirs.lse, want.lse)}
        results |= {
            f"grad {i}": each
            for i, each in enumerate(zip(got.grads, theirs.grads, want.grads, strict=True))
        }
        for name, (mine, dense_one, exact) in results.items():
            # A softmax over one key has no gradient: what comes out is what cancellation leaves.
            if n > 1 or name not in ("grad 0", "grad 1"):
                no_worse_than_dense(f"{name} of {lowering}", mine, dense_one, exact)


# Short sequences of many tiles


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of a few tokens, and no memory to hold two at once: a short sequence takes the ways of a long one."""
    for room, name, value in (
        (tiled, "_Q_TILE", 32),
        (tiled, "_KV_TILE", 8),
        (tiled, "_MOST_GATHERED", 3),
        (dense, "_MOST_MASKED_PAIRS", 1),
        (costs, "_LEAST_BYTES", 1),
        (costs, "_SHARE", 0.0),
    ):
        monkeypatch.setattr(room, name, value)
    caches.forget()
    yield
    caches.forget()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("case", [case for case in CASES if 129 in case.lengths], ids=str)
def test_many_tiles(case: Case) -> None:
    inputs, want = truth(case, 129, torch.float64)
    for lowering in lowerings_of(case, ("strided", "tiled", "auto")):
        assert_same(run(cd.compile(case.program(129), lowering=lowering), inputs), want)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW)
def test_many_tiles_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    compare_with_dense(by_name(name), 127, dtype, ("strided", "tiled", "auto"))


# Tables of the process are caches: lost at any moment, and nothing changes


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is emptied before each forward and each backward."""
    for name in ("run", "run_backward"):
        run_it = getattr(operators, name)

        def forgetting(*arguments: Any, run_it: Any = run_it) -> Any:
            caches.forget()
            return run_it(*arguments)

        monkeypatch.setattr(operators, name, forgetting)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_with_tables_emptied_between_calls(case: Case) -> None:
    n = case.lengths[len(case.lengths) // 2]
    inputs, want = truth(case, n, torch.float64)
    assert_same(run(cd.compile(case.program(n)), inputs), want)
    assert_same(run(cd.compile(case.program(n), ranks=2), inputs), want)


# The same schedule, the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "longnet causal",
        "window or sinks",
        "hilbert window",
        "padding and documents",
        "congruent grouped",
    ],
)
def test_two_runs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    case, n = by_name(name), 331
    inputs = case.inputs(n, dtype)
    for lowering in lowerings_of(case):
        first, second = (
            run(cd.compile(case.program(n), lowering=lowering), inputs) for _ in range(2)
        )
        for one, other in zip(
            (first.out, first.lse, *first.grads),
            (second.out, second.lse, *second.grads),
            strict=True,
        ):
            assert torch.equal(one, other)
        assert torch.equal(first.frozen[0], first.out)


# FlexAttention: forward alone on a CPU, without an lse


@pytest.mark.parametrize("name", ["rows dead in one branch", "documents by ids in hilbert order"])
def test_flex_forward(name: str) -> None:
    """Compiled, as it always is, so few: multiplicities and dead rows; an order, grouped heads and data."""
    case, n = by_name(name), 300
    inputs, want = truth(case, n, torch.float32, with_lse=False)
    program = as_program(case.program(n))
    theirs = dense_attention(program, inputs, want)
    with torch.no_grad():
        out = cd.compile(program, lowering="flex")(inputs.q, inputs.k, inputs.v, data=inputs.data)
    assert (out[want.lse == -math.inf] == 0).all()
    no_worse_than_dense("out of flex", out, theirs.out, want.out)
