"""Printed masks and plans.

Long lists as count and digest, estimated times, and untried lowerings.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks, rates, text
from compiled_dilated.lowerings import registry
from compiled_dilated.masks import Mask
from compiled_dilated.programs import as_program

LONG = {
    "tiles": masks.tiles([(i, (i * 7) % 50) for i in range(50)], 16),
    "tiles of more columns": masks.tiles([(i, (i * 7) % 50) for i in range(50)], 16, columns=60),
    "documents": masks.documents(lengths=tuple(range(1, 60))),
    "positions": masks.global_tokens(positions=range(0, 900, 9)),
    "and": masks.tiles([(i, i) for i in range(50)], 16) & masks.causal(),
    "or": masks.window(3) | masks.documents(lengths=(3,) * 50),
    "not": ~masks.documents(lengths=(3,) * 50),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_list_is_read_back_from_its_code_and_shown_by_its_count(name: str) -> None:
    mask = LONG[name]
    assert text.read_program(repr(mask)) == as_program(mask)
    assert len(str(mask)) < 110 < len(repr(mask))
    assert "digest" in str(mask)
    operands: list[torch.Tensor] = []
    assert text.read(text.write(as_program(mask), operands), operands) == as_program(mask)


@pytest.mark.parametrize(
    "mask",
    [masks.causal() & (masks.window(3) | ~masks.sinks(2)), masks.random_blocks(64, 3, 4096)],
    ids=str,
)
def test_short_masks_are_shown_as_their_code(mask: Mask) -> None:
    assert str(mask) == repr(mask)
    assert str(as_program(mask)) == repr(as_program(mask))


def test_a_digest_depends_on_the_numbers() -> None:
    first, second = (masks.documents(lengths=(*range(1, 60), last)) for last in (7, 8))
    assert str(first) != str(second)
    assert str(first) == str(masks.documents(lengths=(*range(1, 60), 7)))
    assert str(first).startswith("documents(lengths=<60 of 1,777 tokens, digest ")


def test_explanations_and_errors_list_no_long_numbers() -> None:
    mask = masks.tiles([(i, i) for i in range(3000)], 16)
    program = Program((Branch(mask & masks.causal()), Branch(masks.window(8), heads=(0, 1))))
    explained = cd.plan(program, (1, 2, 48_000, 16)).explain()
    assert "tiles(<3,000 tiles, digest" in explained
    assert max(map(len, explained.splitlines())) < 200
    for call in (
        lambda: cd.plan(program, (1, 2, 48_000, 16), lowering="strided"),
        lambda: bool(mask),
        lambda: Branch(program),  # type: ignore[arg-type]
        lambda: mask & program,
        lambda: Program((Branch(mask, heads=(0, 3)),)).branches[0].head_range(2),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert len(str(error.value)) < 600


def test_a_plan_as_json_keeps_the_code() -> None:
    plan = cd.plan(LONG["documents"], (1, 2, 512, 16))
    assert text.read_program(plan.to_json()["program"]) == plan.problem.program


# explain


def lines(plan: cd.Plan) -> dict[str, str]:
    """Lines of an explanation by their first word."""
    return {line.split(maxsplit=1)[0]: line for line in plan.explain().splitlines() if line.strip()}


def test_the_plan_of_an_explicit_lowering_lists_the_untried_ones() -> None:
    printed = lines(cd.plan(masks.window(60), (1, 2, 512, 16), lowering="tiled"))
    untried = "native, dense, strided, flex, lanes"
    assert printed["chosen"].endswith("tiled: as asked by lowering='tiled'")
    assert printed["not"] == f"not tried {untried} (lowering='native' would)"
    assert not printed["as"].endswith("the least sum is chosen")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_untried_lowerings_are_those_without_a_row(device: str) -> None:
    for program in (masks.window(60), cd.longnet((64, 128), (1, 2)), masks.causal()):
        plan = cd.plan(program, (1, 2, 4096, 16), device=device)
        values = plan.to_json()
        tried, untried = {row["lowering"] for row in values["candidates"]}, set(values["untried"])
        assert tried | untried == set(registry.NAMES)
        assert not tried & untried
        assert ("not tried" in plan.explain()) == bool(values["untried"])


def test_refused_and_untried_lowerings_are_listed_apart() -> None:
    explained = cd.plan(masks.window(60), (1, 2, 4096, 16), device="cuda").explain()
    assert "what else was tried is refused, see below" in explained
    assert "not tried native, tiled (lowering='native' would)" in explained


@pytest.mark.parametrize(
    ("training", "passes"), [(False, "ms forward,"), (True, "ms forward and backward,")]
)
@pytest.mark.parametrize("lowering", ["dense", "tiled"])
def test_times_are_estimates_by_named_rates(training: bool, passes: str, lowering: str) -> None:
    plan = cd.plan(masks.window(256), (1, 8, 2048, 64), training=training, lowering=lowering)
    seconds = plan.to_json()["estimated_seconds"]
    assert seconds == rates.seconds(lowering, "float32", "cpu", plan.cost.dense_flops, training)
    assert 0 < seconds < 10
    time_line = lines(plan)["time"]
    assert time_line.startswith("time      about ")
    assert passes in time_line
    assert "an estimate by rates of two cores" in time_line
    assert rates.FILES in plan.explain()
    assert "est. ms" in plan.explain()


def test_rates_are_those_of_the_files() -> None:
    """The medians of benchmarks/results, to 3 %."""
    measured: dict[tuple[str, int], list[float]] = {}
    for name in rates.FILES.replace("benchmarks/results/", "").split(", "):
        with open(f"benchmarks/results/{name}") as file:
            rows = json.load(file)["rows"]
        for row in rows:
            has_backward = int("backward" in row["pass"])
            flops = 4 * 64 * 8 * 4096**2 * (3.5 if has_backward else 1)
            is_source = row["dtype"] == "bfloat16" or "attention-cpu" in name
            if row["of"] == "dense 4096" and is_source:
                rate = flops / _median(row["baseline_seconds"])
                measured.setdefault((row["dtype"], has_backward), []).append(rate)
    for (dtype, has_backward), values in measured.items():
        assert rates._DENSE[dtype][has_backward] == pytest.approx(_median(values), rel=0.03)
    assert {dtype for dtype, _ in measured} == set(rates._DENSE)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "cuda")])
def test_without_a_rate_there_is_no_time(dtype: torch.dtype, device: str) -> None:
    plan = cd.plan(masks.window(60), (1, 2, 512, 16), dtype=dtype, device=device)
    assert plan.to_json()["estimated_seconds"] is None
    assert lines(plan)["time"].startswith("time      no estimate: no rate was measured for ")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (masks.documents(lengths=(1000,) * 1000) & masks.causal(), 1000 * 1000 * 1001 // 2),
        (masks.documents(lengths=(10,) * 100_000) & masks.causal(), 100_000 * 55),
        (masks.causal() & (masks.window(1000) | masks.sinks(4)), 1_004_495_490),
    ],
    ids=["documents", "small documents", "sinks"],
)
def test_pairs_of_a_million_tokens_are_counted(mask: Mask, expected: int) -> None:
    plan = cd.plan(mask, (1, 2, 10**6, 64))
    assert plan.useful_pairs == 2 * expected
    assert f"{2 * expected:,} allowed" in plan.explain()


def test_pairs_of_a_function_in_a_long_sequence_are_counted() -> None:
    mask = masks.from_mod(lambda b, h, q, kv: q == kv, within=masks.window(16))
    plan = cd.plan(mask, (1, 2, 2**16, 64))
    assert plan.useful_pairs == 2 * 2**16


def test_costs_that_depend_on_data_are_upper_bounds() -> None:
    printed = lines(cd.plan(masks.padding(), (1, 2, 512, 16)))
    assert "depends on data that only a call has" in printed["pairs"]
    for name in ("pairs", "work", "time"):
        assert "at most" in printed[name]


def test_pairs_that_take_too_long_are_not_counted() -> None:
    def odd(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q + kv) % 2 == 1

    plan = cd.plan(masks.from_mod(odd, within=masks.window(3000)), (1, 1, 10**6, 16))
    assert plan.useful_pairs is None
    assert "too many different ones to count in seconds" in lines(plan)["pairs"]
    assert plan.tiles[0]["full"] is None
