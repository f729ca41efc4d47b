"""Packages: the numbers of the model at every length, here, without this package, and from C++; anything else is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp import program_of
from torch import Tensor, nn
from typer.testing import CliRunner

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.cli import app

LENGTHS = (1, 2, 3, 7, 63, 64, 65, 100, 257, 1000)


def qkv(tokens: int, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(batch, h, tokens, 16, generator=generator) for h in (heads, kv_heads, kv_heads))


class Model(nn.Module):
    """Attention between layers, with padding and a score_mod that reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal() & masks.window(20) & masks.padding("padding"))
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.slopes = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.project(x).chunk(3, -1))

        def bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score - self.slopes[h] * (q - kv)

        y = self.attend(q, k, v, data={"padding": padding}, score_mod=bias)
        return self.out(y.transpose(1, 2).flatten(2))


def of_model(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, 32, generator=generator), torch.rand(batch, tokens, generator=generator) < 0.2


@dataclass(frozen=True)
class Exported:
    model: Any
    path: Path
    about: cd.packages.About


@pytest.fixture(scope="module")
def longnet(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    program, path = cd.longnet((16, 64), (1, 4)), tmp_path_factory.mktemp("longnet") / "model.pt2"
    return Exported(program, path, cd.export(program, qkv(100), path, lengths=(1, 2**20), batches=(1, 8)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model, path = Model(), tmp_path_factory.mktemp("whole") / "model.pt2"
    return Exported(model, path, cd.export(model, of_model(50), path, lengths=(2, 4096)))


def test_a_program_at_every_length_and_batch(longnet: Exported) -> None:
    run, attend = cd.load(longnet.path), cd.compile(longnet.model)
    for tokens in LENGTHS:
        for batch in (1, 3):
            inputs = qkv(tokens, batch)
            torch.testing.assert_close(run(*inputs), attend(*inputs), rtol=1e-6, atol=1e-6)


def test_a_model_with_data_and_a_function(whole: Exported) -> None:
    run = cd.load(whole.path)
    for tokens in LENGTHS[1:]:
        inputs = of_model(tokens)
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), whole.model(*inputs), rtol=1e-5, atol=1e-6)


WITHOUT = """
import sys
sys.modules["compiled_dilated"] = None
import torch
path, length = sys.argv[1], int(sys.argv[2])
torch.ops.load_library(path + ".so")
run = torch._inductor.aoti_load_package(path)
inputs = torch.load(path + ".inputs")
torch.save(run(*inputs), path + ".out")
"""


@pytest.mark.parametrize("tokens", [65, 1000])
def test_without_this_package(longnet: Exported, fresh_python: Callable[..., Any], tokens: int) -> None:
    inputs = qkv(tokens)
    torch.save(inputs, f"{longnet.path}.inputs")
    done = fresh_python("-c", WITHOUT, str(longnet.path), str(tokens))
    assert done.returncode == 0, done.stderr
    out = torch.load(f"{longnet.path}.out")
    torch.testing.assert_close(out, cd.compile(longnet.model)(*inputs), rtol=1e-6, atol=1e-6)


def test_inspect_says_what_was_exported(longnet: Exported) -> None:
    about = cd.inspect(longnet.path)
    assert about == longnet.about
    assert about.name == repr(longnet.model)
    assert about.ranges == {"tokens": (1, 2**20), "batch": (1, 8)}
    assert "input 0: float32 (batch, 4, tokens, 16)" in str(about)
    json.dumps(about.to_json())


MAIN = """
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

int main(int, char** argv) {
  if (!dlopen((std::string(argv[1]) + ".so").c_str(), RTLD_NOW | RTLD_GLOBAL)) return std::cerr << dlerror() << "\\n", 1;
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  for (const int64_t tokens : {2, 65, 1000}) {
    const auto q = at::ones({1, 4, tokens, 16}), k = at::ones({1, 2, tokens, 16});
    const auto v = at::arange(tokens).to(at::kFloat).view({1, 1, tokens, 1}).expand({1, 2, tokens, 16}).contiguous();
    std::cout << model.run({q, k, v})[0].sum().item<float>() << " ";
  }
}
"""


@pytest.mark.slow
def test_from_cpp(longnet: Exported, tmp_path: Path) -> None:
    done = subprocess.run([program_of(MAIN, tmp_path), str(longnet.path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    attend = cd.compile(longnet.model)
    for number, tokens in zip(done.stdout.split(), (2, 65, 1000), strict=True):
        x = torch.ones(1, 4, tokens, 16)
        v = torch.arange(tokens).float().view(1, 1, tokens, 1).expand(1, 2, tokens, 16)
        assert float(number) == pytest.approx(float(attend(x, x[:, :2], v).sum()), rel=1e-4)


# The command line -------------------------------------------------------------------------------------------------------------


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text(
        "import torch\n"
        "from compiled_dilated import masks\n"
        "def make():\n"
        "    return masks.causal() & masks.window(8), tuple(torch.randn(1, 2, 20, 8) for _ in range(3))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    done = run_command("export", "made_here:make", "model.pt2", "--lengths", "1,4096", "--json")
    assert done.exit_code == 0, done.output
    shown = run_command("inspect", "model.pt2")
    assert "tokens: 1 to 4,096" in shown.stdout
    assert json.loads(run_command("inspect", "model.pt2", "--json").stdout) == json.loads(done.stdout[done.stdout.index("{") :])
    q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
    want = cd.compile(masks.causal() & masks.window(8))(q, k, v)
    torch.testing.assert_close(cd.load("model.pt2")(q, k, v), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "none.pt2"), "none.pt2.json is missing"),
        (("export", "nowhere:make", "model.pt2"), "No module named 'nowhere'"),
        (("export", "json:nothing", "model.pt2"), "MODULE:FACTORY must name a function; json has no function 'nothing'"),
        (("export", "time:time", "model.pt2"), "must return (model or program, example inputs); got float"),
        (("export", "time:time", "model.pt2", "--lengths", "3"), "must return"),
    ],
)
def test_bad_usage_of_the_commands(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    done = run_command(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


# Refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (lambda: qkv(50)[:2], TypeError, "the package takes 3 tensors; got 2"),
        (lambda: [x.double() for x in qkv(50)], TypeError, "input 0 must be float32 on a CPU; got torch.float64 on cpu"),
        (lambda: (1, 2, 3), TypeError, "input 0 must be a tensor; got int"),
        (lambda: qkv(50, batch=9), ValueError, "batch must be from 1 to 8, for which the package was made; got 9"),
        (lambda: qkv(0), ValueError, "tokens must be from 1 to 1,048,576, for which the package was made; got 0"),
        (lambda: qkv(50, heads=8), ValueError, r"input 0 must have the shape \(batch, 4, tokens, 16\); got \(2, 8, 50, 16\)"),
        (lambda: (*qkv(50)[:2], qkv(51)[2]), ValueError, r"input 2 must have the shape .*; got \(2, 2, 51, 16\)"),
        (lambda: [x[0] for x in qkv(50)], ValueError, r"input 0 must have the shape .*; got \(4, 50, 16\)"),
    ],
)
def test_bad_inputs_are_refused(longnet: Exported, inputs: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cd.load(longnet.path)(*inputs())


@pytest.fixture
def copied(longnet: Exported, tmp_path: Path) -> Path:
    for suffix in ("", ".so", ".json"):
        shutil.copy(f"{longnet.path}{suffix}", tmp_path / f"model.pt2{suffix}")
    return tmp_path / "model.pt2"


@pytest.mark.parametrize("suffix", ["", ".so"])
def test_an_altered_file_is_refused(copied: Path, suffix: str) -> None:
    file = copied.with_name(copied.name + suffix)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that was written: its digest differs"):
        cd.load(copied)


@pytest.mark.parametrize("suffix", ["", ".so", ".json"])
def test_a_missing_file_is_named(copied: Path, suffix: str) -> None:
    copied.with_name(copied.name + suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"model.pt2{suffix} is missing"):
        cd.load(copied)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("torch", "2.10.0", "the package is for torch 2.10.0; this is"),
        ("cpu", "VSX", "the package uses VSX; this CPU has"),
        ("machine", "s390x", "the package is for s390x; this machine is"),
        ("format", 99, "its format is 99, and this version reads 1"),
        ("inputs", None, "does not describe a package"),
        (None, None, "does not describe a package"),
    ],
)
def test_another_machine_is_refused(copied: Path, field: str | None, value: Any, message: str) -> None:
    beside = copied.with_name("model.pt2.json")
    fields = json.loads(beside.read_text())
    beside.write_text("{" if field is None else json.dumps({**fields, field: value}))
    with pytest.raises(ValueError, match=message):
        cd.load(copied)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "model.so"}, ValueError, r"path must end with .pt2; got 'model.so'"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, a program or a mask; got int"),
        ({"model": cd.compile(masks.causal())}, TypeError, "export takes the program itself"),
        ({"lengths": (9, 3)}, ValueError, r"lengths must be the least and the most, as \(1, 65536\); got \(9, 3\)"),
        ({"lengths": (1, 30)}, ValueError, r"the example's tokens, 50, must be within its range \(1, 30\)"),
        ({"example_inputs": qkv(1), "lengths": (1, 30)}, ValueError, "an example must have at least 2 tokens where that varies"),
        ({"example_inputs": (1, 2, 3)}, TypeError, r"example_inputs\[0\] must be a tensor on a CPU; got int"),
    ],
)
def test_bad_exports_are_refused(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": masks.causal(), "example_inputs": qkv(50), "path": tmp_path / "model.pt2", **options}
    with pytest.raises(error, match=message):
        cd.export(**settings)
    assert not list(tmp_path.iterdir())


def test_what_needs_python_is_refused(tmp_path: Path) -> None:
    class OfTiles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = cd.compile(masks.causal(), lowering="tiled")

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.attend(q, k, v)
            return out

    with pytest.raises(ValueError, match="the graph holds attention that the native kernel does not compute for all lengths"):
        cd.export(OfTiles(), qkv(50), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), [("llama", cd.longnet((16, 64), (1, 4), causal=True)), ("mistral", None)])
def test_models_of_transformers(name: str, attention: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers_models import inputs_of, model_of

    model = cd.compile(model_of(name, "eager", use_cache=False), attention=attention)
    cd.export(model, (inputs_of(name)["input_ids"],), tmp_path / "model.pt2", lengths=(2, 512), batches=(1, 8))
    run = cd.load(tmp_path / "model.pt2")
    for tokens in (2, 50, 101):
        ids = inputs_of(name, tokens, batch=3)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(run(ids).logits, model(ids).logits, rtol=1e-5, atol=2e-6)
