"""Native kernels: strides of inputs, gradients and merged results."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable

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
    expected,
    keep,
    normal,
    ops,
    ragged,
    work_of,
)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


def far_apart(x: Tensor) -> Tensor:
    """Rows a power of two apart: in the cache they fall into few sets."""
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
    """Aligned to nothing but the numbers themselves."""
    flat = x.new_full((x.numel() + 13,), math.nan)
    flat[13:] = x.reshape(-1)
    return flat[13:].view(x.shape)


def with_gaps(x: Tensor) -> Tensor:
    """Of every dimension a part of a larger tensor."""
    larger = x.new_full([size + 3 for size in x.shape], math.nan)
    larger[1:-2, 2:-1, 1:-2, 3:] = x
    return larger[1:-2, 2:-1, 1:-2, 3:]


LAYOUTS = (by_token, far_apart, every_second, columns_first, at_odd_places, with_gaps)
EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": lambda x: x[:1].expand(x.shape),
    "heads": lambda x: x[:, :1].expand(x.shape),
    "tokens": lambda x: x[:, :, :1].expand(x.shape),
    "all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 5), (32, 32)])
def test_strides(
    layout: Callable[[Tensor], Tensor], head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    """The same bits as of contiguous tensors, and these are right."""
    for mask in (
        (masks.window(33, 7) | masks.sinks(2),)
        if value_dim < 16
        else (masks.window(60, dilation=3),)
    ):
        _, plain = ragged(dtype, head_dim, value_dim, 90, 130, 17, mask)
        want = plain.results()
        assert_near(want, expected(mask, plain))
        for change_q, change_k, change_v, change_grad in (
            (layout,) * 4,
            (keep, layout, keep, keep),
            (layout, keep, layout, keep),
        ):
            changed = Problem(
                plain.work, change_q(plain.q), change_k(plain.k), change_v(plain.v), change_grad(plain.grad_out), plain.grad_lse,
                scale=plain.scale, q_offset=plain.q_offset,
            )  # fmt: skip
            assert torch.equal(changed.k, plain.k)
            assert_same_bits(changed.results(), want, f"{mask!r}")
            assert_same_bits(list(changed.forward(by_token=True)), want, f"{mask!r} by token")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_tensors(name: str, dtype: torch.dtype) -> None:
    expand = EXPANDED[name]
    mask, plain = ragged(dtype, 16, 16, 90, 130)
    views = Problem(
        plain.work,
        expand(plain.q),
        expand(plain.k),
        expand(plain.v),
        expand(plain.grad_out),
        plain.grad_lse,
        scale=plain.scale,
    )
    whole = Problem(
        plain.work, views.q.contiguous(), views.k.contiguous(), views.v.contiguous(), views.grad_out.contiguous(),
        plain.grad_lse, scale=plain.scale,
    )  # fmt: skip
    assert_same_bits(views.results(), whole.results())
    assert_near(whole.results(), expected(mask, whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_expanded_or_none(dtype: torch.dtype) -> None:
    mask, plain = ragged(dtype, 16, 16, 90, 130)
    assert plain.grad_lse is not None
    one, lse_one = (
        plain.grad_out[:1, :1, :1, :1].expand(plain.grad_out.shape),
        plain.grad_lse[:1, :1, :1].expand(plain.grad_lse.shape),
    )
    for grad_lse in (None, lse_one, plain.grad_lse.mT.contiguous().mT):
        problem = Problem(plain.work, plain.q, plain.k, plain.v, one, grad_lse, scale=plain.scale)
        assert_near(problem.results(), expected(mask, problem))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "layout",
    [keep, by_token, far_apart, at_odd_places, with_gaps],
    ids=lambda layout: layout.__name__,
)
def test_merge_goes_on_from_any_layout(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Keys in three parts, each block's queries counted from its first key; so parts may begin after the queries."""
    _, plain = ragged(dtype, 16, 12, 100, 200)
    out, lse = (
        layout(plain.v.new_zeros(2, 4, 100, 12)),
        torch.full((2, 4, 100), -math.inf, dtype=torch.promote_types(dtype, torch.float32)),
    )
    program = masks.window(33, 7)
    work = work_of(program, 4)
    for start, stop in ((0, 70), (70, 71), (71, 200)):
        ops.native_merge(
            out,
            lse,
            plain.q,
            plain.k[:, :, start:stop],
            plain.v[:, :, start:stop],
            None,
            None,
            work.code,
            plain.scale,
            -start,
        )
    whole = Problem(work, plain.q, plain.k, plain.v, plain.grad_out, None, scale=plain.scale)
    assert_near([out, lse], expected(program, whole)[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("apart", [16, 40, 64, 2048])
def test_rows_at_any_memory_alignment(apart: int, dtype: torch.dtype) -> None:
    """What a kernel keeps of rows by where they lie is never taken for that of others: at many addresses, steps and lengths."""
    n, width = 331, 16
    q, grad_out = (normal(1, 5, n, width, dtype=dtype, seed=seed) for seed in (1, 2))
    k, v = (normal(1, 5, n, width, dtype=dtype, seed=seed) for seed in (3, 4))
    memory = torch.full((2, 5 * n * apart + 4096), math.nan, dtype=dtype)
    for mask in (
        cd.longnet((32, 64, 128), (2, 3, 4), heads="split", causal=True),
        masks.congruent(5, 1),
        masks.window(200, dilation=7),
    ):
        work = work_of(mask, 5)
        want = expected(mask, Problem(work, q, k, v, grad_out, None))
        for start in (0, 1024 + 8):
            k_there, v_there = (
                room.as_strided(
                    (1, 5, n, width), (0, n * apart, apart, 1), room.storage_offset() + start
                ).copy_(x)
                for room, x in zip(memory, (k, v), strict=True)
            )
            assert_near(
                Problem(work, q, k_there, v_there, grad_out, None).results(),
                want,
                f"{mask!r} from {start}",
            )
