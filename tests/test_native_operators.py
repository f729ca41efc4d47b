"""The native operators with a stub kernel.

They are called eagerly, in graphs, and in packages without Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compiled_dilated.native import build
from tests.cpp import program_of
from tests.support.forked import run_code

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


# A kernel of float32 whose results are sums of its arguments:
# out[b, h, i, d] = q[b, h, i, 0] + v[b, key head of h, 0, d] (+ out when it merges),
# lse[b, h, i] = scale + offset (+ lse when it merges).
STUB = """
#include <stdexcept>
#include "problem.h"
namespace native {
namespace {
float& at(const Array& x, int64_t b, int64_t h, int64_t i, int64_t d) {
  const int64_t place = b * x.strides[0] + h * x.strides[1] + i * x.strides[2];
  return x.writable<float>()[place + (x.dims == 4 ? d * x.strides[3] : 0)];
}
struct Call { const Problem& p; bool merge; };
void entry(void* argument, int b) {
  const auto& [p, merge] = *static_cast<Call*>(argument);
  if (p.code.size() != 1) throw std::runtime_error("the stub's code is one number");
  for (int64_t h = 0; h < p.q.sizes[1]; ++h)
    for (int64_t i = 0; i < p.q.sizes[2]; ++i) {
      const float offset = p.q_offsets[p.q_offsets.size() == 1 ? 0 : b], factor = merge ? 1 : 0;
      float& lse = at(p.lse, b, h, i, 0);
      lse = (merge ? lse : 0) + p.scale + offset;
      for (int64_t d = 0; d < p.v.sizes[3]; ++d) {
        float& out = at(p.out, b, h, i, d);
        const int64_t key_head = h * p.v.sizes[1] / p.q.sizes[1];
        out = (merge ? out : 0) + at(p.q, b, h, i, 0) + at(p.v, b, key_head, 0, d);
      }
    }
}
}  // namespace
void count(const Problem& p) { p.counts[0] = p.q.sizes[2] * p.k.sizes[2]; }
void forward(const Problem& p, bool merge) {
  if (p.q.type != Type::f32) throw std::runtime_error("the stub takes float32");
  if (p.counts) count(p);
  Call call{p, merge};
  p.parallel.run(p.parallel.context, int(p.q.sizes[0]), entry, &call);
}
void backward(const Problem& p, const Gradients& g) {
  for (size_t n = 0; n < g.learned.size(); ++n) g.sums.writable<float>()[n] = n + 1;
  at(g.grad_q, 0, 0, 0, 0) = g.grad_lse ? at(g.grad_lse, 1, 1, 1, 0) : 7;
  at(g.grad_k, 1, 1, 2, 3) = at(g.grad_out, 1, 3, 4, 5);
}
}  // namespace native
"""
BEGIN = """
import os, sys
from pathlib import Path
import torch
from torch import nn
from compiled_dilated.native import build, library
build.SOURCES = Path(os.environ["STUB"])
native = torch.ops.compiled_dilated
torch.manual_seed(0)
q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
padding, offsets = torch.ones(2, 7, dtype=torch.bool), torch.tensor([1, 2])

def expected(q, v, lse):
    out = q[..., :1] + v.repeat_interleave(2, 1)[:, :, :1]
    return out, torch.as_tensor(lse).view(-1, 1, 1).expand(q.shape[:3])

class Model(nn.Module):
    def forward(self, q, k, v, padding, offsets):
        out, lse = native.native(q * 1, k, v, [padding], None, [3], 0.5, q.shape[2], offsets, True)
        native.native_merge(out, lse, q, k, v, None, None, [3], 0.5, 0)
        return out * 2, lse * 2

def check(run, n):
    x = torch.randn(2, 4, n, 8)
    out, lse = run(x, k, v, padding, offsets)
    expected_out, expected_lse = expected(x, v, 1.0 + n + offsets)
    torch.testing.assert_close(out, 4 * expected_out)
    torch.testing.assert_close(lse, 2 * expected_lse)
    assert out.stride() == torch.empty(2, n, 4, 6).transpose(1, 2).stride()
"""
# Results, strides, gradients, empty inputs, refusals, and torch's own checks of operators.
EAGER = """
assert not {"torch._dynamo", "torch._inductor"} & set(sys.modules)
counts = native.native_counts(None, None, [3], [2, 4, 2, 5, 7, 8, 6], 0, None)
assert counts.tolist() == [35, 0, 0, 0, 0, 0, 0, 0], counts
for by_token in (False, True):
    out, lse = native.native(q, k, v, [padding], None, [3], 0.5, 2, None, by_token)
    expected_out, expected_lse = expected(q, v, 2.5)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    assert out.transpose(1, 2).is_contiguous() == by_token and out.is_contiguous() != by_token
spread = torch.randn(2, 5, 16, 4).permute(0, 3, 1, 2)[..., ::2]
arguments = (spread, k.expand(2, 2, 7, 8), v, None, None, [3], 0.5, 2, offsets, True)
out, lse, counts = native.native_counted(*arguments)
assert torch.equal(out, expected(spread, v, 0)[0])
assert lse[:, 0, 0].tolist() == [3.5, 4.5] and counts[0] == 35

grad = torch.randn(2, 4, 5, 6)
saved = (q, k, v, out, lse, None, [torch.zeros(3), torch.zeros(2)], [3], 0.5, 0, None)
*grads, sums = native.native_backward(grad, None, *saved, [1, 0])
assert sums.tolist() == [1, 2, 0, 0, 0]
assert grads[0][0, 0, 0, 0] == 7 and grads[1][1, 1, 2, 3] == grad[1, 3, 4, 5]
assert all(x.is_contiguous() and x.shape == y.shape for x, y in zip(grads, (q, k, v)))
assert native.native_backward(grad, lse, *saved, [])[0][0, 0, 0, 0] == lse[1, 1, 1]

for empty in (q[:, :, :0], q[:0]):
    b = empty.shape[0]
    out, lse = native.native(empty, k[:b], v[:b], None, None, [3], 1.0, 0, None, True)
    assert out.shape == (*empty.shape[:3], 6)
out, lse = native.native(q, k[:, :, :0], v[:, :, :0], None, None, [3], 1.0, 0, None, True)
assert (out == 0).all() and (lse == -torch.inf).all()
inputs = (q, k[:, :, :0], v[:, :, :0])
*grads, sums = native.native_backward(out, lse, *inputs, out, lse, *saved[5:], [])
assert (grads[0] == 0).all() and grads[1].shape == (2, 2, 0, 8)
native.native_merge(out, lse, *inputs, None, None, [3], 1.0, 0)

def refuses(text, *arguments):
    try:
        native.native(*arguments)
    except RuntimeError as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(text)

options = (None, None, [3], 0.5, 0, None, True)
refuses("the stub takes float32", q.half(), k.half(), v.half(), *options)
refuses("the stub's code is one number", q, k, v, None, None, [1, 2], *options[3:])
refuses("k with q's batch and head dim; got shape (1, 2, 7, 8)", q, k[:1], v, *options)
refuses("query heads must be a multiple of key heads; got 3 and 2", q[:, :3], k, v, *options)
refuses("q, k and v must have one dtype", q, k.double(), v, *options)
complex_data = [torch.zeros(1, dtype=torch.complex64)]
refuses("take no tensor of dtype ComplexFloat", q, k, v, complex_data, *options[1:])
refuses("offsets of shape (1,) or (B,)", q, k, v, *options[:-2], torch.arange(3), True)
before, text = torch.tensor([0, -1]), "q_offset must be 0 or more for each sequence; got -1"
refuses(text, q, k, v, *options[:-2], before, True)
out, _ = native.native(q.to("meta"), k.to("meta"), v.to("meta"), *options)
assert out.stride() == (240 // 2, 6, 24, 1)

tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
def examine(name, *arguments):
    torch.library.opcheck(getattr(native, name).default, arguments, test_utils=tests)
out, lse = (x.clone() for x in native.native(q, k, v, *options))
examine("native", q, k, v, [padding], *options[1:])
examine("native_counted", q, k, v, *options[:-2], offsets, False)
examine("native_merge", out, lse, q, k, v, None, None, [3], 0.5, 0)
examine("native_backward", grad, lse, *saved, [1])
examine("native_counts", [padding], None, [3], [2, 4, 2, 5, 7, 8, 6], 0, None)
"""
COMPILED = """
torch._dynamo.config.fail_on_recompile_limit_hit = True
compiled = torch.compile(Model(), fullgraph=True, dynamic=True)
for n in (5, 9, 30):
    check(compiled, n)
length = torch.export.Dim("length", min=2, max=4096)
shapes = ({2: length}, {}, {}, {}, {})
exported = torch.export.export(Model(), (q, k, v, padding, offsets), dynamic_shapes=shapes)
torch.export.save(exported, sys.argv[1])
if len(sys.argv) > 2:
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported, package_path=sys.argv[2])
"""
LOADED = """
check(torch.export.load(sys.argv[1]).module(), 11)
"""


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels in their default state, whatever the caller's environment."""
    monkeypatch.delenv("COMPILED_DILATED_NATIVE", raising=False)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of processes that use the stub: its sources, and a cache."""
    folder = tmp_path_factory.mktemp("stub")
    for name in ("problem.h", "operators.cpp"):
        shutil.copy(build.SOURCES / name, folder)
    shutil.copytree(build.SOURCES / "door", folder / "door")
    (folder / "stub.cpp").write_text(STUB)
    return {"STUB": str(folder), "COMPILED_DILATED_CACHE": str(folder / "cache")}


@pytest.fixture
def in_process(stub: dict[str, str]) -> Callable[..., None]:
    """Run code with the stub in a process of its own."""

    def run(code: str, *arguments: str) -> None:
        process = run_code(BEGIN + code, *arguments, environment=stub)
        assert process.returncode == 0, process.stderr

    return run


def test_operators(in_process: Callable[..., None]) -> None:
    in_process(EAGER)


@pytest.mark.slow
def test_operators_in_graphs_and_in_another_process(
    in_process: Callable[..., None], tmp_path: Path
) -> None:
    in_process(COMPILED, str(tmp_path / "model.pt2"))
    in_process(LOADED, str(tmp_path / "model.pt2"))


def test_a_call_without_a_library_raises_with_the_reason(in_process: Callable[..., None]) -> None:
    in_process("""
os.environ["COMPILED_DILATED_NATIVE"] = "off"
try:
    native.native(q, k, v, None, None, [3], 0.5, 0, None, True)
except build.NativeUnavailable as error:
    assert "COMPILED_DILATED_NATIVE=off" in str(error)
else:
    raise AssertionError
""")


MAIN = """
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

int main(int, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) return std::cerr << dlerror() << "\\n", 1;
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const auto q = at::randn({2, 4, 9, 8}), k = at::randn({2, 2, 7, 8}), v = at::randn({2, 2, 7, 6});
  const auto results = loader.run({q, k, v, at::ones({2, 7}, at::kBool), at::arange(2)});
  const auto expected = 4 * (q.narrow(3, 0, 1) + v.repeat_interleave(2, 1).narrow(2, 0, 1));
  const float lse = results[1][1][3][8].item<float>();
  std::cout << at::allclose(results[0], expected) << " " << lse << "\\n";
}
"""


@pytest.mark.slow
def test_a_package_runs_without_python(in_process: Callable[..., None], tmp_path: Path) -> None:
    in_process(COMPILED, str(tmp_path / "model.pt2"), str(tmp_path / "package.pt2"))
    library, package = str(tmp_path / "kernel.so"), str(tmp_path / "package.pt2")
    write = "from compiled_dilated.native import cpp; cpp.write(Path(sys.argv[1]), 'native')"
    in_process(write, library)
    command = [program_of(MAIN, tmp_path), library, package]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.stdout == f"1 {2 * (0.5 + 9 + 1 + 0.5):g}\n", process.stderr
