"""Every lowering against the reference, over the table of cases.

Forward, lse and gradients are compared.

In float64 they agree to 1e-10 of the largest entry. In lower precision the error against the
reference of the same rounded inputs is compared with the error of torch's dense attention over the
same pairs in the same precision: no tolerance is tuned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import autograd, masks, orders
from compiled_dilated.lowerings import dense, tiled
from compiled_dilated.lowerings.tiling import costs
from compiled_dilated.masks import Mask
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
from tests.support.turns import in_turn, one_in


def lowerings_of(case: Case, lowerings: tuple[str, ...] = LOWERINGS) -> tuple[str, ...]:
    """The lowerings that compute the case; strided refuses some."""
    if case.refused:
        return tuple(lowering for lowering in lowerings if lowering != "strided")
    return lowerings


# Lengths at a tile's edge, of which each case has some.
EDGES = (2, 127, 128, 129)


def default_lengths(number: int, case: Case, lowering: str) -> set[int]:
    """The lengths that the default suite runs for a case, by its number in the table.

    The longest by auto and by a lowering of tiles, the shortest by auto, and those at a tile's edge
    in turn: each length is run by each lowering, and each case at most of the lengths. The dense
    lowering is the same at every length.
    """
    if len(case.lengths) == 1:
        return {*case.lengths}
    place = LOWERINGS.index(lowering)
    edge = EDGES[(number + place) % len(EDGES)]
    if lowering == "auto":
        return {case.lengths[0], edge, case.lengths[-1]}
    if lowering == "dense":
        return {edge}
    # Strided and tiled in turn; where strided refuses the case, always tiled.
    if case.refused or (number + place) % 2 == 0:
        return {case.lengths[-1]}
    return {edge}


def all_cases() -> list[Any]:
    """(case, length, lowering); those beyond `default_lengths` are slow."""
    parameters = []
    for number, case in enumerate(CASES):
        for n, lowering in itertools.product(case.lengths, lowerings_of(case)):
            marks = () if n in default_lengths(number, case, lowering) else (pytest.mark.slow,)
            name = f"{case}-{n}-{lowering}"
            parameters.append(pytest.param(case, n, lowering, id=name, marks=marks))
    return parameters


@pytest.mark.parametrize(("case", "n", "lowering"), all_cases())
def test_every_lowering_is_the_reference_in_float64(case: Case, n: int, lowering: str) -> None:
    inputs, expected = truth(case, n, torch.float64)
    assert_same(run(cd.compile(case.program(n), lowering=lowering), inputs), expected)


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


# Cross attention and offsets

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


@pytest.mark.parametrize(("name", "q_len", "kv_len", "q_offset"), in_turn(CROSSED, SHAPES, count=3))
def test_cross_attention_and_offsets(name: str, q_len: int, kv_len: int, q_offset: int) -> None:
    case = by_name(name)
    assert case.crossed
    n = max(q_offset + q_len, kv_len)
    inputs, expected = truth(case, n, torch.float64, shape=(q_len, kv_len, q_offset))
    for lowering in lowerings_of(case):
        attend = cd.compile(case.program(n), lowering=lowering)
        assert_same(run(attend, inputs, q_offset=q_offset), expected)


# Every mask in every order

MASKS = [
    case
    for case in CASES
    if case.crossed and 129 in case.lengths and isinstance(case.program(129), masks.Mask)
]


MASK_ORDERS = (orders.residue(5), orders.residue(4, period=30), orders.hilbert(3, 43))


@pytest.mark.parametrize(("case", "order"), in_turn(MASKS, MASK_ORDERS))
def test_an_order_changes_nothing(case: Case, order: orders.Order) -> None:
    inputs, expected = truth(case, 129, torch.float64)
    mask = case.program(129)
    assert isinstance(mask, Mask)
    attend = cd.compile(in_order(mask, order), lowering="tiled")
    assert_same(run(attend, inputs), expected)


@pytest.mark.parametrize(
    "order", [orders.hilbert(8, 48), orders.hilbert(4, 8, 12), orders.residue(6)], ids=repr
)
@pytest.mark.parametrize("lowering", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_causal_mask_does_not_leak_in_any_order(
    order: orders.Order, lowering: str, dtype: torch.dtype
) -> None:
    """Results are the same to the last bit.

    Later tokens do not enter the sums of a row, in any order.
    """
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


LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Three at a time have three lengths and three dtypes.
LENGTHS_AND_DTYPES = [
    (n, LOW_DTYPES[(place + shift) % 3])
    for shift in range(3)
    for place, n in enumerate((1, 127, 300))
]


@pytest.mark.parametrize(("name", "n", "dtype"), in_turn(LOW, LENGTHS_AND_DTYPES, count=3))
def test_lower_precision_is_near_dense_attention(name: str, n: int, dtype: torch.dtype) -> None:
    compare_with_dense(by_name(name), n, dtype, LOWERINGS)


def compare_with_dense(case: Case, n: int, dtype: torch.dtype, lowerings: tuple[str, ...]) -> None:
    """Compare the errors of lowerings with those of dense attention."""
    inputs, expected = truth(case, n, dtype, with_lse=False)
    program = as_program(case.program(n))
    dense_result = dense_attention(program, inputs, expected)
    for lowering in lowerings_of(case, lowerings):
        result = run(cd.compile(program, lowering=lowering), inputs, with_lse=False)
        assert result.out.dtype == dtype
        assert result.lse.dtype == torch.float32
        dead_rows_are_zero(result, expected)
        results = zip(result.named(), dense_result.named(), expected.named(), strict=True)
        for (name, actual), (_, dense_tensor), (_, exact) in results:
            # The gradient of a softmax over one key is 0: its entries are cancellation.
            if n > 1 or name not in ("grad_q", "grad_k"):
                no_worse_than_dense(f"{name} of {lowering}", actual, dense_tensor, exact)


# Short sequences of many tiles

# auto is the native kernel, or one of them.
OF_TILES = ("strided", "tiled")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of a few tokens, one at a time.

    Short sequences are computed as long ones.
    """
    for module, name, value in (
        (tiled, "_Q_TILE", 32),
        (tiled, "_KV_TILE", 8),
        (tiled, "_MOST_GATHERED", 3),
        (dense, "_MOST_MASKED_PAIRS", 1),
        (costs, "_LEAST_BYTES", 1),
        (costs, "_SHARE", 0.0),
    ):
        monkeypatch.setattr(module, name, value)
    caches.forget()
    yield
    caches.forget()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("case", one_in(3, [case for case in CASES if 129 in case.lengths]))
def test_many_tiles(case: Case) -> None:
    inputs, expected = truth(case, 129, torch.float64)
    for lowering in lowerings_of(case, OF_TILES):
        assert_same(run(cd.compile(case.program(129), lowering=lowering), inputs), expected)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "dtype"), in_turn(LOW, (torch.bfloat16, torch.float16)))
def test_many_tiles_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    compare_with_dense(by_name(name), 127, dtype, OF_TILES)


# The caches of the process may be emptied at any moment


@pytest.fixture
def emptied_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every cache is emptied before each forward and each backward."""
    calls = 0

    def emptying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            caches.forget()
            return function(*arguments)

        return wrapper

    for name in ("run", "run_backward"):
        monkeypatch.setattr(autograd, name, emptying(getattr(autograd, name)))
    yield
    # Two attentions, each with a forward, a backward and a forward without gradients.
    assert calls == 6


@pytest.mark.usefixtures("emptied_caches")
@pytest.mark.parametrize("case", one_in(10, CASES))
def test_emptied_caches_change_nothing(case: Case) -> None:
    n = case.lengths[len(case.lengths) // 2]
    inputs, expected = truth(case, n, torch.float64)
    assert_same(run(cd.compile(case.program(n)), inputs), expected)
    assert_same(run(cd.compile(case.program(n), ranks=2), inputs), expected)


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
        attend = cd.compile(case.program(n), lowering=lowering)
        first, second = run(attend, inputs), run(attend, inputs)
        for (_, x), (_, y) in zip(first.named(), second.named(), strict=True):
            assert torch.equal(x, y)
        assert torch.equal(first.frozen[0], first.out)


# FlexAttention: on a CPU forward only, without an lse


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("rows dead in one branch", marks=pytest.mark.slow),
        "documents by ids in hilbert order",
    ],
)
def test_flex_forward(name: str) -> None:
    """Multiplicities, rows without keys, an order, grouped heads, data: few cases, compiled."""
    case, n = by_name(name), 300
    inputs, expected = truth(case, n, torch.float32, with_lse=False)
    program = as_program(case.program(n))
    dense_result = dense_attention(program, inputs, expected)
    with torch.no_grad():
        out = cd.compile(program, lowering="flex")(inputs.q, inputs.k, inputs.v, data=inputs.data)
    assert (out[expected.lse == -math.inf] == 0).all()
    no_worse_than_dense("out of flex", out, dense_result.out, expected.out)
