"""Packages on other machines.

They run without this library or a compiler, on other CPUs, and from C++.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.native import cpp
from tests.cpp import program_of
from tests.packaged import WITHOUT, Exported, Model, of_model, padded, qkv
from tests.support.forked import run_code

# Without this library

# Scripts behind WITHOUT. Their zeros are views of one number, so that any length fits.
ZEROS = """
def zeros(tokens, batch):
    qkv = [torch.zeros(()).expand(batch, heads, tokens, 16) for heads in (4, 2, 2)]
    return [*qkv, torch.tensor(False).expand(batch, tokens)]
"""
BOTH_ENTRIES = (
    WITHOUT
    + ZEROS
    + """
runs = {entry: load(entry) for entry in ("model", "decode")}
inputs = torch.load(path + ".inputs")
torch.save([runs[entry](*x) for entry, x in inputs], path + ".out")
print(*opened())
print(runs["decode"].get_metadata()["name"], runs["model"].get_metadata()["decode.tokens"])
for tokens, batch in ((0, 1), (2**20 + 1, 1), (9, 9)):
    try:
        runs["model"](*zeros(tokens, batch))
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
)
REFUSED = (
    WITHOUT
    + ZEROS
    + """
try:
    load("model")(*zeros(9, 1))
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""
)


@pytest.mark.parametrize(
    ("capability", "kernels"), [("", cpp.best_kernels("avx2")), ("avx2", "avx2")]
)
def test_without_this_library(
    package: Exported, tmp_path: Path, fresh_python: Any, capability: str, kernels: str
) -> None:
    """Kernels by the CPU's capability, both entries, metadata and refusals."""
    path = package.copied(tmp_path)
    inputs = [
        ("model", padded(65)),
        ("model", padded(1000)),
        ("decode", padded(300, queries=1)),
        ("decode", padded(64, queries=9)),
    ]
    torch.save(inputs, f"{path}.inputs")
    run = fresh_python("-c", BOTH_ENTRIES, str(path), ATEN_CPU_CAPABILITY=capability)
    assert run.returncode == 0, run.stderr
    attend = cd.compile(package.model)
    for (_, (q, k, v, data)), out in zip(inputs, torch.load(f"{path}.out"), strict=True):
        expected = attend(q, k, v, q_offset=k.shape[2] - q.shape[2], data={"padding": data})
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert run.stdout.splitlines() == [
        f"model.pt2.{kernels}.so model.pt2.so",
        f"{package.about.name} 1,1048576",
        "tokens must be from 1 to 1,048,576, for which the package was made; got 0",
        "tokens must be from 1 to 1,048,576, for which the package was made; got 1,048,577",
        "batch must be from 1 to 8, for which the package was made; got 9",
    ]


def test_a_cpu_with_less_is_refused_without_this_library(
    package: Exported, fresh_python: Any
) -> None:
    run = fresh_python("-c", REFUSED, str(package.path), ATEN_CPU_CAPABILITY="default")
    message = "compiled_dilated: the package needs a CPU with AVX2, and this one has none\n"
    assert run.stdout == message, run.stderr


def test_a_missing_kernel_is_named_without_this_library(
    package: Exported, tmp_path: Path, fresh_python: Any
) -> None:
    path = package.copied(tmp_path)
    for kernels in ("avx512", "avx2"):
        path.with_name(f"model.pt2.{kernels}.so").unlink()
    run = fresh_python("-c", REFUSED, str(path))
    message = "compiled_dilated: no kernels for this CPU beside the package's library:\n"
    assert run.stdout == message, run.stderr


# On other CPUs


@pytest.mark.parametrize(
    ("capability", "kernels"), [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", None)]
)
def test_the_fastest_kernels_that_a_cpu_runs(
    monkeypatch: pytest.MonkeyPatch, capability: str, kernels: str | None
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpp.best_kernels("avx2") == kernels


def test_a_cpu_with_less_is_refused(package: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="the package needs a CPU with AVX2; this one has DEFAULT"):
        cd.load(package.path)


@pytest.mark.skipif(
    shutil.which("objdump") is None, reason="needs objdump (Debian: apt install binutils)"
)
def test_code_for_avx2_has_no_instruction_of_avx512(package: Exported, tmp_path: Path) -> None:
    shutil.unpack_archive(package.path, tmp_path, "zip")
    files = [
        f"{package.path}.so",
        f"{package.path}.avx2.so",
        *map(str, tmp_path.rglob("*.so")),
    ]
    assert len(files) == 4
    for file in [*files, f"{package.path}.avx512.so"]:
        command = ["objdump", "-d", "--no-show-raw-insn", file]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert ("%zmm" in code or "%k1" in code) == file.endswith(".avx512.so"), file


@pytest.mark.slow
def test_code_for_this_cpu_alone(
    tmp_path: Path, fresh_python: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    program = masks.causal() & masks.padding("padding")
    about = cd.export(program, padded(50), path, lengths=(2, 5000), isa="native")
    assert set(about.files) == {".pt2", ".pt2.so", ".pt2.native.so"}
    *inputs, data = padded(65)
    expected = cd.compile(program)(*inputs, data={"padding": data})
    torch.testing.assert_close(cd.load(path)(*inputs, data), expected, rtol=1e-6, atol=1e-6)
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return
    run = fresh_python("-c", REFUSED, str(path), ATEN_CPU_CAPABILITY="default")
    message = "uses the instructions of the CPU that exported it, and this one has fewer"
    assert message in run.stdout, run.stderr
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="alone, as isa='native' makes it; this one has DEFAULT"):
        cd.load(path)


LOADED = """
import sys
import torch
import compiled_dilated as cd
path = sys.argv[1]
run, inputs = cd.load(path), torch.load(path + ".inputs")
torch.save([run(*inputs), run.decode(*inputs)], path + ".out")
with open("/proc/self/maps") as lines:
    print(*sorted({line.split()[-1].rpartition("/")[2] for line in lines if path + "." in line}))
print(cd.compile(cd.masks.causal()).plan(*torch.zeros(3, 1, 1, 9, 16)).lowering == "native")
"""


def test_load_without_a_compiler(package: Exported, tmp_path: Path, fresh_python: Any) -> None:
    """The package's own kernels compute; eager calls use no native kernel."""
    path = package.copied(tmp_path)
    *inputs, data = padded(65)
    torch.save([*inputs, data], f"{path}.inputs")
    settings = {"CXX": "no-such-compiler", "COMPILED_DILATED_CACHE": str(tmp_path / "cache")}
    run = fresh_python("-c", LOADED, str(path), **settings, ATEN_CPU_CAPABILITY="avx2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["model.pt2.avx2.so", "False"]
    expected = cd.compile(package.model)(*inputs, data={"padding": data})
    for out in torch.load(f"{path}.out"):
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


# From C++

MAIN = """
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

std::vector<at::Tensor> inputs(int64_t queries, int64_t tokens) {
  const auto numbers = at::arange(tokens).to(at::kFloat).view({1, 1, tokens, 1});
  const auto v = numbers.expand({1, 2, tokens, 16}).contiguous();
  const auto padding = at::zeros({1, tokens}, at::kBool);
  return {at::ones({1, 4, queries, 16}), at::ones({1, 2, tokens, 16}), v, padding};
}

int main(int, char** argv) {
  const std::string library = std::string(argv[1]) + ".so";
  if (!dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL)) return std::cerr << dlerror() << "\\n", 1;
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]), decode(argv[1], "decode");
  std::cout << model.get_metadata()["model.tokens"] << "\\n";
  for (const int64_t tokens : {2, 65, 1000}) {
    std::cout << model.run(inputs(tokens, tokens))[0].sum().item<float>() << "\\n";
    std::cout << decode.run(inputs(1, tokens))[0].sum().item<float>() << "\\n";
  }
  for (const int64_t tokens : {0, 1048577}) {
    try {
      model.run(inputs(tokens, tokens));
      std::cout << "computed\\n";
    } catch (const std::exception& error) {
      const std::string text = error.what();
      std::cout << text.substr(0, text.find('\\n')) << "\\n";
    }
  }
}
"""


@pytest.mark.slow
def test_from_cpp(package: Exported, tmp_path: Path) -> None:
    command = [program_of(MAIN, tmp_path), str(package.path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "1,1048576"
    # For each length the sums of the entries "model" and "decode".
    attend, sums = cd.compile(package.model), iter(map(float, lines[1:7]))
    for tokens in (2, 65, 1000):
        q, k = torch.ones(1, 4, tokens, 16), torch.ones(1, 2, tokens, 16)
        v = torch.arange(tokens).float().view(1, 1, tokens, 1).expand(1, 2, tokens, 16)
        out = attend(q, k, v, data={"padding": torch.zeros(1, tokens, dtype=torch.bool)})
        assert next(sums) == pytest.approx(float(out.sum()), rel=1e-4)
        assert next(sums) == pytest.approx(float(out[:, :, -1].sum()), rel=1e-4)
    refusal = "tokens must be from 1 to 1,048,576, for which the package was made; got"
    assert lines[7:] == [f"{refusal} 0", f"{refusal} 1,048,577"]


# Other formats

SAVED = """
import sys
import torch
import compiled_dilated
path = sys.argv[1]
model = torch.export.load(path).module()
torch.save([model(*inputs) for inputs in torch.load(path + ".inputs")], path + ".out")
"""


def saved_and_loaded(model: Any, inputs: list[tuple[Tensor, ...]], path: Path) -> list[Tensor]:
    """The outputs that another process computes from a graph of torch.export.save."""
    length = torch.export.Dim("length", min=2, max=5000)
    # The length is the last dimension but one, of two dimensions the last.
    dynamic = tuple({max(x.dim() - 2, 1): length} for x in inputs[0])
    torch.export.save(torch.export.export(model, inputs[0], dynamic_shapes=dynamic), path)
    torch.save(inputs, f"{path}.inputs")
    run = run_code(SAVED, str(path))
    assert run.returncode == 0, run.stderr
    outs: list[Tensor] = torch.load(f"{path}.out")
    return outs


class OfProgram(torch.nn.Module):
    """A program as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(cd.longnet((16, 64), (1, 4), causal=True))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.attend(q, k, v)
        return out


@pytest.mark.parametrize(
    ("make", "inputs"), [pytest.param(OfProgram, qkv, marks=pytest.mark.slow), (Model, of_model)]
)
def test_torch_export_saves_and_loads(
    make: Any, inputs: Callable[..., Any], tmp_path: Path
) -> None:
    model = make()
    examples = [inputs(tokens) for tokens in (50, 2, 65, 1000)]
    with torch.no_grad():
        outs = saved_and_loaded(model, examples, tmp_path / "graph.pt2")
        for out, example in zip(outs, examples, strict=True):
            torch.testing.assert_close(out, model(*example), rtol=1e-5, atol=1e-6)


ONNX = "attention by a program is no ONNX operator: .* Use compiled_dilated.export"


def test_an_onnx_export_by_tracing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=ONNX):
        torch.onnx.export(OfProgram(), qkv(50), str(tmp_path / "model.onnx"), dynamo=False)


def test_an_onnx_export_of_a_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of torch.onnx.export(dynamo=True), which needs onnxscript, one by one."""
    exported = torch.export.export(OfProgram(), qkv(50))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(NotImplementedError, match=ONNX):
        exported.run_decompositions({})


def test_an_onnx_export_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match=ONNX):
        torch.onnx.export(OfProgram(), qkv(50), str(tmp_path / "model.onnx"), dynamo=True)


def test_the_description_is_json(package: Exported) -> None:
    fields = json.loads(package.path.with_name("model.pt2.json").read_text())
    ranges = fields["entries"]["decode"]["ranges"]
    assert ranges == {"tokens": [1, 2**20], "batch": [1, 8], "queries": [1, 2**20]}
