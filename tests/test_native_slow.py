"""The native kernels built in other ways: with sanitizers, and for other machines. Each is a process of its own.

The same table of cases, judged by the reference in float64.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.native import build, recipes
from tests.cases import CASES
from tests.support.native import (
    FEW_HEADS,
    FLOATS,
    Problem,
    assert_near,
    check_threads,
    counts_of,
    executed,
    normal,
    problem_of,
    ragged,
    reference_results,
    tolerance,
    work_of,
)
from tests.support.native_tampering import TAMPERING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and Linux"
    ),
]

QUICK_TESTS = tuple(
    f"tests/test_native_{subject}.py"
    for subject in (
        "threads",
        "counts",
        "sizes",
        "strides",
        "data",
        "nonfinite",
        "accuracy",
        "tampering",
    )
)
TABLE = "from tests.test_native_slow import check_table; check_table()"


def check_table(every: int = 1) -> None:
    """Results and gradients of the whole table in every dtype, at odd lengths and offsets, with numbers that are not finite."""
    for number, case in enumerate(CASES[::every]):
        n = case.lengths[-1]
        for dtype in FLOATS:
            shapes = [None, (n // 2, n, n // 3)] if case.crossed and n < 400 else [None]
            for shape in shapes:
                problem, inputs = problem_of(case, n, dtype, shape)
                assert_near(
                    problem.results(),
                    reference_results(case.program(n), problem, inputs.data),
                    f"{case} {n} {dtype} {shape}",
                )
        problem, _ = problem_of(case, min(case.lengths), FLOATS[number % 4])
        problem.results()
        assert executed(problem_of(case, n, torch.float32)[0]) == counts_of(
            problem_of(case, n, torch.float32)[0]
        )
        for x in (problem.k, problem.v):
            x[:, :, ::7] = math.nan
        problem.results()
    check_sizes()
    check_merges()
    check_functions()
    print("all near")


def check_sizes() -> None:
    """Widths that are whole vectors or not, lengths that are whole tiles or not."""
    for dtype in FLOATS:
        for head_dim, value_dim in (
            (1, 1),
            (3, 256),
            (31, 33),
            (64, 64),
            (96, 17),
            (255, 128),
            (256, 256),
        ):
            for q_len, kv_len, q_offset in ((1, 1, 0), (65, 130, 40), (33, 15, 300)):
                mask, problem = ragged(dtype, head_dim, value_dim, q_len, kv_len, q_offset)
                assert_near(
                    problem.results(),
                    reference_results(mask, problem),
                    f"{dtype} {head_dim} {value_dim} {q_len}",
                )


def check_merges() -> None:
    """Keys in parts, some with numbers that are not finite."""
    mask = masks.window(20, 3)
    for dtype in FLOATS:
        _, problem = ragged(dtype, 24, 20, 100, 100, 0, mask)
        for bad in (0.0, math.nan):
            k = problem.k.clone()
            k[0, 0, 90] += bad
            out, lse = (
                problem.v.new_zeros(2, 4, 100, 20),
                torch.full_like(problem.grad_lse, -math.inf),
            )  # type: ignore[arg-type]
            for start, stop in ((0, 30), (30, 100)):
                torch.ops.compiled_dilated.native_merge(
                    out, lse, problem.q, k[:, :, start:stop], problem.v[:, :, start:stop], None, None, work_of(mask, 4).code,
                    problem.scale, -start,
                )  # fmt: skip
            whole = Problem(
                problem.work, problem.q, k, problem.v, problem.grad_out, None, scale=problem.scale
            )
            assert_near(
                [out, lse],
                list(cd.reference(mask, whole.q, k, whole.v, scale=whole.scale, return_lse=True)),
            )


def check_functions() -> None:
    """Masks and scores of functions with tensors that learn."""
    table = normal(4, 400, seed=9)

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return torch.tanh(s) * 3 + table[h, torch.clamp(q - kv + 200, 0, 399)] - 0.01 * abs(q - kv)

    def seen(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q - kv) % (h + 2) == b

    mask = masks.from_mod(seen, within=masks.window(60)) | masks.sinks(2)
    for dtype in FLOATS:
        results = []
        ways = (
            (cd.compile(mask, lowering="native"), dtype),
            (lambda *x, **y: cd.reference(mask, *x, **y), torch.float64),
        )
        for attention, kind in ways:
            inputs = [
                normal(2, heads, 150, 16, dtype=dtype, seed=heads).to(kind).requires_grad_()
                for heads in (4, 2, 1)
            ]
            inputs[2] = inputs[2].expand(2, 2, 150, 16)
            table = table.to(torch.promote_types(kind, torch.float32)).detach().requires_grad_()
            out, lse = attention(*inputs, score_mod=score, return_lse=True)
            alive = lse != -math.inf
            grads = torch.autograd.grad(
                (out.double().sum() + lse[alive].double().sum()), [*inputs, table]
            )
            results.append([out.detach(), lse.detach(), *grads])
        assert_near(results[0][:5], [x.double() for x in results[1][:5]], dtype)
        learned, right = results[0][5].double(), results[1][5].double()
        assert (learned - right).abs().max() <= tolerance(dtype) * right.abs().max(), dtype


def wrapper(path: Path, *more: str) -> str:
    """A compiler with more flags, which come last and so win."""
    path.write_text(f'#!/bin/sh\nexec g++ "$@" {" ".join(more)}\n')
    path.chmod(0o700)
    return str(path)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return f"ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-12000:]}"


# Sanitizers -----------------------------------------------------------------------------------------------------------------


# Before a sanitizer is loaded, which would slow the compiler down.
BUILD = """
from compiled_dilated.native import build, recipes
core = build.library(part="core")
for part in sorted(set(recipes.PARTS.values())):
    build.library(part=part, core=core)
"""


def sanitizer(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of processes whose kernels check every address and every undefined step."""
    folder = tmp_path_factory.mktemp("sanitized")
    libraries = [sanitizer("libasan.so"), sanitizer("libubsan.so")]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("this compiler brings no sanitizers")
    flags = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1", "-O1")
    built = {
        "CXX": wrapper(folder / "compiler", *flags),
        "COMPILED_DILATED_CACHE": str(folder / "cache"),
    }
    subprocess.run(
        [sys.executable, "-c", BUILD],
        env={**os.environ, **built},
        cwd=Path(__file__).parents[1],
        check=True,
    )
    return {
        **built,
        "LD_PRELOAD": ":".join(os.path.realpath(path) for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=0",
        "OMP_NUM_THREADS": "2",
    }


def assert_clean(done: subprocess.CompletedProcess[str], ending: str) -> None:
    assert "runtime error" not in done.stderr, said(done)
    assert "AddressSanitizer" not in done.stderr, said(done)
    assert done.returncode == 0, said(done)
    assert done.stdout.endswith(ending), said(done)


def test_sanitizers_report_nothing(fresh_python: Any, sanitized: dict[str, str]) -> None:
    assert_clean(fresh_python("-c", TABLE.replace("()", "(6)"), **sanitized), "all near\n")


def test_sanitizers_report_nothing_of_tampered_code(
    fresh_python: Any, sanitized: dict[str, str]
) -> None:
    """Sums of numbers from elsewhere may overflow, which harms nothing: addresses are what counts."""
    done = fresh_python("-c", TAMPERING, "7", "500", **sanitized)
    assert "AddressSanitizer" not in done.stderr, said(done)
    assert done.stdout.endswith("alive\n"), said(done)
    print(
        "undefined steps:",
        *sorted({line for line in done.stderr.splitlines() if "runtime error" in line}),
        sep="\n",
    )


# Other machines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["haswell", "x86-64-v2", "x86-64", "skylake-avx512"])
def test_other_vectors_give_the_same(machine: str, fresh_python: Any, tmp_path: Path) -> None:
    """AVX2, SSE and AVX-512 without tiles."""
    done = fresh_python(
        "-c",
        TABLE,
        CXX=wrapper(tmp_path / "compiler", f"-march={machine}"),
        COMPILED_DILATED_CACHE=str(tmp_path / "cache"),
    )
    if "Illegal instruction" in done.stderr or done.returncode == -4:
        pytest.skip(f"this machine is no {machine}")
    assert done.returncode == 0, said(done)
    assert done.stdout.endswith("all near\n"), said(done)


@pytest.mark.parametrize("machine", ["haswell", "x86-64-v2"])
def test_the_quick_tests_of_other_vectors(machine: str, tmp_path: Path) -> None:
    """The quick tests of the native operators with kernels compiled for another machine.

    Without FMA every product is rounded: errors are then not compared with torch's, whose kernels
    keep this machine's FMA.
    """
    others = ["-k", "not errors_are_no_larger_than_torchs"] if machine == "x86-64-v2" else []
    environment = {
        **os.environ,
        "CXX": wrapper(tmp_path / "compiler", f"-march={machine}"),
        "COMPILED_DILATED_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK_TESTS, *others],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


# More of the quick tests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_do_not_change_a_bit_of_any_case(
    case: Any, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    check_threads(problem_of(case, max(case.lengths), dtype)[0], threads, (2, 3, 7), 3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FEW_HEADS)
def test_long_sequences_of_one_head(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    n = 3280
    mask = FEW_HEADS[name](n)
    q, k, v, grad_out = (normal(1, 1, n, 32, dtype=dtype, seed=seed) for seed in range(4))
    check_threads(Problem(work_of(mask, 1), q, k, v, grad_out, None), threads, (2, 3, 7), 3)


@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_tampered_codes(seed: int, fresh_python: Any) -> None:
    done = fresh_python("-c", TAMPERING, str(seed), "4000")
    assert done.stdout.endswith("alive\n"), said(done)


# ARM ------------------------------------------------------------------------------------------------------------------------

ARM = r"""
#include <cmath>
#include <cstdio>
#include <vector>
#include "problem.h"
using namespace native;

double next() {  // evenly from -2 to 2
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 40) / (1 << 22) - 2.0;
}

template <class T>
Array array(std::vector<T>& x, int64_t heads, int64_t tokens, int64_t width) {
  Array out;
  out.data = x.data(), out.type = sizeof(T) == 8 ? Type::f64 : Type::f32, out.dims = width ? 4 : 3;
  const int64_t w = width ? width : 1;
  out.sizes[0] = 1, out.sizes[1] = heads, out.sizes[2] = tokens, out.sizes[3] = width;
  out.strides[0] = heads * tokens * w, out.strides[1] = tokens * w, out.strides[2] = w, out.strides[3] = 1;
  return out;
}

template <class T>
double error(std::vector<int64_t> node, bool (*sees)(int, int), int n, int dim, int value_dim) {
  const int narrow = n * dim, wide = n * value_dim;
  std::vector<T> q(narrow), k(narrow), v(wide), out(wide), lse(n), go(wide), gq(narrow), gk(narrow), gv(wide);
  for (auto* x : {&q, &k, &v, &go}) for (T& number : *x) number = static_cast<T>(next());
  Problem problem;
  problem.q = array(q, 1, n, dim), problem.k = array(k, 1, n, dim), problem.v = array(v, 1, n, value_dim);
  problem.out = array(out, 1, n, value_dim), problem.lse = array(lse, 1, n, 0);
  problem.code = {1, -1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1};
  problem.code.insert(problem.code.end(), node.begin(), node.end());
  problem.code.push_back(0);
  problem.scale = 0.4, problem.q_offsets = {0};
  forward(problem, false);
  Gradients gradients;
  gradients.grad_out = array(go, 1, n, value_dim);
  gradients.grad_q = array(gq, 1, n, dim), gradients.grad_k = array(gk, 1, n, dim), gradients.grad_v = array(gv, 1, n, value_dim);
  backward(problem, gradients);
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
    for (int j = 0; j < n; ++j) for (int d = 0; d < value_dim; ++d) result[d] += weights[j] / total * v[j * value_dim + d];
    worst = std::fmax(worst, std::fabs(std::log(total) - lse[i]));
    for (int d = 0; d < value_dim; ++d) {
      worst = std::fmax(worst, std::fabs(result[d] - out[i * value_dim + d]));
      delta += result[d] * go[i * value_dim + d];
    }
    for (int j = 0; j < n; ++j) {
      double product = 0;
      for (int d = 0; d < value_dim; ++d) {
        product += double(go[i * value_dim + d]) * v[j * value_dim + d];
        dv[j * value_dim + d] += weights[j] / total * go[i * value_dim + d];
      }
      const double grad = 0.4 * weights[j] / total * (product - delta);
      for (int d = 0; d < dim; ++d) dq[i * dim + d] += grad * k[j * dim + d], dk[j * dim + d] += grad * q[i * dim + d];
    }
  }
  for (int i = 0; i < n * dim; ++i) worst = std::fmax(worst, std::fmax(std::fabs(dq[i] - gq[i]), std::fabs(dk[i] - gk[i])));
  for (int i = 0; i < n * value_dim; ++i) worst = std::fmax(worst, std::fabs(dv[i] - gv[i]));
  return worst;
}

int main() {
  double wide = 0, narrow = 0;
  for (int n : {1, 17, 130})
    for (int dim : {3, 16, 33}) {
      const auto check = [&](std::vector<int64_t> node, bool (*sees)(int, int)) {
        wide = std::fmax(wide, error<double>(node, sees, n, dim, dim + 4));
        narrow = std::fmax(narrow, error<float>(node, sees, n, dim, dim + 4));
      };
      check({4, 0}, [](int i, int j) { return j <= i; });
      check({5, 3, 20, 4, 1}, [](int i, int j) { return j - i >= -20 && j - i <= 4; });
      check({6, 1, 25}, [](int i, int j) { return i / 25 == j / 25; });
      check({5, 3, 30, 30, 3}, [](int i, int j) { return std::abs(i - j) <= 30 && (i - j) % 3 == 0; });
    }
  std::printf("%g %g\n", wide, narrow);
}
"""


def test_arm_gives_the_same(tmp_path: Path) -> None:
    """Everything but the operators, compiled for ARM and run in an emulator; a naive loop in double judges."""
    emulator, compiler = shutil.which("qemu-aarch64"), shutil.which("aarch64-linux-gnu-g++")
    if emulator is None or compiler is None:
        pytest.skip(
            "needs qemu-aarch64 and aarch64-linux-gnu-g++ (Debian: qemu-user, g++-aarch64-linux-gnu)"
        )
    (tmp_path / "main.cpp").write_text(ARM)
    flags = recipes.FLAGS
    sources = [
        path
        for path in sorted(build.SOURCES.glob("*.cpp"))
        if path.name not in ("operators.cpp", "inputs.cpp")
    ]
    # Of the driver GCC 12 has an internal error at -O3.
    units = [(path, "-O3") for path in sources] + [(tmp_path / "main.cpp", "-O1")]
    objects = []
    for path, level in units:
        objects.append(str(tmp_path / f"{path.stem}.o"))
        command = [
            compiler,
            *flags,
            level,
            f"-I{build.SOURCES}",
            "-c",
            str(path),
            "-o",
            objects[-1],
        ]
        built = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert built.returncode == 0, f"{path.name}: {built.stderr[-4000:]}"
    program = str(tmp_path / "main")
    subprocess.run([compiler, "-static", *objects, "-o", program, "-pthread"], check=True)
    done = subprocess.run([emulator, program], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, said(done)
    wide, narrow = map(float, done.stdout.split())
    print(f"largest errors on ARM: {wide:.1e} in float64, {narrow:.1e} in float32")
    assert wide < 1e-12
    assert narrow < 3e-5
