"""`compiled-dilated plan`: what it prints, data from files, what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from compiled_dilated import compile, longnet, plan, planner
from compiled_dilated.arguments import BYTES
from compiled_dilated.cli import app
from compiled_dilated.commands.arguments import Dtype
from compiled_dilated.counting import counts
from compiled_dilated.lowerings import native
from compiled_dilated.programs import as_program
from compiled_dilated.reference import multiplicity
from compiled_dilated.text import read_program

TOKENS = 40
LONGNET = "longnet((64, 128), (1, 2), causal=True)"
# Arrays of files, (batch, tokens) or (tokens).
IDS = np.repeat(np.arange(4), 10)
ARRAYS = {
    "ids": IDS,
    "shuffled": np.random.default_rng(0).permutation(IDS),
    "both": np.stack([IDS, IDS // 2]),
    "flags": np.arange(TOKENS) >= 33,
    "words": np.array(["a"] * TOKENS),
}


def even(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv) % 2 == 0


def other_by_batch(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv + b) % 3 == 0


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def record(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays as files of the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, array in ARRAYS.items():
        np.save(f"{name}.npy", array)
    np.savez("archive.npz", ids=IDS)
    Path("text.npy").write_text("no array")


def test_plan_prints_the_explanation() -> None:
    result = run(LONGNET, "--shape", "1,4,512,32", "--kv-heads", "2")
    assert result.exit_code == 0
    program = longnet((64, 128), (1, 2), causal=True)
    assert result.stdout == plan(program, (1, 4, 512, 32), kv_heads=2).explain() + "\n"


def test_plan_as_json() -> None:
    shape = ("--shape", "1,2,256,32", "--dtype", "bfloat16")
    values = record("window(16)", *shape, "--lowering", "tiled", "--training")
    assert values["q_shape"] == [1, 2, 256, 32]
    assert values["dtype"] == "bfloat16"
    assert values["lowering"] == "tiled"
    assert values["data"] == {}


def test_dtypes_are_those_of_the_library() -> None:
    assert {dtype.value for dtype in Dtype} == set(BYTES)


def test_plan_lists_and_takes_every_lowering() -> None:
    assert "|".join(planner.LOWERINGS) in "".join(run("--help").stdout.split())
    for name in ("auto", "dense", "strided", "tiled"):
        values = record("segments(16)", "--shape", "1,2,64,8", "--lowering", name)
        assert name in ("auto", values["lowering"])


@pytest.mark.parametrize(
    ("program", "names", "batch"),
    [
        ("documents(ids='d')", {"d": "ids"}, 1),
        ("causal() & documents(ids='d')", {"d": "shuffled"}, 1),
        ("causal() & documents(ids='d')", {"d": "both"}, 2),
        ("documents(ids='d') & padding('p')", {"d": "both", "p": "flags"}, 2),
        ("window(3) | global_tokens(data='g')", {"g": "flags"}, 3),
        ("documents(ids='d') & congruent(2, 'cyclic')", {"d": "ids"}, 2),
        ("documents(ids='d') | from_mod('{module}:even', within=window(5))", {"d": "ids"}, 2),
        ("documents(ids='d') & from_mod('{module}:other_by_batch')", {"d": "ids"}, 2),
    ],
)
def test_pairs_of_data_are_those_of_the_reference(
    program: str, names: dict[str, str], batch: int
) -> None:
    text = program.format(module=__name__)
    options = []
    for name, file in names.items():
        options += ["--data", f"{name}={file}.npy"]
    values = record(text, "--shape", f"{batch},4,{TOKENS},8", "--kv-heads", "2", *options)
    functions = {f"{__name__}:even": even, f"{__name__}:other_by_batch": other_by_batch}
    q, k = torch.zeros(batch, 4, TOKENS, 8), torch.zeros(batch, 2, TOKENS, 8)
    data = {name: torch.from_numpy(np.atleast_2d(ARRAYS[file])) for name, file in names.items()}
    parsed = as_program(read_program(text, lambda name: functions[name]))
    allowed = int(multiplicity(parsed, q, k, data=data).sum())
    assert values["useful_pairs"] == allowed
    assert allowed <= values["computed_pairs"]
    assert values["data"] == {name: list(x.shape) for name, x in data.items()}


def test_the_plan_of_data_is_that_of_the_call() -> None:
    options = ("--shape", f"1,2,{TOKENS},8")
    program = "causal() & documents(ids='d')"
    without, with_data = record(program, *options), record(program, *options, "--data", "d=ids.npy")
    assert without["useful_pairs"] is None
    assert with_data["lowering"] == without["lowering"]
    assert [row["lowering"] for row in with_data["candidates"]] == ["native"]
    # The kernel's own count for a call with these data.
    q = torch.zeros(1, 2, TOKENS, 8)
    chosen = compile(read_program(program)).plan(q, q, q)
    work = chosen.chosen[0].work[0]
    counts = native.counts(work, chosen.problem, [torch.from_numpy(IDS[None])])
    assert with_data["computed_pairs"] == counts[0] < without["computed_pairs"]
    assert with_data["kernel_gflop"] == counts[0] * 4 * 8 / 1e9


def test_tiles_of_data_are_those_of_the_documents() -> None:
    np.save("long.npy", np.repeat(np.arange(4), 128))
    shape = ("--shape", "1,2,512,8")
    row = record("documents(ids='d')", *shape, "--data", "d=long.npy")["tiles"][0]
    assert (row["full"], row["partial"]) == (4, 0)
    same = record("documents(lengths=(128, 128, 128, 128))", *shape)["tiles"][0]
    assert row == same


def test_the_explanation_has_the_pairs_of_data() -> None:
    result = run("documents(ids='d')", "--shape", f"1,1,{TOKENS},8", "--data", "d=ids.npy")
    assert result.exit_code == 0
    assert "pairs     400 allowed, at most" in result.stdout


def test_too_many_pairs_to_count_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_MOST_PAIRS", 100)
    options = ("--shape", f"1,1,{TOKENS},8", "--data", "d=shuffled.npy")
    result = run("documents(ids='d')", *options)
    assert result.exit_code == 0
    assert result.stdout.endswith("the data allow too many different pairs to count in seconds\n")
    assert record("documents(ids='d')", *options)["useful_pairs"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("causal()", "--shape", "1,8,65536"), "q_shape must be (batch, heads, tokens, head_dim)"),
        (("causal()", "--shape", "a,b"), "--shape takes integers joined by commas"),
        (("causal()", "--kv-heads", "3"), "must be a multiple of the 3 key heads"),
        (("neighborhood((4, 4), 1)", "--shape", "1,1,17,8"), "speaks of a grid of 16 tokens"),
        (("causal()", "--dtype", "int8"), "'int8' is not one of 'float32', 'bfloat16'"),
        (("causal()", "--lowering", "fast"), "lowering must be one of 'auto', 'native', 'dense'"),
        ((), "PROGRAM"),
        (("causal()", "--data", "d=ids.npy"), "the program reads no data; got --data for d"),
        (("documents(ids='d')", "--data", "x=ids.npy"), "reads d; got --data for x. Pass --data"),
        (("documents(ids='d')", "--data", "d"), "--data takes NAME=FILE.npy"),
        (("documents(ids='d')", "--data", "d=none.npy"), "--data d: no file 'none.npy'"),
        (("documents(ids='d')", "--data", "d=text.npy"), "is no array of numbers"),
        (("documents(ids='d')", "--data", "d=archive.npz"), "got an archive of several arrays"),
        (("documents(ids='d')", "--data", "d=words.npy"), "must hold integers or bools"),
        (("padding('p')", "--data", "p=ids.npy"), "must be (batch or 1, tokens) with batch 1"),
        (("padding('p')", "--shape", "1,1,40,8", "--data", "p=ids.npy"), "must be a bool tensor"),
        (("documents(ids='d')", "--shape", "1,1,40,8", "--data", "d=both.npy"), "with batch 1"),
        (
            ("documents(ids='d')", "--shape", "1,1,1,8", "--q-offset", "40", "--data", "d=ids.npy"),
            "at least 41 tokens; got shape (1, 40)",
        ),
    ],
)
def test_plan_refuses(arguments: tuple[str, ...], message: str) -> None:
    before = sorted(os.listdir())
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(os.listdir()) == before
