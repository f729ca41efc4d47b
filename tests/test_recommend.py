"""`compiled-dilated recommend`: choices by memory and time, and their worth."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import compiled_dilated as cd
from compiled_dilated import masks, rates
from compiled_dilated.cli import app
from compiled_dilated.recommendations import Request, recommend
from compiled_dilated.recommendations.candidates import candidates
from compiled_dilated.recommendations.reports import as_text
from compiled_dilated.recommendations.ways import _bytes_of_rank, weigh
from compiled_dilated.reference import multiplicity
from tests.support.forked import run_code

MIB, GIB = 2**20, 2**30


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["recommend", *map(str, arguments)])


def record(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(run(*arguments, "--json").stdout))


# The choice


def test_dense_attention_is_recommended_where_it_fits_and_is_fast() -> None:
    result = recommend(Request(tokens=2048, limit=GIB))
    assert result.best is not None
    assert result.best.candidate.name == "dense"
    assert result.best.way.kind == "call"
    assert "no pattern is needed" in result.reason


def test_longnet_is_recommended_where_dense_attention_is_slow() -> None:
    result = recommend(Request(tokens=65536, limit=8 * GIB))
    assert result.best is not None
    assert result.best.candidate.name == "longnet"
    assert re.search(
        r"dense attention fits and takes about [\d.,]+ s, more than 10 s", result.reason
    )
    assert re.search(r"longnet computes [\d.]+% of all pairs", result.reason)


def test_a_longer_time_brings_dense_attention_back() -> None:
    slow = Request(tokens=65536, limit=8 * GIB)
    assert recommend(replace(slow, seconds=1000.0)).best.candidate.name == "dense"  # type: ignore[union-attr]


def test_the_fastest_is_recommended_where_nothing_is_fast() -> None:
    result = recommend(Request(tokens=65536, limit=8 * GIB, seconds=1e-6))
    seconds = [option.way.seconds for option in result.options]
    assert result.best is not None
    assert result.best.way.seconds == min(time for time in seconds if time is not None)


def test_a_forward_that_does_not_fit_is_streamed() -> None:
    result = recommend(Request(tokens=2**17, limit=256 * MIB))
    assert result.best is not None
    assert result.best.way.kind == "stream"
    assert result.best.way.peak_bytes <= 256 * MIB
    assert "one call would take" in result.reason


def test_training_that_does_not_fit_takes_a_ring() -> None:
    result = recommend(Request(tokens=2**17, limit=512 * MIB, training=True))
    assert result.best is not None
    assert result.best.way.kind == "ring"
    assert result.best.way.peak_bytes <= 512 * MIB
    # Half as many ranks would not do.
    ranks, peaks = result.best.way.ranks, []
    for count in (ranks, ranks // 2):
        ring = result.request.plan(result.best.candidate.program, ranks=count, layout="contiguous")
        peaks.append(max(_bytes_of_rank(ring, load) for load in ring.loads))
    assert peaks[0] == result.best.way.peak_bytes
    assert peaks[1] > 512 * MIB


def test_a_pattern_is_recommended_if_it_fits_whatever_its_time() -> None:
    result = recommend(Request(tokens=4096, limit=GIB, seconds=1e-6), "causal() & window(100)")
    assert result.best is not None
    assert result.best.candidate.text == "causal() & window(100)"
    assert {option.candidate.name for option in result.options} == {"pattern", "dense"}


def test_without_a_rate_no_time_is_claimed() -> None:
    request = Request(tokens=8192, limit=8 * GIB, device="cuda", dtype="bfloat16")
    result = recommend(request)
    assert {option.way.seconds for option in result.options} == {None}
    assert "no rate was measured for bfloat16 on cuda" in result.reason
    assert "unknown" in as_text(result)
    with_rate = recommend(replace(request, flops=400e12))
    assert all(option.way.seconds for option in with_rate.options)


def test_nothing_fits() -> None:
    result = run("--tokens", 10**6, "--memory", "1MiB", "--training")
    assert result.exit_code == 1
    assert "nothing fits" in result.stdout


# What the numbers are


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [100, 2048, 10_000, 200_000])
def test_the_longest_branch_of_longnet_has_all_tokens(tokens: int, causal: bool) -> None:
    named = {candidate.name: candidate.program for candidate in candidates(tokens, causal)}
    assert list(named) == ["dense", "longnet", "window"]
    last = int(re.findall(r"segments\((\d+)\)", str(named["longnet"].branches[-1]))[0])
    assert last >= tokens
    assert last < 4 * tokens or last == 2048


@pytest.mark.parametrize("causal", [False, True])
def test_causal_candidates_see_nothing_ahead(causal: bool) -> None:
    q = torch.zeros(1, 8, 300, 4)
    for candidate in candidates(300, causal):
        counts = multiplicity(candidate.program, q, q)
        assert bool(counts.triu(1).any()) is not causal


def test_numbers_are_those_of_the_plan() -> None:
    request = Request(tokens=5000, limit=GIB, heads=4, head_dim=32, batch=2)
    dense = cd.plan(masks.full(), (2, 4, 5000, 32))
    for option in recommend(request).options:
        plan = cd.plan(option.candidate.program, (2, 4, 5000, 32), memory_limit=GIB)
        assert plan.fit is not None
        assert option.way.peak_bytes == plan.memory.total
        assert option.longest == plan.fit.tokens
        assert option.pairs == plan.cost.pairs / dense.cost.pairs
        assert option.way.seconds == plan.seconds_of(plan.chosen)


@pytest.mark.parametrize("tokens", [1, 2, 100])
def test_padding_of_few_tokens_is_no_share_of_pairs(tokens: int) -> None:
    options = recommend(Request(tokens=tokens, limit=GIB)).options
    assert {option.pairs for option in options} == {1.0}


def test_a_rate_of_the_users_own_is_used() -> None:
    request = Request(tokens=5000, limit=GIB, flops=1e12)
    flops = request.plan(cd.local_window(64)).cost.dense_flops
    (way,) = weigh(cd.local_window(64), request).ways
    assert way.seconds == flops / 1e12
    (way,) = weigh(cd.local_window(64), replace(request, training=True)).ways
    assert way.seconds == flops * rates.FORWARD_AND_BACKWARD / 1e12


def test_a_rank_holds_no_more_than_is_said() -> None:
    """By the ledger of a simulated ring, which counts shards and messages."""
    program, tokens = cd.longnet((256, 1024), (1, 4), causal=True), 4096
    request = Request(tokens=tokens, limit=2 * MIB, heads=2, head_dim=16, training=True)
    ring = next(way for way in weigh(program, request).ways if way.kind == "ring")
    attend = cd.compile(program, ranks=ring.ranks, layout="contiguous")
    q, k, v = (torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3))
    out = attend(q, k, v)
    out.sum().backward()
    assert attend.ring is not None
    measured = attend.ring.ledger.most_held_bytes
    assert measured <= ring.peak_bytes <= 2 * MIB
    assert measured >= ring.peak_bytes / 4


STREAMED = """
import ctypes, json, sys
import torch
import compiled_dilated as cd
from compiled_dilated import measure

libc = ctypes.CDLL(None)
libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed blocks go back to the system
torch.set_num_threads(2)
ranks = int(sys.argv[1])
program = eval(sys.argv[2])
q = torch.randn(1, 8, 256, 64)
cd.compile(program)(q, q, q)
libc.malloc_trim(0)
run = cd.compile(program, ranks=ranks, transport="streamed")
print(measure.peak_bytes(lambda: run("q.npy", "k.npy", "v.npy", "out.npy")))
"""


def test_a_stream_holds_no_more_than_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of a streamed run in a process of its own."""
    program, tokens, limit = "cd.longnet((256, 1024), (1, 4))", 32768, 32 * MIB
    request = Request(tokens=tokens, limit=limit)
    stream = next(way for way in weigh(eval(program), request).ways if way.kind == "stream")
    rng = np.random.default_rng(0)
    for name in "qkv":
        x = rng.standard_normal((1, 8, tokens, 64), dtype=np.float32)
        np.save(tmp_path / f"{name}.npy", x)
    done = run_code(STREAMED, str(stream.ranks), program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert peak <= stream.peak_bytes <= limit
    assert peak >= stream.peak_bytes / 3


# The command


def test_the_command_prints_the_table() -> None:
    result = run("--tokens", 200000, "--memory", "8GiB")
    assert result.exit_code == 0, result.output
    assert "200,000 tokens, batch 1, 8 heads of 64, float32 on cpu, forward" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if " one call " in line]
    # A star before its name marks the recommended way.
    starred = [row for row in rows if row[0] == "*"]
    assert len(starred) == 1
    del starred[0][0]
    assert [row[0] for row in rows] == ["dense", "longnet", "window"]
    assert "recommended  longnet, one call" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (3000, ()),
        (100000, ("--causal",)),
        (4096, ("--pattern", "window(9) | sinks(2)", "--heads", 2)),
        (4096, ("--pattern", "hilbert_window((64, 64), 3)")),
    ],
)
def test_the_code_that_it_prints_runs(tokens: int, options: tuple[object, ...]) -> None:
    text = run("--tokens", tokens, "--memory", "1GiB", *options).stdout
    code = re.search(r"in Python +(program = .*)\n +(.*)", text)
    assert code is not None, text
    names: dict[str, Any] = {"cd": cd}
    exec(code[1], names)
    # A program over a grid has one length only; of the others, short inputs suffice.
    length = tokens if "hilbert" in text else 300
    names |= {name: torch.randn(1, 2, length, 8) for name in "qkv"}
    assert eval(code[2], names).shape == (1, 2, length, 8)


def test_as_json() -> None:
    result = record("--tokens", 10000, "--memory", "1GiB", "--dtype", "bfloat16", "--training")
    assert result["request"]["limit"] == GIB
    assert result["recommended"] in result["options"]
    assert {"program", "pattern", "way", "ranks", "peak_bytes", "seconds", "fits"} <= set(
        result["recommended"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", 100, "--memory", "8 gigs"), "--memory must be a number and one of B, KiB"),
        (("--tokens", 100, "--memory", "8GiB", "--pattern", "x"), "is called 'x'"),
        (("--tokens", 100, "--memory", "8GiB", "--kv-heads", 3), "a multiple of the 3 key heads"),
        (("--tokens", 0, "--memory", "8GiB"), "--tokens"),
        (("--tokens", 100), "--memory"),
        (("--tokens", 100, "--memory", "8GiB", "--tflops", 0), "--tflops must be above 0"),
        (
            ("--tokens", 17, "--memory", "8GiB", "--pattern", "neighborhood((4, 4), 1)"),
            "speaks of a grid of 16 tokens",
        ),
    ],
)
def test_refuses(arguments: tuple[object, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
