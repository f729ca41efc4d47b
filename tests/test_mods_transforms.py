"""score_mods and mask_mods under torch.func, checkpoints, autocast and global modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from tests import functions
from tests.caches import forget
from tests.comparing import exact_results
from tests.functions import Parameters
from tests.support.mods import (
    HEADS,
    N,
    attend_in,
    gradients,
    in_one_graph,
    same,
    same_as_reference,
    tensors,
)
from tests.support.turns import in_turn

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
def test_functions_under_autocast(way: str) -> None:
    """Autocast casts q, k and v only.

    Captured tensors and the lse stay float32.
    """
    inputs = [(x.detach() * 20).requires_grad_() for x in tensors(dtype=torch.float32)]
    table = torch.randn(N, N, requires_grad=True)
    mod, attend = (lambda s, b, h, i, j: s + table[i, j]), attend_in(way, masks.causal())

    def grads(out: Tensor, lse: Tensor) -> Any:
        return torch.autograd.grad(out.float().sum() + lse.sum(), (*inputs, table))

    expected = attend(*(x.bfloat16() for x in inputs), score_mod=mod, return_lse=True)
    expected_grads = grads(*expected)
    for run in (attend, in_one_graph(attend)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = run(*inputs, score_mod=mod, return_lse=True)
        assert results[0].dtype == torch.bfloat16
        assert results[1].dtype == torch.float32
        same(results, expected, 0)
        same(grads(*results), expected_grads, 1e-6)
        # The backward under autocast too.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = run(*inputs, score_mod=mod, return_lse=True)
            same(grads(*results), expected_grads, 1e-6)


@pytest.mark.parametrize("way", ["dense", "strided", "tiled", "auto", "ring"])
def test_rows_that_see_nothing_pass_no_gradient_of_their_lse(way: str) -> None:
    """Their lse is -inf, and its gradient may be NaN.

    A sine gives such a gradient, and a merge of two such rows.
    """
    mask, inputs = masks.congruent(2, 1), tensors()
    attend = attend_in(way, mask)
    lse = attend(*inputs, return_lse=True)[1]
    expected_lse = cd.reference(mask, *inputs, return_lse=True)[1]
    grads = torch.autograd.grad(lse.sin().sum(), inputs[:2])
    same(grads, torch.autograd.grad(expected_lse.sin().sum(), inputs[:2]))


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
def test_func_grad_and_vjp_of_captured_tensors(way: str) -> None:
    inputs, table = [x.detach() for x in tensors()], torch.randn(N, N, dtype=torch.float64)
    attend = attend_in(way, masks.causal())

    def loss(attention: Any, table: Tensor, q: Tensor) -> Tensor:
        out: Tensor = attention(q, *inputs[1:], score_mod=lambda s, b, h, i, j: s + table[i, j])
        return out.square().sum()

    def reference(*x: Tensor, **options: Any) -> Any:
        return cd.reference(masks.causal(), *x, **options)

    expected = torch.func.grad(lambda *x: loss(reference, *x), argnums=(0, 1))(table, inputs[0])
    same(torch.func.grad(lambda *x: loss(attend, *x), argnums=(0, 1))(table, inputs[0]), expected)
    # torch annotates the three results of has_aux=True too.
    value, pull = torch.func.vjp(lambda *x: loss(attend, *x), table, inputs[0])[:2]
    same(value, loss(reference, table, inputs[0]))
    same(pull(torch.ones_like(value)), expected)


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
def test_vmap_over_captured_tensors(way: str) -> None:
    """One table per entry, and its gradient."""
    inputs, table = [x.detach() for x in tensors()], torch.randn(3, N, N, dtype=torch.float64)
    attend = attend_in(way, masks.causal())

    def added(table: Tensor) -> Callable[..., Any]:
        return lambda s, b, h, i, j: s + table[i, j]

    def attention(table: Tensor) -> Any:
        return attend(*inputs, score_mod=added(table))

    def reference(table: Tensor) -> Any:
        return cd.reference(masks.causal(), *inputs, score_mod=added(table))

    same(torch.vmap(attention)(table), torch.stack([reference(x) for x in table]))
    grads = torch.vmap(torch.func.grad(lambda x: attention(x).square().sum()))(table)
    gradient = torch.func.grad(lambda x: reference(x).square().sum())
    same(grads, torch.stack([gradient(x) for x in table]))


def test_vmap_over_tensors_of_mask_mods() -> None:
    inputs, allowed = [x.detach() for x in tensors()], torch.rand(3, N, N) > 0.3

    def attention(allowed: Tensor) -> Any:
        return cd.compile(masks.from_mod(lambda b, h, i, j: allowed[i, j]))(*inputs)

    same(torch.vmap(attention)(allowed), torch.stack([attention(x) for x in allowed]))


def test_func_grad_of_tensors_of_a_mask_mod() -> None:
    """A mask_mod that reads a tensor of the transform.

    It passes no gradient.
    """
    inputs = [x.detach() for x in tensors()]

    def loss(attention: Any, row: Tensor, q: Tensor) -> Any:
        mask = masks.from_mod(lambda b, h, i, j: (row[j] > 0) | (i == j))
        return (attention(mask)(q, *inputs[1:]) * row[None, None, :, None]).sum()

    def reference(mask: Mask) -> Any:
        return lambda *x: cd.reference(mask, *x)

    row = torch.randn(N, dtype=torch.float64)
    out, expected = (
        torch.func.grad(loss, argnums=(1, 2))(attention, row, inputs[0])
        for attention in (cd.compile, reference)
    )
    same(out, expected)


def test_vmap_over_inputs_beside_a_captured_tensor_that_learns() -> None:
    inputs = [torch.stack([x.detach(), -x.detach()]) for x in tensors()]
    rows = torch.randn(N, 3, dtype=torch.float64).requires_grad_()
    mod, attend = (lambda s, b, h, i, j: s + (rows[i] * rows[j]).sum()), cd.compile(masks.causal())
    out = torch.vmap(lambda *x: attend(*x, score_mod=mod))(*inputs)
    entries = []
    for q, k, v in zip(*inputs, strict=True):
        entries += exact_results(masks.causal(), q, k, v, score_mod=mod)
    expected = torch.stack(entries)
    same(out, expected)
    expected_grad = torch.autograd.grad(expected.sin().sum(), rows)
    same(torch.autograd.grad(out.sin().sum(), rows), expected_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_with_closures(reentrant: bool) -> None:
    inputs, table = tensors(), torch.randn(N, N, dtype=torch.float64, requires_grad=True)
    attend = cd.compile(masks.causal())

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Any:
        return attend(q, k, v, score_mod=lambda s, b, h, i, j: s + table[i, j])

    leaves = (*inputs, table)
    out = torch.utils.checkpoint.checkpoint(attention, *leaves, use_reentrant=reentrant)
    out.sin().sum().backward()
    expected = torch.autograd.grad(attention(*leaves).sin().sum(), leaves)
    same([x.grad for x in leaves], list(expected))


def test_second_derivatives_of_captured_tensors_are_refused() -> None:
    inputs, table = tensors(), torch.randn(N, N, dtype=torch.float64, requires_grad=True)
    out = cd.compile(masks.causal())(*inputs, score_mod=lambda s, b, h, i, j: s + table[i, j])
    (grad,) = torch.autograd.grad(out.square().sum(), table, create_graph=True)
    message = r"not twice differentiable here.*Use compiled_dilated.reference"
    with pytest.raises(NotImplementedError, match=message):
        grad.sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_after_inference_mode(compiled: bool) -> None:
    inputs, parameters = tensors(), Parameters.of(HEADS, N)
    mod = functions.score_mod(("table[i, j]", "soft cap"), parameters)
    mask = masks.from_mod(functions.mask_mod(("segments",), parameters))
    attend = cd.compile(mask)
    run = in_one_graph(attend) if compiled else attend
    forget()
    with torch.inference_mode():
        run(*inputs, score_mod=mod)

    def attention(*inputs: Tensor, **options: Any) -> Any:
        return run(*inputs, return_lse=True, **options)

    same_as_reference(attention, mask, inputs, parameters.leaves, score_mod=mod)


@torch.no_grad()
def captured_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.randn(N, N, dtype=torch.float64)


def test_a_table_created_in_inference_mode() -> None:
    inputs, table = tensors(), captured_in_inference_mode()
    mod = lambda s, b, h, i, j: s + table[i, j]  # noqa: E731
    attend = cd.compile(masks.from_mod(lambda b, h, i, j: table[i, j] < 1))
    with torch.inference_mode():
        out = attend(*inputs, score_mod=mod)
        plain = table.clone()
    detached = [x.detach() for x in inputs]
    same(out, attend(*detached, score_mod=lambda s, b, h, i, j: s + plain[i, j]))


class DefaultDtype:
    """torch.set_default_dtype(torch.float64) within a block."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


class Deterministic:
    """torch.use_deterministic_algorithms(True) within a block."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "default dtype": DefaultDtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": Deterministic,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


MODE_WAYS = ("dense", "tiled", "auto", "ring")


@pytest.mark.parametrize(
    ("mode", "way", "compiled"),
    [
        *in_turn(list(MODES), [(way, False) for way in MODE_WAYS], count=2),
        *in_turn(list(MODES), [(way, True) for way in MODE_WAYS]),
    ],
)
def test_modes_around_a_call_change_nothing(mode: str, way: str, compiled: bool) -> None:
    """Autocast does not cast inputs in float64.

    Functions read integers, constants and tables.
    """
    inputs, parameters = tensors(), Parameters.of(HEADS, N)
    mask = masks.from_mod(functions.mask_mod(("segments", "torch.stack and any"), parameters, "or"))
    attend, run = (attend_in(way, mask) for _ in range(2))
    if compiled:
        run = in_one_graph(run)
    bodies = ("alibi", "T5 buckets", "table[i, j]", "torch.stack and all", "soft cap")
    mod = functions.score_mod(bodies, parameters)
    leaves = (*inputs, *parameters.leaves)
    # 1. A mode around the forward, with plans of earlier calls and without.
    expected = attend(*inputs, score_mod=mod, return_lse=True)
    expected_gradients = gradients(expected, leaves)
    for empty in (False, True):
        if empty:
            forget()
        with MODES[mode]():
            results = run(*inputs, score_mod=mod, return_lse=True)
        same(results, expected)
        same(gradients(results, leaves), expected_gradients)
    # 2. A mode around the backward; torch refuses a change of determinism in compiled code.
    if compiled and mode == "deterministic":
        return

    def grads(out: Tensor, lse: Tensor) -> list[Tensor | None]:
        cotangents = (out.detach(), lse.detach())
        return list(torch.autograd.grad((out, lse), leaves, cotangents, allow_unused=True))

    results = run(*inputs, score_mod=mod, return_lse=True)
    with MODES[mode]():
        got_gradients = grads(*results)
    same(got_gradients, grads(*attend(*inputs, score_mod=mod, return_lse=True)))
