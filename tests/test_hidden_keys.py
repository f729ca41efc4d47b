"""Hidden keys and values affect no result and no gradient.

They are NaN, infinities and unwritten memory.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import decoding, masks
from compiled_dilated.programs import Program
from tests.comparing import assert_close, exact_results, leaves, normal, results_and_gradients
from tests.strategies import programs
from tests.support.attention import STRIDED, WAYS, way_name

BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("queries", [8, 1])
@pytest.mark.parametrize("lowering", ["dense", "strided", "tiled", "auto"])
def test_prefill_of_a_cache_that_is_not_written(lowering: str, queries: int) -> None:
    q, k, v = normal((1, 2, queries, 16), (1, 2, 64, 16), (1, 2, 64, 16))
    k[:, :, 8:], v[:, :, 8:] = math.nan, math.inf
    out = cd.compile(masks.causal(), lowering=lowering)(q, k, v)
    assert_close([out], exact_results(masks.causal(), q, k[:, :, :8], v[:, :, :8]))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS, ids=way_name)
def test_queries_that_see_a_bad_key_and_no_others_are_nan(way: dict[str, Any], bad: float) -> None:
    q, k, v = normal((2, 4, 50, 8), (2, 2, 50, 8), (2, 2, 50, 8))
    k[:, 1, 20, 3] = bad
    program = masks.window(3, 0)
    out, lse = cd.compile(program, **way)(q, k, v, return_lse=True)
    assert_close([out, lse], exact_results(program, q, k, v, return_lse=True))
    expected = list(itertools.product((2, 3), range(20, 24)))
    assert [tuple(index) for index in lse[0].isnan().nonzero().tolist()] == expected


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS, ids=way_name)
def test_a_bad_value_makes_its_column_nan(way: dict[str, Any], bad: float) -> None:
    q, k, v = normal((2, 4, 50, 8), (2, 2, 50, 8), (2, 2, 50, 8))
    v[:, 0, 20, 3] = bad
    program = masks.window(3, 0)
    out, lse = cd.compile(program, **way)(q, k, v, return_lse=True)
    assert_close([out, lse], exact_results(program, q, k, v, return_lse=True))
    expected = list(itertools.product((0, 1), range(20, 24), (3,)))
    assert [tuple(index) for index in out[0].isnan().nonzero().tolist()] == expected
    assert lse.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("bad", ["query", "key"])
@pytest.mark.parametrize("way", WAYS, ids=way_name)
def test_a_query_whose_scores_are_all_nan_is_nan(
    way: dict[str, Any], bad: str, tokens: int
) -> None:
    """Not 0, as ATen's kernel returns for it; a query that sees no key stays 0."""
    q, k, v = normal((2, 4, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 8))
    (q if bad == "query" else k)[:, :, -1] = math.nan
    for program in (masks.window(0), masks.congruent(2, 0)):
        out, lse = cd.compile(program, **way)(q, k, v, return_lse=True)
        assert_close([out, lse], exact_results(program, q, k, v, return_lse=True))
        sees_itself = program == masks.window(0) or tokens % 2 == 1
        assert bool(out[:, :, -1].isnan().all()) == sees_itself
        assert bool(lse[:, :, -1].isnan().all()) == sees_itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_kernel", [True, False])
def test_one_query_whose_scores_are_all_nan_is_nan(
    has_kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first call, and in those that the decoder computes."""
    if not has_kernel:
        monkeypatch.setattr(decoding, "_by_kernel", lambda *arguments: None)
    q, k, v = (x.to(dtype) for x in normal((1, 4, 1, 8), (1, 2, 3000, 8), (1, 2, 3000, 8)))
    k[:, :, 2500] = math.nan
    attend = cd.compile(masks.window(0))
    for _ in range(2):
        assert attend(q, k, v, q_offset=2500).isnan().all()
        assert attend(q * math.nan, k, v, q_offset=7).isnan().all()
        assert attend(q, k, v, q_offset=7).isfinite().all()


def test_an_lse_with_sinks_is_nan_where_the_result_is() -> None:
    q, k, v = normal((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8))
    k[:, :, 3] = math.nan
    options: dict[str, Any] = {"sink_logits": torch.zeros(4).double(), "return_lse": True}
    out, lse = cd.compile(masks.window(2))(q, k, v, **options)
    assert_close([out, lse], exact_results(masks.window(2), q, k, v, **options))
    assert torch.equal(lse.isnan(), out.isnan().all(dim=-1))


@pytest.mark.parametrize("way", WAYS, ids=way_name)
def test_gradients_of_hidden_keys_do_not_depend_on_their_contents(way: dict[str, Any]) -> None:
    q, k, v = normal((1, 4, 48, 8), (1, 2, 48, 8), (1, 2, 48, 8))
    padding = torch.zeros(1, 48, dtype=torch.bool)
    padding[:, 30:] = True
    attend, data = cd.compile(masks.padding() & masks.window(9), **way), {"padding": padding}
    expected = results_and_gradients(attend, leaves(q, k, v), data=data)
    k[:, :, 33], v[:, :, 40] = math.nan, math.inf
    assert_close(results_and_gradients(attend, leaves(q, k, v), data=data), expected)


@pytest.mark.parametrize("way", WAYS, ids=way_name)
def test_gradients_are_nan_only_where_a_bad_key_is_seen(way: dict[str, Any]) -> None:
    """Gradients of window(3, 0) are NaN near the bad key.

    Rows 20 to 23 see key 20, and keys 17 to 23 together.
    """
    q, k, v = normal((1, 2, 48, 8), (1, 2, 48, 8), (1, 2, 48, 8))
    clean = leaves(q, k, v)
    k[:, :, 20] = math.nan
    spoiled = leaves(q, k, v)
    weights = torch.ones(1, 2, 48, 8, dtype=torch.float64)
    grads = torch.autograd.grad(cd.compile(masks.window(3, 0), **way)(*spoiled), spoiled, weights)
    weights[:, :, 20:24] = 0
    expected = torch.autograd.grad(cd.reference(masks.window(3, 0), *clean), clean, weights)
    rows = (range(20, 24), range(17, 24), range(17, 24))
    for grad, value, affected in zip(grads, expected, rows, strict=True):
        assert grad[:, :, list(affected)].isnan().all()
        unaffected = [row for row in range(48) if row not in affected]
        assert_close([grad[:, :, unaffected]], [value[:, :, unaffected]])


def test_a_learned_table_of_a_row_that_sees_a_bad_key_gets_nan() -> None:
    q, k, v = normal((1, 1, 12, 4), (1, 1, 12, 4), (1, 1, 12, 4))
    table = torch.zeros(12, 12, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(1, 12, dtype=torch.bool)
    padding[:, 5] = True

    def grad_of(mask: masks.Mask, **options: Any) -> Tensor:
        out = cd.compile(mask)(
            *leaves(q, k, v), score_mod=lambda s, b, h, i, j: s + table[i, j], **options
        )
        return torch.autograd.grad(out.sum(), table)[0]

    clean = grad_of(masks.causal() & masks.padding(), data={"padding": padding})
    k[:, :, 5] = math.nan
    assert_close([grad_of(masks.causal() & masks.padding(), data={"padding": padding})], [clean])
    assert grad_of(masks.causal()).isnan().any()


@settings(max_examples=30)
@given(
    drawn=programs(),
    seed=st.integers(0, 1000),
    bad=st.sampled_from(BAD),
    way=st.sampled_from((*WAYS[:4], STRIDED)),
)
def test_any_program_with_bad_numbers_anywhere(
    drawn: tuple[Program, int], seed: int, bad: float, way: dict[str, Any]
) -> None:
    program, n = drawn
    q, k, v = normal((2, 3, n, 3), (2, 1, n, 3), (2, 1, n, 2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for x in (k, v):
        x[torch.rand(x.shape, generator=generator) < 1 / n / 2] = bad
    try:
        results = cd.compile(program, **way)(q, k, v, return_lse=True)
    except ValueError as error:
        if "lowering 'strided' refuses" in str(error) or "bias over" in str(error):
            return
        raise
    assert_close(results, exact_results(program, q, k, v, return_lse=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in normal((1, 2, 300, 16), (1, 2, 300, 16), (1, 2, 300, 16)))
    k[:, :, 200:], v[:, :, 250:] = math.nan, math.inf
    out = cd.compile(masks.causal() & masks.window(40))(q, k, v)
    (expected,) = exact_results(masks.causal() & masks.window(40), q, k, v)
    assert torch.equal(out.isnan(), expected.isnan())
    limit = 1e-5 if dtype == torch.float32 else 0.02
    seen, right = out[:, :, :200].double(), expected[:, :, :200]
    torch.testing.assert_close(seen, right, rtol=limit, atol=limit)


def test_results_too_large_for_their_dtype_are_not_taken_for_bad_keys() -> None:
    """A gradient that overflows float16 is infinite, and the others are unchanged."""
    q, k, v = (x.half() * 10 for x in normal((1, 1, 20, 4), (1, 1, 20, 4), (1, 1, 20, 4)))
    inputs = leaves(q, k, v)
    out = cd.compile(masks.window(4))(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.full_like(out, 6e4))
    assert not any(grad.isnan().any() for grad in grads)
