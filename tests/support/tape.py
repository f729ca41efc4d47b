"""The native functions of tapes over tensors, by a driver in C++."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_dilated.mods import Graph, over_pairs, trace_mask_mod, trace_score_mod
from compiled_dilated.native.build import SOURCES, NativeUnavailable
from compiled_dilated.native.cache import locked
from compiled_dilated.native.expressions import TYPES
from compiled_dilated.native.recipes import FLAGS, find_compiler
from compiled_dilated.native.tape import encode

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
static std::string message;
template <class F> int guarded(const F& f) {
  try { f(); return 0; }
  catch (const std::runtime_error& error) { message = error.what(); return 1; }
}
static Function read(
    const int64_t* code, int64_t count, const Array* operands, int64_t operand_count) {
  const int64_t* at = code;
  Function function = read_function(at, code + count);
  if (at != code + count) throw std::runtime_error("numbers are left over");
  check_operands(function, operands, operand_count);
  return function;
}
#define GRAPH const int64_t* code, int64_t count, const Array* operands, int64_t operand_count
#define READ read(code, count, operands, operand_count)
#define OF GRAPH, const int32_t* q, int lanes, const int32_t* k, int keys, int64_t b, int64_t h
#define TILE {b, h, q, lanes, k, keys}
extern "C" {
#define SHOWN __attribute__((visibility("default")))
SHOWN const char* error_text() { return message.c_str(); }
SHOWN int run_mask(OF, uint8_t* seen) {
  return guarded([&] { mask(READ, operands, TILE, seen, room); });
}
SHOWN int run_score_f32(OF, float* scores, int ld) {
  return guarded([&] { score(READ, operands, TILE, scores, ld, room); });
}
SHOWN int run_score_f64(OF, double* scores, int ld) {
  return guarded([&] { score(READ, operands, TILE, scores, ld, room); });
}
SHOWN int run_backward_f32(OF, const float* scores, float* grads, int ld, float* const* sums) {
  return guarded([&] {
    score_backward(READ, operands, TILE, scores, grads, ld, sums, room);
  });
}
SHOWN int run_backward_f64(OF, const double* scores, double* grads, int ld, double* const* sums) {
  return guarded([&] {
    score_backward(READ, operands, TILE, scores, grads, ld, sums, room);
  });
}
SHOWN int run_classify(
    GRAPH, int64_t b, int64_t h, int64_t q0, int64_t q1, int64_t k0, int64_t k1, int* verdict) {
  return guarded([&] { *verdict = classify(READ, operands, b, h, q0, q1, k0, k1); });
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
        return Array(
            x.data_ptr(),
            TYPES[x.dtype],
            x.dim(),
            (ctypes.c_int64 * 8)(*x.shape),
            (ctypes.c_int64 * 8)(*x.stride()),
        )


class Native:
    """The driver's functions, called with tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.error_text.restype = ctypes.c_char_p

    def __call__(
        self, name: str, code: Sequence[int], operands: Sequence[Tensor], *arguments: Any
    ) -> None:
        numbers = (ctypes.c_int64 * len(code))(*code)
        arrays = (Array * max(1, len(operands)))(*map(Array.of, operands))
        converted = [numbers, ctypes.c_int64(len(code)), arrays, ctypes.c_int64(len(operands))]
        for argument in arguments:
            if isinstance(argument, Tensor):
                argument = ctypes.c_void_p(argument.data_ptr())
            converted.append(argument)
        if getattr(self.library, name)(*converted):
            raise RuntimeError(self.library.error_text().decode())

    def tile(self, q: Tensor, k: Tensor, b: int = B, h: int = H) -> tuple[Any, ...]:
        return q, len(q), k, len(k), ctypes.c_int64(b), ctypes.c_int64(h)

    def mask(self, graph: Graph, operands: Sequence[Tensor], q: Tensor, k: Tensor) -> Tensor:
        """The mask of all pairs, (queries, keys)."""
        seen = torch.full((len(k), len(q)), 7, dtype=torch.uint8)
        self("run_mask", encode(graph, operands), operands, *self.tile(q, k), seen)
        assert seen.max() <= 1
        return seen.bool().T

    def score(
        self, graph: Graph, operands: Sequence[Tensor], scores: Tensor, q: Tensor, k: Tensor
    ) -> Tensor:
        """The new scores, (queries, keys)."""
        # Columns past the tile, which must not change.
        columns = len(q) + 3
        padded = torch.full((len(k), columns), 5.0, dtype=scores.dtype)
        padded[:, : len(q)] = scores.T
        code, tile = encode(graph, operands), self.tile(q, k)
        self(f"run_score_{kind(scores)}", code, operands, *tile, padded, columns)
        assert (padded[:, len(q) :] == 5).all()
        return padded[:, : len(q)].T

    def backward(
        self,
        graph: Graph,
        operands: Sequence[Tensor],
        scores: Tensor,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the scores, and of the operands that learn."""
        transposed, grads = scores.T.contiguous(), grad.T.contiguous()
        sums: list[Tensor | None] = []
        addresses: list[int | None] = []
        for x in operands:
            total = torch.zeros(x.shape, dtype=scores.dtype) if x.requires_grad else None
            sums.append(total)
            addresses.append(None if total is None else total.data_ptr())
        places = (ctypes.c_void_p * max(1, len(sums)))(*addresses)
        arguments = (*self.tile(q, k), transposed, grads, len(q), places)
        self(f"run_backward_{kind(scores)}", encode(graph, operands), operands, *arguments)
        return grads.T, sums

    def classify(self, graph: Graph, operands: Sequence[Tensor], q: range, k: range) -> int:
        """The verdict of a block of pairs."""
        verdict = ctypes.c_int()
        bounds = map(ctypes.c_int64, (B, H, q[0], q[-1], k[0], k[-1]))
        self("run_classify", encode(graph, operands), operands, *bounds, ctypes.byref(verdict))
        return verdict.value


def kind(x: Tensor) -> str:
    return "f32" if x.dtype == torch.float32 else "f64"


def positions(count: int, seed: int, n: int = N) -> Tensor:
    """Ascending positions, some more than once."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, n, (count,), generator=generator)
    return numbers.sort().values.to(torch.int32).contiguous()


def arguments(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """b, h, q and kv as over_pairs takes them."""
    return torch.tensor([[B]]), torch.tensor([[H]]), q.long()[:, None], k.long()[None, :]


def same(actual: Tensor, expected: Tensor, tolerance: float, about: str = "") -> None:
    """Assert that tensors are near; NaN equals NaN."""

    def message(text: str) -> str:
        return f"{about}: {text}"

    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=message
    )


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
    tables: torch.dtype = torch.float64,
) -> None:
    """Compare values and gradients of a score_mod with autograd of its graph.

    lanes, keys: sizes of the tile.
    dtype: of the scores.
    tables: the lowest precision in which the mod itself computes.
    """
    graph, operands = trace_score_mod(mod, dtype)
    q, k = positions(lanes, seed), positions(keys, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    tolerance = max(close(dtype), close(tables))
    if scores is None:
        scores = torch.randn(lanes, keys, generator=generator, dtype=torch.float64).to(dtype)
    # 1. Values.
    x = scores.clone().requires_grad_()
    expected = over_pairs(lambda *scalars: graph.scalar(operands, *scalars), x, *arguments(q, k))
    expected = expected.broadcast_to(x.shape).to(dtype)
    result = native.score(graph, operands, scores, q, k)
    same(result, expected.detach(), tolerance, "scores")
    # 2. Gradients of the scores and of the operands.
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
    grad[0, 0] = 0
    inputs = [x, *(operand for operand in operands if operand.requires_grad)]
    expected_grads = [torch.zeros_like(leaf) for leaf in inputs]
    if expected.requires_grad:
        expected_grads = list(
            torch.autograd.grad(expected, inputs, grad, allow_unused=True, materialize_grads=True)
        )
    of_scores, sums = native.backward(graph, operands, scores, grad, q, k)
    same(of_scores, expected_grads[0], tolerance, "gradient of the scores")
    totals = [total for total in sums if total is not None]
    for total, expected_grad in zip(totals, expected_grads[1:], strict=True):
        limit = 20 * max(tolerance, close(expected_grad.dtype))
        same(total, expected_grad.to(dtype), limit, "gradient of an operand")


def compare_masks(native: Native, mod: Callable[..., Any], lanes: int, keys: int) -> int:
    """Compare a mask_mod's values with its graph's.

    The verdicts of blocks are compared with the values.

    Returns the number of blocks that are decided.
    """
    graph, operands = trace_mask_mod(mod)
    # 1. Values of pairs.
    q, k = positions(lanes, 0), positions(keys, 1)
    expected = over_pairs(lambda *scalars: graph.scalar(operands, *scalars), *arguments(q, k))
    assert torch.equal(native.mask(graph, operands, q, k), expected.broadcast_to(lanes, keys))
    # 2. Verdicts of square blocks.
    tokens = torch.arange(N, dtype=torch.int32)
    everywhere = native.mask(graph, operands, tokens, tokens)
    decided = 0
    blocks = []
    for size in (1, 2, 5, 8):
        blocks += [range(start, start + size) for start in range(0, N, size)]
    for rows, columns in itertools.product(blocks, blocks):
        if len(rows) != len(columns):
            continue
        part = everywhere[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        verdict = native.classify(graph, operands, rows, columns)
        assert verdict != EMPTY or not part.any()
        assert verdict != FULL or part.all()
        decided += verdict != PARTIAL
    return decided


def build_driver(folder: Path) -> Native:
    """Compile the driver with the kernel's sources unless a folder has it, and load it."""
    try:
        compiler = find_compiler()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    library, output = folder / "driver.so", folder / "unfinished.so"
    names = ("functions.cpp", "function_bounds.cpp", "function_loops.cpp")
    units = [folder / "driver.cpp", *(SOURCES / name for name in names)]
    flags = ("-O3", *FLAGS, "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-shared")
    with locked(folder):
        if not library.exists():
            units[0].write_text(DRIVER)
            subprocess.run(list(map(str, (*compiler, *flags, *units, "-o", output))), check=True)
            output.rename(library)
    return Native(ctypes.CDLL(str(library)))
