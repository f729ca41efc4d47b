"""Users' functions as tapes of the native kernel, judged by their graphs in torch, and what a mask's tape says of blocks."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiled_dilated.mods import Graph, over_pairs, trace_mask_mod, trace_score_mod
from compiled_dilated.native import expressions, tape
from compiled_dilated.native.build import _FLAGS, SOURCES, NativeUnavailable, _compiler
from compiled_dilated.native.expressions import OPERATIONS, TYPES, Untranslatable
from compiled_dilated.native.tape import encode
from tests import functions
from tests.functions import MASK_MODS, SCORE_MODS, Parameters
from tests.test_functions import reductions

N, HEADS = 40, 4
B, H = 1, 2
EMPTY, PARTIAL, FULL = 0, 1, 2

DRIVER = r"""
#include <cstring>
#include <stdexcept>
#include <string>
#include "functions.h"
using namespace native;
static FunctionRoom room;
static std::string said;
template <class F> int guarded(const F& f) {
  try { f(); return 0; } catch (const std::runtime_error& error) { said = error.what(); return 1; }
}
static Function read(const int64_t* code, int64_t count, const Array* operands, int64_t operand_count) {
  const int64_t* at = code;
  Function function = read_function(at, code + count);
  if (at != code + count) throw std::runtime_error("numbers are left over");
  check_operands(function, operands, operand_count);
  return function;
}
#define OF const int64_t* code, int64_t count, const Array* operands, int64_t operand_count, const int32_t* q, int lanes, \
           const int32_t* k, int keys, int64_t b, int64_t h
#define TILE {b, h, q, lanes, k, keys}
extern "C" {
#define SHOWN __attribute__((visibility("default")))
SHOWN const char* error_text() { return said.c_str(); }
SHOWN int run_mask(OF, uint8_t* seen) {
  return guarded([&] { mask(read(code, count, operands, operand_count), operands, TILE, seen, room); });
}
SHOWN int run_score_f32(OF, float* scores, int ld) {
  return guarded([&] { score(read(code, count, operands, operand_count), operands, TILE, scores, ld, room); });
}
SHOWN int run_score_f64(OF, double* scores, int ld) {
  return guarded([&] { score(read(code, count, operands, operand_count), operands, TILE, scores, ld, room); });
}
SHOWN int run_backward_f32(OF, const float* scores, float* grads, int ld, float* const* sums) {
  return guarded([&] {
    score_backward(read(code, count, operands, operand_count), operands, TILE, scores, grads, ld, sums, room);
  });
}
SHOWN int run_backward_f64(OF, const double* scores, double* grads, int ld, double* const* sums) {
  return guarded([&] {
    score_backward(read(code, count, operands, operand_count), operands, TILE, scores, grads, ld, sums, room);
  });
}
SHOWN int run_classify(const int64_t* code, int64_t count, const Array* operands, int64_t operand_count, int64_t b, int64_t h,
                       int64_t q0, int64_t q1, int64_t k0, int64_t k1, int* verdict) {
  return guarded([&] { *verdict = classify(read(code, count, operands, operand_count), operands, b, h, q0, q1, k0, k1); });
}
SHOWN void repeat_score(OF, float* scores, int ld, int times) {
  const Function function = read(code, count, operands, operand_count);
  for (int i = 0; i < times; ++i) score(function, operands, TILE, scores, ld, room);
}
SHOWN void repeat_backward(OF, const float* scores, float* grads, int ld, float* const* sums, int times) {
  const Function function = read(code, count, operands, operand_count);
  for (int i = 0; i < times; ++i) score_backward(function, operands, TILE, scores, grads, ld, sums, room);
}
SHOWN void repeat_mask(OF, uint8_t* seen, int times) {
  const Function function = read(code, count, operands, operand_count);
  for (int i = 0; i < times; ++i) mask(function, operands, TILE, seen, room);
}
}
"""


class Array(ctypes.Structure):
    """native::Array."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("type", ctypes.c_int), ("dims", ctypes.c_int),
        ("sizes", ctypes.c_int64 * 8), ("strides", ctypes.c_int64 * 8),
    )  # fmt: skip

    @staticmethod
    def of(x: Tensor) -> Array:
        return Array(x.data_ptr(), TYPES[x.dtype], x.dim(), (ctypes.c_int64 * 8)(*x.shape), (ctypes.c_int64 * 8)(*x.stride()))


class Native:
    """The functions of the driver over tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.error_text.restype = ctypes.c_char_p

    def __call__(self, name: str, code: Sequence[int], operands: Sequence[Tensor], *arguments: Any) -> None:
        numbers = (ctypes.c_int64 * len(code))(*code)
        arrays = (Array * max(1, len(operands)))(*map(Array.of, operands))
        passed = [numbers, ctypes.c_int64(len(code)), arrays, ctypes.c_int64(len(operands))]
        for argument in arguments:
            passed.append(ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else argument)
        if getattr(self.library, name)(*passed):
            raise RuntimeError(self.library.error_text().decode())

    def tile(self, q: Tensor, k: Tensor, b: int = B, h: int = H) -> tuple[Any, ...]:
        return q, len(q), k, len(k), ctypes.c_int64(b), ctypes.c_int64(h)

    def mask(self, graph: Graph, operands: Sequence[Tensor], q: Tensor, k: Tensor) -> Tensor:
        """Of all pairs, (queries, keys)."""
        seen = torch.full((len(k), len(q)), 7, dtype=torch.uint8)
        self("run_mask", encode(graph, operands), operands, *self.tile(q, k), seen)
        assert seen.max() <= 1
        return seen.bool().T

    def score(self, graph: Graph, operands: Sequence[Tensor], scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Of scores (queries, keys) the new ones."""
        padded = torch.full((len(k), len(q) + 3), 5.0, dtype=scores.dtype)
        padded[:, : len(q)] = scores.T
        self(f"run_score_{kind(scores)}", encode(graph, operands), operands, *self.tile(q, k), padded, len(q) + 3)
        assert (padded[:, len(q) :] == 5).all()
        return padded[:, : len(q)].T

    def backward(
        self, graph: Graph, operands: Sequence[Tensor], scores: Tensor, grad: Tensor, q: Tensor, k: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the scores, and of the operands that learn."""
        transposed, grads = scores.T.contiguous(), grad.T.contiguous()
        sums = [torch.zeros(x.shape, dtype=scores.dtype) if x.requires_grad else None for x in operands]
        places = (ctypes.c_void_p * max(1, len(sums)))(*(None if x is None else x.data_ptr() for x in sums))
        code = encode(graph, operands)
        self(f"run_backward_{kind(scores)}", code, operands, *self.tile(q, k), transposed, grads, len(q), places)
        return grads.T, sums

    def classify(self, graph: Graph, operands: Sequence[Tensor], q: range, k: range) -> int:
        verdict = ctypes.c_int()
        bounds = map(ctypes.c_int64, (B, H, q[0], q[-1], k[0], k[-1]))
        self("run_classify", encode(graph, operands), operands, *bounds, ctypes.byref(verdict))
        return verdict.value


def kind(x: Tensor) -> str:
    return "f32" if x.dtype == torch.float32 else "f64"


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    try:
        compiler = _compiler()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    room = tmp_path_factory.mktemp("tape")
    (room / "driver.cpp").write_text(DRIVER)
    units = [room / "driver.cpp", SOURCES / "functions.cpp", SOURCES / "function_bounds.cpp", SOURCES / "function_loops.cpp"]
    command = [
        *compiler,
        "-O3",
        *_FLAGS,
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{SOURCES}",
        "-shared",
        *units,
        "-o",
        room / "driver.so",
    ]
    subprocess.run(list(map(str, command)), check=True)
    return Native(ctypes.CDLL(str(room / "driver.so")))


def positions(count: int, seed: int, n: int = N) -> Tensor:
    """Ascending positions, some more than once."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n, (count,), generator=generator).sort().values.to(torch.int32).contiguous()


def arguments(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """b, h, q and kv as over_pairs takes them."""
    return torch.tensor([[B]]), torch.tensor([[H]]), q.long()[:, None], k.long()[None, :]


def same(got: Tensor, want: Tensor, tolerance: float, why: str = "") -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda message: f"{why}: {message}")


def close(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 2e-5


def compare_scores(
    native: Native,
    mod: Callable[..., Any],
    lanes: int,
    keys: int,
    dtype: torch.dtype,
    seed: int = 0,
    scores: Tensor | None = None,
) -> None:
    """Values and gradients of a score_mod against autograd of its graph."""
    graph, operands = trace_score_mod(mod, dtype)
    q, k = positions(lanes, seed), positions(keys, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    if scores is None:
        scores = torch.randn(lanes, keys, generator=generator, dtype=torch.float64).to(dtype)
    x = scores.clone().requires_grad_()
    want = over_pairs(lambda *scalars: graph.scalar(operands, *scalars), x, *arguments(q, k)).broadcast_to(x.shape).to(dtype)
    same(native.score(graph, operands, scores, q, k), want.detach(), close(dtype), "scores")
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(dtype)
    grad[0, 0] = 0
    learned = [operand for operand in operands if operand.requires_grad]
    if not want.requires_grad:
        wanted = [torch.zeros_like(x), *map(torch.zeros_like, learned)]
    else:
        wanted = list(torch.autograd.grad(want, (x, *learned), grad, allow_unused=True, materialize_grads=True))
    of_scores, sums = native.backward(graph, operands, scores, grad, q, k)
    same(of_scores, wanted[0], close(dtype), "gradient of the scores")
    for got, expected in zip((total for total in sums if total is not None), wanted[1:], strict=True):
        same(got, expected.to(dtype), 20 * max(close(dtype), close(expected.dtype)), "gradient of an operand")


DTYPES = st.sampled_from((torch.float32, torch.float64))
SIZES = st.sampled_from(((16, 40), (1, 1), (8, 5), (64, 128), (40, 13), (4, 128), (64, 1), (24, 40)))


# What users write -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(native: Native, name: str, dtype: torch.dtype) -> None:
    for lanes, keys in ((16, 40), (7, 3)):
        compare_scores(native, SCORE_MODS[name](Parameters.of(HEADS, N, dtype)), lanes, keys, dtype)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(SCORE_MODS)), min_size=1, max_size=3, unique=True), DTYPES, DTYPES, SIZES, st.integers(0, 9)
)
def test_score_mods_one_after_the_other(
    native: Native, names: list[str], dtype: torch.dtype, of_tables: torch.dtype, size: tuple[int, int], seed: int
) -> None:
    compare_scores(native, functions.score_mod(names, Parameters.of(HEADS, N, of_tables)), *size, dtype, seed)


@pytest.mark.parametrize("name", reductions(torch.zeros(1, 1)))
def test_reductions(native: Native, name: str) -> None:
    rows = torch.randn(N, 5, dtype=torch.float64, requires_grad=True)
    compare_scores(native, reductions(rows)[name], 24, 40, torch.float64)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(sorted(MASK_MODS)), min_size=1, max_size=3, unique=True), st.sampled_from(("and", "or")), SIZES)
def test_mask_mods_and_their_blocks(native: Native, names: list[str], join: str, size: tuple[int, int]) -> None:
    compare_masks(native, functions.mask_mod(names, Parameters.of(HEADS, N), join), *size)


def compare_masks(native: Native, mod: Callable[..., Any], lanes: int, keys: int) -> int:
    """Answers for pairs are the graph's; verdicts on blocks agree with them. Returns how many blocks are decided."""
    graph, operands = trace_mask_mod(mod)
    q, k = positions(lanes, 0), positions(keys, 1)
    want = over_pairs(lambda *scalars: graph.scalar(operands, *scalars), *arguments(q, k)).broadcast_to(lanes, keys)
    assert torch.equal(native.mask(graph, operands, q, k), want)
    whole = torch.arange(N, dtype=torch.int32)
    everywhere = native.mask(graph, operands, whole, whole)
    decided = 0
    blocks = [range(at, at + size) for size in (1, 2, 5, 8) for at in range(0, N, size)]
    for rows, columns in itertools.product(blocks, blocks):
        if len(rows) != len(columns):
            continue
        part = everywhere[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        verdict = native.classify(graph, operands, rows, columns)
        assert verdict != EMPTY or not part.any()
        assert verdict != FULL or part.all()
        decided += verdict != PARTIAL
    return decided


BANDS: dict[str, tuple[Callable[..., Any], int]] = {
    "causal": (lambda b, h, i, j: i >= j, 64 - 8),
    "window": (lambda b, h, i, j: (i - j).abs() < 8, 64 - 22),
    "segments of positions": (lambda b, h, i, j: i // 8 == j // 8, 64),
    "by quotient and rest": (lambda b, h, i, j: (i // 8 >= j // 8) & (j % 8 < 4), 28),
    "float": (lambda b, h, i, j: (i - j).abs() * 0.125 <= 1.0, 64 - 22),
    "never": (lambda b, h, i, j: (i < 0) | (j > 1000), 64),
}


@pytest.mark.parametrize("name", BANDS)
def test_blocks_that_intervals_decide(native: Native, name: str) -> None:
    """Of 64 blocks of 8 x 8 at least so many."""
    graph, operands = trace_mask_mod(BANDS[name][0])
    blocks = [range(at, at + 8) for at in range(0, 64, 8)]
    verdicts = [native.classify(graph, operands, q, k) for q in blocks for k in blocks]
    assert sum(verdict != PARTIAL for verdict in verdicts) >= BANDS[name][1]
    compare_masks(native, BANDS[name][0], 16, 40)


def test_blocks_of_tables(native: Native) -> None:
    """Entries within a block that are all equal decide it."""
    ids = torch.arange(N) // 8
    graph, operands = trace_mask_mod(lambda b, h, i, j: ids[i] == ids[j])
    assert native.classify(graph, operands, range(8, 16), range(8, 16)) == FULL
    assert native.classify(graph, operands, range(8, 16), range(16, 24)) == EMPTY
    assert native.classify(graph, operands, range(8, 17), range(8, 16)) == PARTIAL


# Operators, one by one ------------------------------------------------------------------------------------------------------

POINTS = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 1e-8, -3e-5, 0.3, 7.5, -9.25, 19.0, 25.0, -40.0, 88.5, -100.0, 1e-40, 3e30)
EXTREMES = (math.inf, -math.inf, math.nan)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            "abs", "neg", "sign", "exp", "exp2", "expm1", "sin", "cos", "tan", "sinh", "cosh", "atan", "tanh", "sigmoid", "erf",
            "floor", "ceil", "round", "trunc", "relu", "square", "isnan", "isinf", "isfinite", "reciprocal",
        )
    },
    **{
        name: getattr(torch.nn.functional, name)
        for name in ("softplus", "silu", "gelu", "elu", "leaky_relu", "hardtanh", "relu6")
    },
    "gelu of tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 1e-3).rsqrt(),
    "log": lambda x: x.abs().log(),
    "log of negatives": torch.log,
    "log2": lambda x: x.abs().log2(),
    "log10": lambda x: x.abs().log10(),
    "log1p": lambda x: x.abs().log1p(),
    "asin": lambda x: torch.asin(x.clamp(-0.9, 0.9)),
    "acos": lambda x: torch.acos(x.clamp(-0.9, 0.9)),
    "clamp": lambda x: x.clamp(-1, 2),
    "clamp min": lambda x: x.clamp(min=0.5),
    "squares": lambda x: x**2 + x**3,
    "powers": lambda x: x.abs() ** 1.5 + (x.abs() + 0.1) ** -2,
    "power of tensors": lambda x: (x.abs() + 0.5) ** torch.sigmoid(x),
    "floor divide": lambda x: x // 0.75,
    "remainder": lambda x: x % 0.75,
    "fmod": lambda x: torch.fmod(x, -1.5),
    "divide to floor": lambda x: torch.div(x, 3, rounding_mode="floor"),
    "divide to zero": lambda x: torch.div(x, 3, rounding_mode="trunc"),
    "maximum": lambda x: torch.maximum(x, torch.square(x)),
    "minimum": lambda x: torch.minimum(x, torch.square(x)),
    "atan2": lambda x: torch.atan2(x, x + 2),
    "comparisons": lambda x: (x < 1).to(x.dtype) + (x >= 0.5) + (x != x.abs()) * 2 + (x == 1) * (x <= 2) + (x > 0),
    "where": lambda x: torch.where((x > 0) & (x < 8) | ~(x > -20), x * 2, -x),
    "logical": lambda x: torch.where(torch.logical_xor(x > 0, torch.logical_not(x > 2)), x, 3.0),
    "lerp": lambda x: torch.lerp(x, x * x, 0.25),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "masked_fill": lambda x: x.masked_fill(x > 1, -2.0),
    "half": lambda x: (x.half() * 1.5 + 0.1).to(x.dtype),
    "bfloat16": lambda x: (x.bfloat16() * 1.5).to(x.dtype) + x,
    "double": lambda x: x.double().exp().to(x.dtype) * 0.5,
    "whole": lambda x: (x.to(torch.int64) // 3 + x.clamp(-100, 100).to(torch.int32)).to(x.dtype),
    "rsub": lambda x: torch.rsub(x, 2, alpha=3) + torch.sub(x, 1, alpha=2),
    "softmax of three": lambda x: torch.logsumexp(torch.stack([x, x * 0.5, x - 1]), 0),
    "amax": lambda x: torch.stack([x, x.abs(), x * 1, x * 0]).amax(),
    "amin": lambda x: torch.stack([x, x.abs(), x * 2, x * 0]).amin(0),
    "prod": lambda x: torch.stack([x, x + 1, x * 0.5]).prod(),
}  # fmt: skip
# Not compared where x is not finite, as torch's own answers depend on the path; or where the value is an edge of its definition.
FINITE = {
    "whole", "tan", "sin", "cos", "floor divide", "divide to floor", "power of tensors", "softmax of three", "amax", "amin",
    "lerp", "gelu", "gelu of tanh",
}  # fmt: skip
CANCELLING = {"gelu", "gelu of tanh"}
WITHOUT_GRADIENT = {"floor divide"}  # in torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_scores(native: Native, name: str, dtype: torch.dtype) -> None:
    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return FUNCTIONS[name](s).to(dtype)

    points = POINTS if name in FINITE else (*POINTS, *EXTREMES)
    if name in ("whole", "half", "tan", "sin", "cos"):
        points = tuple(x for x in points if not abs(x) > 1e9)
    grid = torch.linspace(-6, 6, 64 - len(points), dtype=dtype)
    scores = torch.cat([torch.tensor(points, dtype=dtype), grid]).reshape(16, 4)
    graph, operands = trace_score_mod(mod, dtype)
    q, k = positions(16, 0), positions(4, 1)
    x = scores.clone().requires_grad_()
    want = over_pairs(lambda *scalars: graph.scalar(operands, *scalars), x, *arguments(q, k)).broadcast_to(x.shape)
    got = native.score(graph, operands, scores, q, k)
    tolerance = 1e-3 if name == "half" else 1e-12 if dtype == torch.float64 else 1e-6
    least = 1e-6 if name in CANCELLING else 1e-38
    torch.testing.assert_close(got, want.detach(), rtol=tolerance, atol=least, equal_nan=True)
    if not want.requires_grad or name in WITHOUT_GRADIENT:
        return
    (wanted,) = torch.autograd.grad(want, x, torch.ones_like(want))
    of_scores, _ = native.backward(graph, operands, scores, torch.ones_like(scores), q, k)
    finite = scores.isfinite() & wanted.isfinite() & (scores.abs() > 1e-30) & (scores.abs() < 60)
    low_precision = name in ("bfloat16", "half")
    same(of_scores[finite], wanted[finite], 1e-2 if low_precision else 1e-9 if dtype == torch.float64 else 3e-5)


WHOLE: dict[str, Callable[..., Any]] = {
    "quotients": lambda b, h, i, j: (i - j) // 3 - (i - j) // -4 + torch.div(i - 20, 7, rounding_mode="trunc"),
    "rests": lambda b, h, i, j: (i - j) % 3 + torch.fmod(i - j, 5) + (j - i) % -7,
    "of varying divisors": lambda b, h, i, j: (i - 20) // (j + 1) + (i - 20) % (j + 1),
    "large": lambda b, h, i, j: (i * 2654435761 + j * 40503) % 1000003 // 7,
    "wraps": lambda b, h, i, j: (i * 2**62 + j * 2**61) >> 50,
    "32 bits": lambda b, h, i, j: (i.to(torch.int32) * 2**28 + j.to(torch.int32) * 2**27) // 1024,
    "8 bits": lambda b, h, i, j: (i.to(torch.int8) * 17 - j.to(torch.uint8) * 3).to(torch.int64),
    "bits": lambda b, h, i, j: (i & j) + (i | 3) * 2 - (i ^ j) + (~i) + (i << 3) + ((j - 20) >> 2),
    "signs": lambda b, h, i, j: (i - j).abs() * (i - j).sign() + torch.maximum(i, j) - torch.minimum(-i, j),
    "clamped": lambda b, h, i, j: (i - j).clamp(-4, 9) * 3 + torch.clamp(i, min=7),
    "powers": lambda b, h, i, j: (i - j) ** 3 + i**2 + j**0,
    "bools": lambda b, h, i, j: ((i > j) + (i > 3)) * ((j > 2) * (i > 1)) + (i > j).to(torch.int64) * 2,
    "sums of bools": lambda b, h, i, j: torch.stack([i > j, j > 7]).sum() + torch.count_nonzero(torch.stack([i - j, i])),
    "means": lambda b, h, i, j: (i * 0.5 - j / 3 + b * h).floor().to(torch.int64),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(native: Native, name: str) -> None:
    compare_scores(native, lambda s, b, h, i, j: s + WHOLE[name](b, h, i, j).double(), 24, 40, torch.float64)
    compare_masks(native, lambda b, h, i, j: WHOLE[name](b, h, i, j) % 3 == 0, 24, 40)


# Look-ups -------------------------------------------------------------------------------------------------------------------


def tables(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    generator = torch.Generator().manual_seed(3)
    a, b3 = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, N), (HEADS, 4, 6))
    )
    weights = torch.randn(3, 3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return {
        "negative indices": lambda s, b, h, i, j: s + a[i - j, -1],
        "transposed": lambda s, b, h, i, j: s * a.T[i][j],
        "slices": lambda s, b, h, i, j: s + a[4:30:2][i % 13, j - N] + a[:, 3][j],
        "flipped": lambda s, b, h, i, j: s + a.flip(0)[i, 1],
        "of a head": lambda s, b, h, i, j: s + b3[h, i % 4, j % 6] * b3[h].sum(),
        "computed tables": lambda s, b, h, i, j: s * (a.exp() * 0.1 + 1)[i, j],
        "unsqueezed": lambda s, b, h, i, j: s + a[None, i, None].squeeze()[j],
        "chosen of computed": lambda s, b, h, i, j: torch.stack([s, s * 2, a[i, j]])[(i + j) % 3],
        "rows by a matrix": lambda s, b, h, i, j: s + torch.dot(weights @ a[i, :3], a[j, 3:6]),
        "whole rows": lambda s, b, h, i, j: s + a[i].mean() * a[:, j].amax(),
        "by tensors": lambda s, b, h, i, j: s + a[torch.stack([i, j]), torch.stack([j, j])].sum(),
        "views": lambda s, b, h, i, j: s + b3.view(HEADS, 24)[h, 5] + b3.reshape(-1)[7],
        "joined": lambda s, b, h, i, j: s + torch.cat([a[i, :2], a[j, :2]]).square().sum(),
        "distances by steps": lambda s, b, h, i, j: s - (a[i, :3] - a[j, :3]).square().sum(dim=0, keepdim=True)[0],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", tables(torch.float32))
def test_tables(native: Native, name: str, dtype: torch.dtype) -> None:
    compare_scores(native, tables(dtype)[name], 24, 40, dtype)


@pytest.mark.parametrize("dtype", [*TYPES])
def test_tables_of_all_dtypes(native: Native, dtype: torch.dtype) -> None:
    """With strides."""
    table = (torch.randn(2 * N, N, generator=torch.Generator().manual_seed(0)) * 9).to(dtype).T[:, ::2]
    compare_scores(native, lambda s, b, h, i, j: (s + table[i, j] * 0.5).double(), 24, 40, torch.float64)
    compare_masks(native, lambda b, h, i, j: table[i, j] > 0, 24, 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_of_16_bits_learn(native: Native, dtype: torch.dtype) -> None:
    table = torch.randn(N, N).to(dtype).requires_grad_()
    graph, operands = trace_score_mod(lambda s, b, h, i, j: s + table[i, j], torch.float32)
    q, k = positions(16, 0), positions(16, 1)
    grad = torch.randn(16, 16)
    _, (total,) = native.backward(graph, operands, torch.randn(16, 16), grad, q, k)
    want = torch.zeros(N, N).index_put((q.long()[:, None], k.long()[None]), grad, accumulate=True)
    assert total is not None
    same(total, want, 1e-6)


def test_sums_of_operands_that_do_not_learn_are_left_out(native: Native) -> None:
    parameters = Parameters.of(HEADS, N, torch.float32)
    table, gain = parameters.table, parameters.gain.detach()
    compare_scores(native, lambda s, b, h, i, j: s * gain + table[i, j], 24, 40, torch.float32)


@pytest.mark.parametrize("index", [lambda i, j: i + 1, lambda i, j: j - N - 1, lambda i, j: i - j * N])
def test_indices_out_of_range_are_errors(native: Native, index: Callable[..., Any]) -> None:
    table = torch.zeros(N)
    graph, operands = trace_score_mod(lambda s, b, h, i, j: s + table[index(i, j)], torch.float32)
    whole = torch.arange(N, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="index out of range"):
        native.score(graph, operands, torch.zeros(N, N), whole, whole)


def test_division_of_whole_numbers_by_zero_is_an_error(native: Native) -> None:
    graph, operands = trace_mask_mod(lambda b, h, i, j: i // j == 0)
    with pytest.raises(RuntimeError, match="by zero"):
        native.mask(graph, operands, positions(16, 0), torch.zeros(4, dtype=torch.int32))


def test_hidden_pairs_pass_no_gradient_whatever_they_hold(native: Native) -> None:
    gain = torch.ones((), requires_grad=True)
    graph, operands = trace_score_mod(lambda s, b, h, i, j: s * gain, torch.float32)
    scores, grad = torch.full((16, 8), math.nan), torch.zeros(16, 8)
    of_scores, (total,) = native.backward(graph, operands, scores, grad, positions(16, 0), positions(8, 1))
    assert (of_scores == 0).all()
    assert total == 0


# The code -------------------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_kernel() -> None:
    header = (SOURCES / "functions.h").read_text()
    listed = re.search(r"enum class Operation : int \{(.*?)\};", header, re.S)
    assert listed is not None
    assert dict(re.findall(r"(\w+) = (\d+),", listed[1])) == {name: str(number) for name, number in OPERATIONS.items()}
    for name, members in (("Register", expressions.Register), ("TapeKind", tape.Kind)):
        found = re.search(rf"enum class {name} : int \{{(.*?)\}}", header, re.S)
        assert found is not None
        assert [word.strip().upper() for word in found[1].split(",")] == [member.name for member in members]
    types = re.search(r"enum class Type : int \{(.*?)\}", (SOURCES / "problem.h").read_text(), re.S)
    assert types is not None
    assert len(types[1].split(",")) == len(TYPES)


@settings(max_examples=300)
@given(st.data())
def test_code_that_is_changed_never_crashes(native: Native, data: st.DataObject) -> None:
    """It raises, or computes something."""
    parameters = Parameters.of(HEADS, N, torch.float32)
    name = data.draw(st.sampled_from(("T5 buckets", "torch.where", "products of rows", "table[h, i - j]")))
    graph, operands = trace_score_mod(SCORE_MODS[name](parameters), torch.float32)
    code = list(encode(graph, operands))
    strange = st.one_of(st.integers(-3, 70), st.sampled_from((2**31, -(2**31), 2**62, -(2**63))))
    for _ in range(data.draw(st.integers(1, 4))):
        code[data.draw(st.integers(0, len(code) - 1))] = data.draw(strange)
    code = code[: data.draw(st.integers(0, len(code)))] if data.draw(st.booleans()) else code
    q = torch.arange(16, dtype=torch.int32)
    scores, grads, sums = torch.zeros(16, 16), torch.ones(16, 16), [torch.zeros(x.shape) for x in operands]
    places = (ctypes.c_void_p * len(sums))(*(x.data_ptr() for x in sums))
    for run, more in (("run_score_f32", (scores, 16)), ("run_backward_f32", (scores, grads, 16, places))):
        try:
            native(run, code, operands, *native.tile(q, q), *more)
        except RuntimeError as error:
            assert str(error)  # noqa: PT017


LONG, SQUARE, COMPLEX = torch.zeros(1, 4096), torch.zeros(64, 64), torch.zeros(N, dtype=torch.complex64)
UNTRANSLATABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "an operator": (lambda s, b, h, i, j: torch.special.i0(s), "the tape has no aten.i0"),
    "a long reduction": (lambda s, b, h, i, j: s + LONG[i].sum(), "reduces 4,096 numbers"),
    "too many operations": (lambda s, b, h, i, j: s + (SQUARE @ SQUARE[i]).dot(SQUARE[j]), "more than 4096"),
    "complex numbers": (lambda s, b, h, i, j: s + COMPLEX[i].abs(), "complex"),
}


@pytest.mark.parametrize("name", UNTRANSLATABLE)
def test_what_a_tape_cannot_express(name: str) -> None:
    mod, says = UNTRANSLATABLE[name]
    with pytest.raises(Untranslatable, match=says):
        encode(*trace_score_mod(mod, torch.float32))


def test_sources_stand_alone() -> None:
    """Neither includes anything of torch."""
    for path in Path(SOURCES).glob("function*"):
        assert "torch/" not in path.read_text()
