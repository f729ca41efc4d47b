"""Plans: auto's choices, counts, printing, and lowerings of one program."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks
from compiled_dilated.masks import Mask, disjoint
from compiled_dilated.native import build
from compiled_dilated.programs import as_program
from compiled_dilated.reference import multiplicity
from tests import caches, strategies
from tests.cases import CASES, Case
from tests.support.attention import same, same_gradients, tensors


@given(mask=strategies.expressions(strategies.line_masks(40)))
def test_disjoint_parts_are_the_mask(mask: Mask) -> None:
    parts = disjoint(mask)
    total = np.zeros((40, 40), dtype=int)
    for part in parts:
        total += strategies.dense(part, 40, 40)
    assert (total == strategies.dense(mask, 40, 40)).all()


def test_auto_mixes_lowerings_between_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One branch goes by slices, the other by gathered tiles.

    The native kernel is switched off.
    """
    monkeypatch.setenv("COMPILED_DILATED_NATIVE", "off")
    caches.forget()
    program = Program((Branch(masks.segments(128) & masks.causal()), Branch(masks.window(64))))
    q, k, v = tensors(1, 1, 4096, 4, 4, batch=1)
    attend = cd.compile(program)
    assert attend.plan(q, k, v).lowering == "strided+tiled"
    tiled = cd.compile(program, lowering="tiled")
    grad_out = torch.randn(1, 1, 4096, 4, dtype=torch.float64)
    grad_lse = torch.randn(1, 1, 4096, dtype=torch.float64)
    mixed, expected = attend(q, k, v, return_lse=True), tiled(q, k, v, return_lse=True)
    same(mixed, expected)
    same_gradients(mixed, expected, (q, k, v), (grad_out, grad_lse))
    caches.forget()


def test_auto_is_native_on_a_cpu() -> None:
    if build.available() is not None:
        pytest.skip(f"no native kernel here: {build.available()}")
    for mask in (masks.full(), masks.window(60) & masks.causal(), masks.window(6) | masks.sinks(2)):
        plan = cd.plan(mask, (1, 2, 64, 16))
        assert plan.lowering == "native"
        assert "whatever the mask and the length" in plan.explain()


def test_a_plan_lists_its_candidates() -> None:
    plan = cd.plan(
        cd.longnet((64, 128), (1, 2)),
        (1, 4, 512, 16),
        kv_heads=2,
        dtype=torch.bfloat16,
        training=True,
        device="cuda",
    )
    values = plan.to_json()
    assert values["program"] == repr(plan.problem.program)
    assert {row["lowering"] for row in values["candidates"]} >= {"dense", "strided", "flex"}
    assert any(row["chosen"] for row in values["candidates"])
    for word in ("segments(64)", "chosen", plan.lowering, "refused because", "MiB"):
        assert word in plan.explain()


@pytest.mark.parametrize("case", [case for case in CASES if 129 in case.lengths], ids=str)
def test_a_plan_counts_its_pairs(case: Case) -> None:
    inputs, program = case.inputs(129, torch.float32), case.program(129)
    counts = multiplicity(as_program(program), inputs.q, inputs.k, data=inputs.data)
    for lowering in ("dense", "tiled", "auto", *(() if case.refused else ("strided",))):
        plan = cd.plan(
            program,
            inputs.q.shape,
            case.kv_heads,
            value_dim=case.value_dim,
            lowering=lowering,
            training=True,
        )
        assert plan.cost.pairs >= int((counts > 0).sum())
        # Pairs that two branches link count twice; masks that read data cannot be counted.
        branches = plan.problem.program.branches
        reads_data = any(branch.mask.per_call for branch in branches)
        assert plan.useful_pairs == (None if reads_data else int(counts.sum()))


LONG = 2**31 + 1


@pytest.mark.parametrize(
    "program",
    [
        masks.full(),
        masks.causal(),
        masks.segments(4096),
        masks.congruent(4, 1),
        cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True),
    ],
    ids=str,
)
def test_a_plan_of_two_billion_tokens_is_small(program: cd.Program | Mask) -> None:
    """No part of the plan has an entry per row of tiles.

    There are 2**24 rows, and the counts have no such entries either.
    """
    tracemalloc.start()
    plan = cd.plan(program, (1, 4, LONG, 16))
    text, values = plan.explain(), plan.to_json()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 8 * 2**20
    assert sum(len(proposal.work) for proposal in plan.chosen) <= 100
    assert json.loads(json.dumps(values)) == values
    assert plan.useful_pairs == plan.cost.pairs
    assert f"{plan.useful_pairs:,} allowed" in text
    assert values["useful_pairs"] == plan.useful_pairs


def test_a_plan_says_what_it_does_not_count() -> None:
    plan = cd.plan(masks.causal() & masks.padding(), (1, 1, 512, 16))
    assert "how many are allowed depends on data" in plan.explain()
    assert "at most" in plan.explain()
    plan = cd.plan(cd.hilbert_window((2**12, 2**12), 3), (1, 1, 2**24, 16))
    assert "too many different ones to count" in plan.explain()
    assert plan.to_json()["tiles"] == [
        {"branch": 0, "heads": [0], "tile": 128, "full": None, "partial": None, "bytes": None}
    ]


def test_block_masks_of_a_long_sequence_are_counted_without_a_list() -> None:
    tracemalloc.start()
    plan = cd.plan(masks.window(255) & masks.causal(), (1, 1, 2**26 + 1, 16), device="cuda")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 8 * 2**20
    assert "flex" in [row["lowering"] for row in plan.to_json()["candidates"]]


def test_plans_of_very_many_heads_take_linear_time() -> None:
    """As of swapped axes: 200,000 heads took minutes when each head copied the list of the rest."""
    plan = cd.plan(masks.causal(), (1, 200_000, 16, 4), lowering="tiled")
    assert plan.lowering == "tiled"
