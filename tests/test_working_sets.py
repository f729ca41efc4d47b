"""Bytes that a kernel call of tiles may take.

A CPU's caches or a GPU's memory limit them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated.lowerings.tiling import costs
from compiled_dilated.plans import Plan

LONGNET = cd.longnet((2048, 4096, 8192), (1, 2, 4))
GIB = 2**30


def plan_on(device: str) -> Plan:
    """A plan of LongNet over 128K tokens in bfloat16."""
    shape = (1, 8, 2**17, 64)
    plan = cd.plan(LONGNET, shape, dtype=torch.bfloat16, device=device, lowering="strided")
    assert isinstance(plan, Plan)
    return plan


def pieces_of(plan: Plan) -> int:
    """Kernel calls of a forward."""
    calls = 0
    for proposal in plan.chosen:
        for batch in proposal.work:
            calls += len(list(costs.pieces(batch, plan.problem, backward=False)))
    return calls


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets free bytes of GPU and allocator."""

    def set_free(free: int, unused: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: unused)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)

    return set_free


def test_a_gpu_computes_each_batch_in_one_call(memory: Any) -> None:
    memory(70 * GIB)
    plan = plan_on("cuda")
    batches = sum(len(proposal.work) for proposal in plan.chosen)
    assert plan.cost.calls == pieces_of(plan) == batches
    assert plan_on("cpu").cost.calls > batches


def test_little_free_memory_divides_the_work(memory: Any) -> None:
    memory(70 * GIB)
    plan = plan_on("cuda")
    undivided = pieces_of(plan)
    memory(GIB // 4)
    divided = pieces_of(plan)
    assert divided > undivided
    memory(GIB // 4, unused=70 * GIB)
    assert pieces_of(plan) == undivided


def test_small_work_asks_the_driver_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: pytest.fail("asked"))
    shape = (1, 2, 4096, 64)
    plan = cd.plan(LONGNET, shape, dtype=torch.bfloat16, device="cuda", lowering="strided")
    assert pieces_of(plan) >= 1
