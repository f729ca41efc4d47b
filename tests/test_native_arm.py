"""Native kernels compiled for ARM and run in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from compiled_dilated.native import build, recipes
from tests.support.native_builds import report

pytestmark = pytest.mark.slow

# Compares forward and backward of four masks with a naive loop in double precision; prints the
# largest errors of double and of float.
ARM = r"""
#include <cmath>
#include <cstdio>
#include <vector>
#include "problem.h"
using namespace native;

double next() {  // uniform from -2 to 2
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 40) / (1 << 22) - 2.0;
}

template <class T>
Array array(std::vector<T>& x, int64_t heads, int64_t tokens, int64_t width) {
  Array out;
  const int64_t w = width ? width : 1;
  out.data = x.data(), out.type = sizeof(T) == 8 ? Type::f64 : Type::f32, out.dims = width ? 4 : 3;
  out.sizes[0] = 1, out.sizes[1] = heads, out.sizes[2] = tokens, out.sizes[3] = width;
  out.strides[0] = heads * tokens * w, out.strides[1] = tokens * w;
  out.strides[2] = w, out.strides[3] = 1;
  return out;
}

// The larger number; NaN if any is NaN.
double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }
double worse(double worst, double a, double b) { return larger(worst, std::fabs(a - b)); }

template <class T>
double error(std::vector<int64_t> node, bool (*sees)(int, int), int n, int dim, int value_dim) {
  // 1. The kernel.
  const int narrow = n * dim, wide = n * value_dim;
  std::vector<T> q(narrow), k(narrow), v(wide), out(wide), lse(n);
  std::vector<T> go(wide), gq(narrow), gk(narrow), gv(wide);
  for (auto* x : {&q, &k, &v, &go}) for (T& number : *x) number = static_cast<T>(next());
  Problem problem;
  problem.q = array(q, 1, n, dim), problem.k = array(k, 1, n, dim);
  problem.v = array(v, 1, n, value_dim);
  problem.out = array(out, 1, n, value_dim), problem.lse = array(lse, 1, n, 0);
  problem.code = {1, -1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1};
  problem.code.insert(problem.code.end(), node.begin(), node.end());
  problem.code.push_back(0);
  problem.scale = 0.4, problem.q_offsets = {0};
  forward(problem, false);
  Gradients gradients;
  gradients.grad_out = array(go, 1, n, value_dim);
  gradients.grad_q = array(gq, 1, n, dim), gradients.grad_k = array(gk, 1, n, dim);
  gradients.grad_v = array(gv, 1, n, value_dim);
  backward(problem, gradients);
  // 2. A naive loop over queries.
  double worst = 0;
  std::vector<double> dq(n * dim), dk(n * dim), dv(n * value_dim);
  for (int i = 0; i < n; ++i) {
    std::vector<double> weights(n), result(value_dim);
    double total = 0, delta = 0;
    for (int j = 0; j < n; ++j) {
      double score = 0;
      for (int d = 0; d < dim; ++d) score += double(q[i * dim + d]) * k[j * dim + d];
      total += weights[j] = sees(i, j) ? std::exp(0.4 * score) : 0;
    }
    for (int j = 0; j < n; ++j)
      for (int d = 0; d < value_dim; ++d) result[d] += weights[j] / total * v[j * value_dim + d];
    worst = worse(worst, std::log(total), lse[i]);
    for (int d = 0; d < value_dim; ++d) {
      worst = worse(worst, result[d], out[i * value_dim + d]);
      delta += result[d] * go[i * value_dim + d];
    }
    for (int j = 0; j < n; ++j) {
      double product = 0;
      for (int d = 0; d < value_dim; ++d) {
        product += double(go[i * value_dim + d]) * v[j * value_dim + d];
        dv[j * value_dim + d] += weights[j] / total * go[i * value_dim + d];
      }
      const double grad = 0.4 * weights[j] / total * (product - delta);
      for (int d = 0; d < dim; ++d) dq[i * dim + d] += grad * k[j * dim + d];
      for (int d = 0; d < dim; ++d) dk[j * dim + d] += grad * q[i * dim + d];
    }
  }
  for (int i = 0; i < n * dim; ++i) worst = worse(worse(worst, dq[i], gq[i]), dk[i], gk[i]);
  for (int i = 0; i < n * value_dim; ++i) worst = worse(worst, dv[i], gv[i]);
  return worst;
}

bool causal(int i, int j) { return j <= i; }
bool window(int i, int j) { return j - i >= -20 && j - i <= 4; }
bool segments(int i, int j) { return i / 25 == j / 25; }
bool dilated(int i, int j) { return std::abs(i - j) <= 30 && (i - j) % 3 == 0; }

int main() {
  double wide = 0, narrow = 0;
  for (int n : {1, 17, 130})
    for (int dim : {3, 16, 33}) {
      const auto check = [&](std::vector<int64_t> node, bool (*sees)(int, int)) {
        wide = larger(wide, error<double>(node, sees, n, dim, dim + 4));
        narrow = larger(narrow, error<float>(node, sees, n, dim, dim + 4));
      };
      check({4, 0}, causal);
      check({5, 3, 20, 4, 1}, window);
      check({6, 1, 25}, segments);
      check({5, 3, 30, 30, 3}, dilated);
    }
  std::printf("%g %g\n", wide, narrow);
}
"""
# Sources that need torch.
OPERATORS = ("operators.cpp", "inputs.cpp")


def test_arm_gives_the_same(tmp_path: Path) -> None:
    """All sources but the operators run in an emulator of ARM."""
    emulator, compiler = shutil.which("qemu-aarch64"), shutil.which("aarch64-linux-gnu-g++")
    if emulator is None or compiler is None:
        pytest.skip(
            "needs qemu-aarch64 and aarch64-linux-gnu-g++ "
            "(Debian: qemu-user, g++-aarch64-linux-gnu)"
        )
    main = tmp_path / "main.cpp"
    main.write_text(ARM)
    sources = [path for path in sorted(build.SOURCES.glob("*.cpp")) if path.name not in OPERATORS]
    # GCC 12 has an internal error on the driver at -O3.
    units = [(path, "-O3") for path in sources] + [(main, "-O1")]
    objects = []
    for path, level in units:
        output = str(tmp_path / f"{path.stem}.o")
        command = [compiler, *recipes.FLAGS, level, f"-I{build.SOURCES}", "-c", str(path)]
        process = subprocess.run(
            [*command, "-o", output], capture_output=True, text=True, timeout=600
        )
        assert process.returncode == 0, f"{path.name}: {process.stderr[-4000:]}"
        objects.append(output)
    program = str(tmp_path / "main")
    subprocess.run([compiler, "-static", *objects, "-o", program, "-pthread"], check=True)
    process = subprocess.run([emulator, program], capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, report(process)
    wide, narrow = map(float, process.stdout.split())
    print(f"largest errors on ARM: {wide:.1e} in float64, {narrow:.1e} in float32")
    assert wide < 1e-12
    assert narrow < 3e-5
