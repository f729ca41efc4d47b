"""Loads: bytes, work and memory of one rank, computed from its schedule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..plans import Cost, Problem
from . import blocks
from .layouts import Layout
from .schedules import Schedule
from .steps import Block, Step

# Dense flops in the time of one byte on the wire.
FLOPS_PER_BYTE = 20.0


@dataclass(frozen=True)
class Load:
    """Bytes received, work and peak memory of one rank.

    pairs: query-key pairs computed.
    dense_flops: flops of dense attention that take the same time.
    """

    rank: int
    steps: int
    messages: int
    received_bytes: int
    pairs: int
    dense_flops: float
    peak_bytes: int

    @property
    def time(self) -> float:
        """Time in dense flops; messages arrive while the step before is computed."""
        return max(self.dense_flops, self.received_bytes * FLOPS_PER_BYTE)

    @property
    def bound(self) -> str:
        """The part that determines the time, in words."""
        if self.received_bytes * FLOPS_PER_BYTE > self.dense_flops:
            return "what it receives"
        return "what it computes"


def load_of(schedule: Schedule, problem: Problem, rank: int) -> Load:
    """Forward load of one rank; exact, except for the predicted peak."""
    steps = list(schedule.steps(rank))
    # Work: all blocks, and the largest memory of one.
    pairs, flops, working = 0, 0.0, 0
    for step in steps:
        for block in step.blocks:
            cost = _cost(block, problem)
            pairs += cost.pairs
            flops += cost.dense_flops
            working = max(working, cost.peak_bytes)
    # Memory: the rank's shards, and two steps' messages: one is computed while the next arrives.
    received = [_received_bytes(step, problem) for step in steps]
    in_flight = max((a + b for a, b in itertools.pairwise([*received, 0])), default=0)
    width = problem.head_dim + problem.value_dim
    rows = schedule.layout.count(rank) * (problem.heads + problem.kv_heads)
    shards = problem.batch * rows * width * problem.itemsize
    return Load(
        rank=rank,
        steps=len(steps),
        messages=sum(len(step.messages) for step in steps),
        received_bytes=sum(received),
        pairs=pairs,
        dense_flops=flops,
        peak_bytes=shards + in_flight + working,
    )


def _cost(block: Block, problem: Problem) -> Cost:
    """The cost of a block, by its plan."""
    plan = blocks.plan_of(
        block, problem.batch, problem.head_dim, problem.value_dim, problem.dtype, problem.device,
        problem.scores,
    )  # fmt: skip
    return plan.cost


def _received_bytes(step: Step, problem: Problem) -> int:
    """Bytes of the messages of a step."""
    rows = sum(message.kv_heads.count * len(message.rows) for message in step.messages)
    return problem.batch * rows * (problem.head_dim + problem.value_dim) * problem.itemsize


def summary(layout: Layout, loads: Sequence[Load]) -> dict[str, Any]:
    """Means and maxima over the loads of a layout, as plain values."""
    steps = [load.steps for load in loads]
    received = [load.received_bytes for load in loads]
    flops = [load.dense_flops for load in loads]
    mean_flops = sum(flops) / len(loads)
    # Ranks without any work are even.
    imbalance = 1.0
    if mean_flops:
        imbalance = max(flops) / mean_flops
    return {
        "layout": layout.name,
        "steps_mean": sum(steps) / len(loads),
        "steps_max": max(steps),
        "received_mib_mean": sum(received) / len(loads) / 2**20,
        "received_mib_max": max(received) / 2**20,
        "dense_gflop_max": max(flops) / 1e9,
        "work_max_over_mean": imbalance,
        "peak_mib": max(load.peak_bytes for load in loads) / 2**20,
    }
