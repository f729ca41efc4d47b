"""The demo: training, check, comparison and pictures; interruption."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from compiled_dilated import compile, longnet, masks, pictures
from examples.demo import comparison
from examples.demo.__main__ import application
from examples.demo.model import LanguageModel, loss
from examples.demo.text import read
from examples.demo.training import continuation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread, and afterwards as many as before.

    Other processes slow down one thread least.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(application, list(arguments))


@pytest.mark.usefixtures("threads")
def test_demo_trains_checks_and_draws(tmp_path: Path) -> None:
    result = run("--quick", "--seconds", "4", "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    record = dict(json.loads(result.stdout))
    assert record["check"]["ok"]
    assert record["training"]["held_out_bits"] < record["text"]["unigram_bits"]
    assert record["training"]["tokens_per_second"] > 0
    systems = [cell["system"] for cell in record["comparison"][:3]]
    assert systems == ["compiled_dilated", "dense SDPA", "FlexAttention"]
    assert sorted(os.listdir(tmp_path / "out")) == ["loss.png", "mask.png", "summary.json"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == record


def test_demo_refuses_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("print(1)\n")
    result = run("--quick", "--text", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "holds 9 bytes of Python sources; the demo needs 262,144" in result.stderr


def test_demo_refuses_to_run_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    result = run("--quick", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "install it with pip install 'compiled-dilated[show]'" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_demo_text_is_split_by_file(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.py").write_bytes(bytes([ord("a") + number % 20]) * 10_000)
    (tmp_path / "not-utf-8.py").write_bytes(b"\xff" * 10_000)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "x.py").write_text("x" * 10_000)
    text = read(tmp_path)
    assert (text.files, len(text.validation)) == (40, 20_001)
    assert set(bytes(text.validation.tolist())) == {ord("a"), ord("\n")}
    assert text.unigram_bits == pytest.approx(math.log2(19), abs=0.01)


def test_demo_model_is_causal_and_starts_at_chance() -> None:
    model = LanguageModel(longnet((8, 16), (1, 2), causal=True), width=32, heads=2, layers=1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    text = torch.randint(256, (1, 40))
    changed = text.clone()
    changed[0, 20] = (text[0, 20] + 1) % 256
    before, after = model(text)[0], model(changed)[0]
    assert torch.equal(before[:20], after[:20])
    assert not torch.equal(before[20:], after[20:])
    fresh = LanguageModel(longnet((8, 16), (1, 2), causal=True), width=32, heads=2, layers=1)
    assert loss(fresh, text).item() == pytest.approx(math.log(256))
    assert len(continuation(fresh, b"ab", 5, torch.Generator().manual_seed(0))) == 5


def test_demo_check_fails_for_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 2, 100, 16)
    program = longnet((16, 32), (1, 2), causal=True)
    assert comparison.check(program, q, k, v).ok
    compile_causal = partial(compile, masks.causal())
    monkeypatch.setattr(comparison, "compile", lambda program: compile_causal())
    assert not comparison.check(program, q, k, v).ok


def test_demo_check_fails_for_wrong_gradients() -> None:
    assert comparison.Check(100, 1e-7, 1e-6, 1e-7, 1e-6).ok
    assert not comparison.Check(100, 1e-7, 1e-6, 2e-6, 1e-6).ok


def test_ctrl_c_ends_the_demo_without_a_traceback(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = ["--seconds", "600", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "examples.demo", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        # The last line of the plan is printed before training begins.
        while not process.stdout.readline().startswith("memory"):
            assert process.poll() is None
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    # Inside exec() of a string Python ends by the signal, which a shell reports as 130 too.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
