"""Plans: what auto chooses, what a plan counts and tells, how a branch is cut for two lowerings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from compiled_dilated.planner import disjoint
from compiled_dilated.programs import as_program
from compiled_dilated.reference import multiplicity
from tests import strategies
from tests.cases import CASES, Case
from tests.test_attend import same, tensors


@given(mask=strategies.expressions(strategies.line_masks(40)))
def test_disjoint_parts_are_the_mask(mask: Mask) -> None:
    parts = disjoint(mask)
    total = sum(strategies.dense(part, 40, 40).astype(int) for part in parts)
    assert (total == strategies.dense(mask, 40, 40)).all()


def test_auto_mixes_lowerings_within_a_branch() -> None:
    """A window by slices, its sinks by gathered tiles: the same numbers as tiles alone."""
    mask = masks.causal() & (masks.window(64) | masks.sinks(4))
    q, k, v = tensors(1, 1, 4096, 4, 4, batch=1)
    attend = cd.compile(mask)
    assert {"strided", "tiled"} <= set(attend.plan(q, k, v).lowering.split("+"))
    tiled = cd.compile(mask, lowering="tiled")
    back = torch.randn(1, 1, 4096, 4, dtype=torch.float64), torch.randn(1, 1, 4096, dtype=torch.float64)
    for mine, theirs in zip(
        *(torch.autograd.grad(each(q, k, v, return_lse=True), (q, k, v), back) for each in (attend, tiled)), strict=True
    ):
        same(mine, theirs)


def test_auto_is_dense_where_everything_is_seen() -> None:
    q, k, v = tensors(2, 2, 64, dtype=torch.float32)
    assert cd.compile(masks.full()).plan(q, k, v).lowering == "dense"
    assert cd.compile(masks.window(60) & masks.causal()).plan(q, k, v).lowering == "dense"


def test_a_plan_tells_what_it_weighed() -> None:
    plan = cd.plan(cd.longnet((64, 128), (1, 2)), (1, 4, 512, 16), kv_heads=2, dtype=torch.bfloat16, training=True)
    told = plan.to_json()
    assert told["program"] == repr(plan.problem.program)
    assert {row["lowering"] for row in told["candidates"]} >= {"dense", "strided", "flex"}
    assert any(row["chosen"] for row in told["candidates"])
    for word in ("segments(64)", "chosen", plan.lowering, "refused because", "MiB"):
        assert word in plan.explain()


@pytest.mark.parametrize("case", [case for case in CASES if 129 in case.lengths], ids=str)
def test_a_plan_counts_its_pairs(case: Case) -> None:
    inputs, program = case.inputs(129, torch.float32), case.program(129)
    counts = multiplicity(as_program(program), inputs.q, inputs.k, data=inputs.data)
    for lowering in ("dense", "tiled", "auto", *(() if case.refused else ("strided",))):
        plan = cd.plan(program, inputs.q.shape, case.kv_heads, value_dim=case.value_dim, lowering=lowering, training=True)
        assert plan.cost.pairs >= int((counts > 0).sum())
        # Pairs that two branches link are two; masks that read data cannot be counted.
        assert plan.useful_pairs == (
            None if any(branch.mask.per_call for branch in plan.problem.program.branches) else int(counts.sum())
        )
