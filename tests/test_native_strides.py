"""Native kernels: strides of inputs, gradients and merged results."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.native import (
    FLOATS,
    Problem,
    assert_near,
    assert_same_bits,
    by_token,
    keep,
    normal,
    ops,
    ragged,
    reference_results,
    work_of,
)
from tests.support.turns import in_turn

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


def far_apart(x: Tensor) -> Tensor:
    """Rows a power of two apart, which share few cache sets."""
    wide = x.new_full((*x.shape[:3], 512), math.nan)
    wide[..., : x.shape[3]] = x
    return wide[..., : x.shape[3]]


def every_second(x: Tensor) -> Tensor:
    """The last dimension is not contiguous."""
    wide = x.new_full((*x.shape, 2), math.nan)
    wide[..., 0] = x
    return wide[..., 0]


def columns_first(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def at_odd_places(x: Tensor) -> Tensor:
    """Rows at addresses that are multiples of an element's size only."""
    flat = x.new_full((x.numel() + 13,), math.nan)
    flat[13:] = x.reshape(-1)
    return flat[13:].view(x.shape)


def with_gaps(x: Tensor) -> Tensor:
    """A part of a larger tensor along every dimension."""
    larger = x.new_full([size + 3 for size in x.shape], math.nan)
    larger[1:-2, 2:-1, 1:-2, 3:] = x
    return larger[1:-2, 2:-1, 1:-2, 3:]


LAYOUTS = (by_token, far_apart, every_second, columns_first, at_odd_places, with_gaps)
SIZES_AND_DTYPES = [(*widths, dtype) for widths in ((16, 5), (32, 32)) for dtype in FLOATS]
EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": lambda x: x[:1].expand(x.shape),
    "heads": lambda x: x[:, :1].expand(x.shape),
    "tokens": lambda x: x[:, :, :1].expand(x.shape),
    "all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize(
    ("layout", "head_dim", "value_dim", "dtype"),
    in_turn(LAYOUTS, SIZES_AND_DTYPES, count=3),
)
def test_strides(
    layout: Callable[[Tensor], Tensor], head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    """Results have the bits of contiguous tensors' results.

    Those are near the reference.
    """
    mask = masks.window(60, dilation=3)
    if value_dim < 16:
        mask = masks.window(33, 7) | masks.sinks(2)
    _, plain = ragged(dtype, head_dim, value_dim, 90, 130, 17, mask)
    expected = plain.results()
    assert_near(expected, reference_results(mask, plain))
    names = ("q", "k", "v", "grad_out")
    for changed_names in (names, ("k",), ("q", "v")):
        views: dict[str, Any] = {name: layout(getattr(plain, name)) for name in changed_names}
        changed = replace(plain, **views)
        assert torch.equal(changed.k, plain.k)
        assert_same_bits(changed.results(), expected, f"{mask!r}")
        assert_same_bits(list(changed.forward(by_token=True)), expected, f"{mask!r} by token")


@pytest.mark.parametrize(
    ("name", "dtype"), in_turn(list(EXPANDED), (torch.float64, torch.float32, torch.bfloat16))
)
def test_expanded_tensors(name: str, dtype: torch.dtype) -> None:
    expand = EXPANDED[name]
    mask, plain = ragged(dtype, 16, 16, 90, 130)
    expanded: dict[str, Any] = {}
    contiguous: dict[str, Any] = {}
    for name in ("q", "k", "v", "grad_out"):
        expanded[name] = expand(getattr(plain, name))
        contiguous[name] = expanded[name].contiguous()
    views, copies = replace(plain, **expanded), replace(plain, **contiguous)
    assert_same_bits(views.results(), copies.results())
    assert_near(copies.results(), reference_results(mask, copies))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_expanded_or_none(dtype: torch.dtype) -> None:
    mask, plain = ragged(dtype, 16, 16, 90, 130)
    assert plain.grad_lse is not None
    grad_out = plain.grad_out[:1, :1, :1, :1].expand(plain.grad_out.shape)
    expanded = plain.grad_lse[:1, :1, :1].expand(plain.grad_lse.shape)
    for grad_lse in (None, expanded, plain.grad_lse.mT.contiguous().mT):
        problem = replace(plain, grad_out=grad_out, grad_lse=grad_lse)
        assert_near(problem.results(), reference_results(mask, problem))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "layout",
    [keep, by_token, far_apart, at_odd_places, with_gaps],
    ids=lambda layout: layout.__name__,
)
def test_merge_continues_from_any_layout(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Keys come in three parts.

    Queries are counted from the first key of a part, also before it.
    """
    _, plain = ragged(dtype, 16, 12, 100, 200)
    lse_dtype = torch.promote_types(dtype, torch.float32)
    out = layout(plain.v.new_zeros(2, 4, 100, 12))
    lse = torch.full((2, 4, 100), -math.inf, dtype=lse_dtype)
    program = masks.window(33, 7)
    work = work_of(program, 4)
    for start, stop in ((0, 70), (70, 71), (71, 200)):
        keys, values = plain.k[:, :, start:stop], plain.v[:, :, start:stop]
        ops.native_merge(
            out, lse, plain.q, keys, values, None, None, work.code, plain.scale, -start
        )
    problem = Problem(work, plain.q, plain.k, plain.v, plain.grad_out, None, scale=plain.scale)
    assert_near([out, lse], reference_results(program, problem)[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("apart", [16, 40, 64, 2048])
def test_rows_at_any_memory_alignment(apart: int, dtype: torch.dtype) -> None:
    """Copies of rows, cached by address, are never used for other rows.

    Keys and values at several addresses and distances of rows.
    """
    n, width = 331, 16
    q, grad_out = (normal(1, 5, n, width, dtype=dtype, seed=seed) for seed in (1, 2))
    k, v = (normal(1, 5, n, width, dtype=dtype, seed=seed) for seed in (3, 4))
    memory = torch.full((2, 5 * n * apart + 4096), math.nan, dtype=dtype)
    longnet = cd.longnet((32, 64, 128), (2, 3, 4), heads="split", causal=True)
    for mask in (longnet, masks.congruent(5, 1), masks.window(200, dilation=7)):
        work = work_of(mask, 5)
        expected = reference_results(mask, Problem(work, q, k, v, grad_out, None))
        for start in (0, 1024 + 8):
            views = []
            for buffer, x in zip(memory, (k, v), strict=True):
                offset, strides = buffer.storage_offset() + start, (0, n * apart, apart, 1)
                views.append(buffer.as_strided(x.shape, strides, offset).copy_(x))
            results = Problem(work, q, views[0], views[1], grad_out, None).results()
            assert_near(results, expected, f"{mask!r} from {start}")
