"""Tensors that score_mods and mask_mods capture are freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.planner import PLANS
from tests.caches import forget, lru_caches
from tests.support.mods import in_one_graph, same, tensors

pytestmark = pytest.mark.usefixtures("fresh")


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def stepped(step: Callable[[int], weakref.ref[Tensor]], count: int, warm: int = 20) -> None:
    """Call `step` often; check its tensors, memory and caches.

    Tensors are freed, memory and caches are bounded.

    step: one call by number; returns a reference to the tensor that it captures.
    warm: calls before memory is measured.
    """
    forget()
    references = [step(number) for number in range(warm)]
    before = resident_bytes()
    references += [step(number) for number in range(warm, count)]
    grown = resident_bytes() - before
    assert sum(reference() is not None for reference in references) == 0
    assert grown < 20 * 2**20
    assert len(PLANS) <= PLANS.most
    for cache in lru_caches():
        assert (bound := cache.cache_parameters()["maxsize"]) is not None, cache
        assert cache.cache_info().currsize <= bound


@pytest.mark.parametrize("calls", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_tensors_of_score_mods_are_freed(calls: int) -> None:
    """Every call has a new closure over a new tensor.

    Every fiftieth is trained.
    """
    n = 16
    inputs, attend = [x[:1] for x in tensors(n, torch.float32)], cd.compile(masks.causal())

    def step(number: int) -> weakref.ref[Tensor]:
        table = torch.full((64, n, n), float(number), requires_grad=number % 50 == 0)
        with torch.set_grad_enabled(number % 50 == 0):
            out = attend(*inputs, score_mod=lambda s, b, h, i, j: s + table[0, i, j])
        if number % 50 == 0:
            out.sum().backward()
        return weakref.ref(table)

    stepped(step, calls)


def test_tensors_of_mask_mods_are_freed() -> None:
    """300 calls with a new mask over a new tensor each."""
    n = 64
    inputs = [x[:1].detach() for x in tensors(n, torch.float32)]

    def step(number: int) -> weakref.ref[Tensor]:
        table = (torch.arange(64 * n).view(64, n) * (number + 1) % 7) < 5
        cd.compile(
            masks.from_mod(lambda b, h, i, j: table[0, j] & (i >= j), within=masks.causal())
        )(*inputs)
        return weakref.ref(table)

    stepped(step, 300)


def test_tensors_of_compiled_functions_are_freed() -> None:
    inputs = [x[:1].detach() for x in tensors(16, torch.float32)]
    attend = cd.compile(masks.causal())
    compiled = in_one_graph(
        lambda q, k, v, table: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + table[0, i, j])
    )

    def step(number: int) -> weakref.ref[Tensor]:
        table = torch.full((64, 16, 16), float(number))
        compiled(*inputs, table)
        return weakref.ref(table)

    stepped(step, 60)


def test_equal_rings_leave_nothing_in_tables() -> None:
    inputs = [x.detach() for x in tensors()]
    same(cd.compile(masks.causal(), ranks=2)(*inputs), cd.reference(masks.causal(), *inputs))

    def ring_of_a_call() -> weakref.ref[Any]:
        attend = cd.compile(masks.causal(), ranks=2)
        attend(*inputs)
        return weakref.ref(attend.ring)

    plans = len(PLANS)
    rings = [ring_of_a_call() for _ in range(20)]
    gc.collect()
    assert len(PLANS) == plans
    assert all(ring() is None for ring in rings)
