"""Every lowering against the reference: forward, lse and gradients, over the one table of cases.

In float64 they agree to 1e-10 of the largest entry. In lower precision, where rounding decides, the error against the reference of the
same (rounded) inputs is at most twice that of torch's dense attention over the same pairs in the same precision, plus one rounding of
the result: nothing here is a number that was turned until the tests passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import compiled_dilated as cd
from compiled_dilated import masks, orders
from compiled_dilated.oracle import multiplicity
from compiled_dilated.programs import as_program
from tests.cases import CASES, LOWERINGS, Case, Inputs, by_name, in_order

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Result:
    """What attention gives, and what its gradients are: of q, k and v. `frozen`: (out, lse) where nothing is to be trained."""

    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]
    frozen: tuple[Tensor, Tensor]


def run(attention: Any, inputs: Inputs, with_lse: bool = True, **options: Any) -> Result:
    """Forward and backward; with_lse: a gradient comes in through the lse too."""
    out, lse = attention(inputs.q, inputs.k, inputs.v, data=inputs.data, return_lse=True, **options)
    results, into = ((out, lse), (inputs.grad_out, inputs.grad_lse)) if with_lse else ((out,), (inputs.grad_out,))
    into = tuple(each.to(result.dtype) for each, result in zip(into, results, strict=True))
    grads = torch.autograd.grad(results, (inputs.q, inputs.k, inputs.v), into)
    with torch.no_grad():
        frozen = attention(inputs.q, inputs.k, inputs.v, data=inputs.data, return_lse=True, **options)
    return Result(out.detach(), lse.detach(), grads, frozen)


def compiled(program: Any, lowering: str) -> Any:
    return cd.compile(program, lowering=lowering)


@lru_cache(maxsize=8)
def truth(
    case: Case, n: int, dtype: torch.dtype, with_lse: bool = True, shape: tuple[int, int, int] | None = None
) -> tuple[Inputs, Result]:
    """The inputs and what the reference makes of them; shape: (q_len, kv_len, q_offset)."""
    q_len, kv_len, q_offset = (n, n, 0) if shape is None else shape
    inputs = case.inputs(n, dtype, q_len, kv_len)
    program = case.program(n)

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return cd.reference(program, q, k, v, q_offset=q_offset, **options)

    return inputs, run(attention, inputs, with_lse)


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal where either is infinite, else within `tolerance` of the largest finite entry."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: other entries are infinite or NaN"
    assert torch.equal(got[~finite].double(), want[~finite].double()), name
    if finite.any():
        error, largest = (got[finite] - want[finite]).abs().max().item(), want[finite].abs().max().item()
        assert error <= tolerance * largest, f"{name}: off by {error:.2e}, largest entry {largest:.2e}"


def assert_same(got: Result, want: Result, tolerance: float = TOLERANCE) -> None:
    assert_close("out", got.out, want.out, tolerance)
    assert_close("lse", got.lse, want.lse, tolerance)
    assert_close("out without grad", got.frozen[0], want.out, tolerance)
    assert_close("lse without grad", got.frozen[1], want.lse, tolerance)
    for name, mine, theirs in zip(("grad_q", "grad_k", "grad_v"), got.grads, want.grads, strict=True):
        assert_close(name, mine, theirs, tolerance)


def dead_rows_are_zero(got: Result, want: Result) -> None:
    dead = want.lse == -math.inf
    assert (got.lse[dead] == -math.inf).all()
    assert (got.out[dead] == 0).all()
    assert (got.grads[0][dead] == 0).all()
    assert all(x.isfinite().all() for x in (got.out, *got.grads))


def everywhere() -> list[Any]:
    """(case, length, lowering). What strided refuses has a test of its own; dense and auto do not change with every length."""
    seldom = {"dense": (1, 129), "auto": (2, 331)}
    return [
        pytest.param(case, n, lowering, id=f"{case}-{n}-{lowering}")
        for case in CASES
        for n in case.lengths
        for lowering in LOWERINGS
        if not (lowering == "strided" and case.refused) and (n > 331 or n in seldom.get(lowering, case.lengths))
    ]


@pytest.mark.parametrize(("case", "n", "lowering"), everywhere())
def test_float64(case: Case, n: int, lowering: str) -> None:
    inputs, want = truth(case, n, torch.float64)
    got = run(compiled(case.program(n), lowering), inputs)
    assert_same(got, want)
    dead_rows_are_zero(got, want)


@pytest.mark.parametrize("case", [case for case in CASES if case.refused], ids=str)
def test_strided_refuses_with_a_reason(case: Case) -> None:
    for n in case.lengths:
        inputs = case.inputs(n, torch.float32)
        with pytest.raises(ValueError, match=r"lowering 'strided' refuses for branch \d") as error:
            compiled(case.program(n), "strided")(inputs.q, inputs.k, inputs.v, data=inputs.data)
        assert case.refused in str(error.value)
        assert "Use lowering='tiled' or 'auto'" in str(error.value)


# Queries and keys that are not the same tokens -----------------------------------------------------------------------------------

SHAPES = [(1, 300, 299), (1, 300, 0), (5, 300, 290), (300, 129, 0), (64, 331, 100), (130, 70, 70), (3, 1, 0)]
CROSSED = (
    "full", "causal", "window", "window asymmetric", "window dilated, reach no multiple", "window causal", "windows of two dilations",
    "segments", "segments window causal", "congruent causal", "congruent cyclic", "congruent window dilated", "congruent in segments",
    "documents by lengths", "documents by lengths, window", "documents by ids, causal", "padding causal", "sinks", "prefix", "global tokens",
    "dilated blocks", "tiles", "from_mod within", "from_mod per head", "neighborhood of a part of its grid", "neighborhood shifted",
    "causal and window or sinks", "not segments, causal", "longnet causal", "longnet, rates that divide nothing", "longnet split",
    "rows dead in one branch", "masks of unlike lowerings", "values wider than keys",
)  # fmt: skip


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize(("q_len", "kv_len", "q_offset"), SHAPES)
def test_cross_attention_and_offsets(name: str, q_len: int, kv_len: int, q_offset: int) -> None:
    case = by_name(name)
    assert case.crossed
    n = max(q_offset + q_len, kv_len)
    inputs, want = truth(case, n, torch.float64, shape=(q_len, kv_len, q_offset))
    for lowering in LOWERINGS:
        attend = compiled(case.program(n), lowering)
        if lowering == "strided" and strided_refuses(case, n, inputs, q_offset):
            continue
        got = run(attend, inputs, q_offset=q_offset)
        assert_same(got, want)
        dead_rows_are_zero(got, want)


def strided_refuses(case: Case, n: int, inputs: Inputs, q_offset: int) -> bool:
    """Whether it says so; a grid seen in part is refused too."""
    try:
        compiled(case.program(n), "strided").plan(inputs.q, inputs.k, inputs.v, q_offset=q_offset)
    except ValueError as error:
        assert (case.refused or "a part of a grid is not made of regular boxes") in str(error)
        return True
    assert not case.refused
    return False


# Every mask in every order -------------------------------------------------------------------------------------------------------

MASKS = [case for case in CASES if case.crossed and 129 in case.lengths and isinstance(case.program(129), masks.Mask)]


@pytest.mark.parametrize("order", [orders.residue(5), orders.residue(4, period=30), orders.hilbert(3, 43)], ids=repr)
@pytest.mark.parametrize("case", MASKS, ids=str)
def test_an_order_changes_nothing(case: Case, order: orders.Order) -> None:
    inputs, want = truth(case, 129, torch.float64)
    program = in_order(case.program(129), order)
    for lowering in ("tiled", "auto"):
        assert_same(run(compiled(program, lowering), inputs), want)


@pytest.mark.parametrize("order", [orders.hilbert(8, 48), orders.hilbert(4, 8, 12), orders.residue(6)], ids=repr)
@pytest.mark.parametrize("lowering", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_mask_does_not_leak_in_any_order(order: orders.Order, lowering: str, dtype: torch.dtype) -> None:
    """To the last bit: what comes after a token takes no part in its sums, wherever the order puts it."""
    case = Case("causal", lambda n: masks.causal())
    attend = compiled(in_order(masks.causal() & masks.window(200), order), lowering)
    inputs = case.inputs(384, dtype)
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


# Lower precision -----------------------------------------------------------------------------------------------------------------

LOW = ("window causal", "congruent cyclic", "documents by ids", "padding of everything", "neighborhood dilated, shifted", "window or sinks",
       "causal", "longnet causal", "longnet, rates that divide nothing", "one mask three times", "rows dead in one branch",
       "rows dead in every branch", "masks of unlike lowerings", "hilbert window", "branches of different orders", "nothing",
       "one key head", "segments", "no sinks", "longnet with padding")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 127, 300])
@pytest.mark.parametrize("name", LOW)
def test_lower_precision(name: str, n: int, dtype: torch.dtype) -> None:
    case = by_name(name)
    inputs, want = truth(case, n, dtype, with_lse=False)
    program = as_program(case.program(n))
    theirs = dense(program, inputs, want)
    for lowering in LOWERINGS:
        if lowering == "strided" and case.refused:
            continue
        got = run(compiled(program, lowering), inputs, with_lse=False)
        assert got.out.dtype == dtype
        assert got.lse.dtype == torch.float32
        dead_rows_are_zero(got, want)
        pairs = {"out": (got.out, theirs.out, want.out), "lse": (got.lse, theirs.lse, want.lse)}
        pairs |= {f"grad {i}": each for i, each in enumerate(zip(got.grads, theirs.grads, want.grads, strict=True))}
        if n == 1:  # a softmax over one key has no gradient: what comes out is what cancellation leaves
            pairs = {what: pairs[what] for what in ("out", "lse", "grad 2")}
        for what, (mine, dense_one, exact) in pairs.items():
            no_worse_than_dense(f"{what} of {lowering}", mine, dense_one, exact)


def no_worse_than_dense(name: str, mine: Tensor, theirs: Tensor, exact: Tensor) -> None:
    alive = exact.isfinite()
    if not alive.any():
        return
    error = (mine.double() - exact)[alive].abs().max().item()
    allowed = (
        2 * (theirs.double() - exact)[alive].abs().max().item() + torch.finfo(mine.dtype).eps * exact[alive].abs().max().item()
    )
    assert error <= allowed, f"{name}: error {error:.2e}, twice that of dense attention and a rounding are {allowed:.2e}"


def dense(program: cd.Program, inputs: Inputs, want: Result) -> Result:
    """torch's own fused attention over the same pairs, log c as a bias; rows that see nothing see everything and send no gradient."""
    counts = multiplicity(program, inputs.q, inputs.k, data=inputs.data)
    dead = want.lse == -math.inf
    bias = torch.where(dead[..., None], 0.0, counts.float().log()).float()
    grad_out = inputs.grad_out.masked_fill(dead[..., None], 0.0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask=bias, enable_gqa=True)
    grads = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), grad_out)
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(inputs.q, inputs.k, inputs.v, attn_mask=bias)
    return Result(out.detach().masked_fill(dead[..., None], 0.0), lse.detach().masked_fill(dead, -math.inf), grads, (out, lse))


# The same schedule, the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["longnet causal", "window or sinks", "hilbert window", "padding and documents", "congruent grouped"]
)
def test_two_runs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    case, n = by_name(name), 331
    for lowering in LOWERINGS:
        if lowering == "strided" and case.refused:
            continue
        first, second = (run(compiled(case.program(n), lowering), case.inputs(n, dtype)) for _ in range(2))
        for one, other in zip((first.out, first.lse, *first.grads), (second.out, second.lse, *second.grads), strict=True):
            assert torch.equal(one, other)
        inputs = case.inputs(n, dtype)
        with torch.no_grad():
            assert torch.equal(compiled(case.program(n), lowering)(inputs.q, inputs.k, inputs.v, data=inputs.data), first.out)
