"""Plans with pairs, tiles and work counted for data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import checks, counting, text
from ..heads import head_groups
from ..lowerings import native
from ..masks import Mask
from ..masks.binding import with_data
from ..masks.traced import traced_parts
from ..plans import Plan, Problem
from ..programs import Branch, Program, check_data, query_names_of


def counted_with_data(program: Program, plan: Plan, data: Mapping[str, Tensor]) -> Plan:
    """The plan with pairs, tiles and work of a call with data.

    program: as the plan was made for.
    data: tensors (batch or 1, tokens) by name.

    Raises TypeError or ValueError for data that a call would refuse.
    """
    problem = plan.problem
    q_end = problem.q_offset + problem.q_len
    shape = checks.Shape(problem.batch, q_end, problem.kv_len, torch.device("cpu"))
    checks.data(program.names, query_names_of(program), data, shape)
    check_data(program, data)
    # The tensors that the program's functions capture: alive until their pairs are counted.
    operands: list[Tensor] = []
    _, traced = text.traced(program, operands)
    # Entries of a batch are counted one by one only where they may differ.
    entries = 1
    if _differs_by_batch(traced, data):
        entries = problem.batch
    pairs: int | None = 0
    tiles = []
    for row in plan.tiles:
        branch = traced.branches[row["branch"]]
        groups = head_groups(branch, problem.heads, problem.kv_heads)
        for group, (mask, heads, _) in enumerate(groups):
            bound = [with_data(mask, data, entry) for entry in range(entries)]
            # Tiles are listed for the first group of heads, as in a plan without data.
            if group == 0:
                tiles.append(row | _tiles(bound, branch, row["tile"], problem))
            per_head = _pairs(bound, problem)
            repeats = heads.count * (problem.batch // entries)
            if pairs is None or per_head is None:
                pairs = None
            else:
                pairs += per_head * repeats
    return _with_computed_pairs(replace(plan, useful_pairs=pairs, tiles=tuple(tiles)), data)


def _differs_by_batch(program: Program, data: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a batch may allow different pairs."""
    if any(x.shape[0] > 1 for x in data.values()):
        return True
    for branch in program.branches:
        if any(function.graph.reads("b") for function in traced_parts(branch.mask)):
            return True
    return False


def _pairs(masks: Sequence[Mask], problem: Problem) -> int | None:
    """Allowed pairs of all masks; None if too many differ."""
    total = 0
    for mask in masks:
        pairs = counting.pairs(mask, problem.q_len, problem.kv_len, problem.q_offset)
        if pairs is None:
            return None
        total += pairs
    return total


def _tiles(masks: Sequence[Mask], branch: Branch, tile: int, problem: Problem) -> dict[str, Any]:
    """Tiles of all masks, and bytes of their lists.

    All are None if too many tiles differ.
    """
    full = partial = nbytes = 0
    for mask in masks:
        counts = counting.tiles(
            mask, problem.q_len, problem.kv_len, tile, branch.order, problem.q_offset
        )
        if counts is None:
            return {"full": None, "partial": None, "bytes": None}
        full += counts.full
        partial += counts.partial
        nbytes += counts.nbytes
    return {"full": full, "partial": partial, "bytes": nbytes}


def _with_computed_pairs(plan: Plan, data: Mapping[str, Tensor]) -> Plan:
    """The plan with the computed pairs of the native kernel.

    Plans of other lowerings do not depend on the data.
    """
    if plan.lowering != "native":
        return plan
    (proposal,) = plan.chosen
    work, cost = proposal.work[0], proposal.cost
    if work.slots or not cost.pairs:  # tensors that functions capture are not passed here
        return plan
    pairs = native.counts(work, plan.problem, [data[name] for name in work.names])[0]
    flops = cost.kernel_flops * pairs // cost.pairs
    cost_of_data = replace(cost, pairs=pairs, kernel_flops=flops, dense_flops=float(flops))
    chosen = replace(proposal, counting=cost_of_data)
    # The proposal is among the weighed answers, too.
    weighed = []
    for answer in plan.weighed:
        if answer is proposal:
            answer = chosen
        weighed.append(answer)
    return replace(plan, chosen=(chosen,), weighed=tuple(weighed))
