"""Peak resident memory of a call, beyond its inputs and outputs.

The call has 64K tokens.

Each measurement is a process of its own, by its ru_maxrss (the largest resident memory ever):

1. Warm up: a program of the same kind runs on 2048 tokens, which loads code, thread stacks and the
   library's tables.
2. Allocate the inputs and touch every page: q, k, v, and for the backward out and its gradient.
3. Return unused memory to the system: malloc_trim, and a fixed M_MMAP_THRESHOLD, by which
   larger blocks are returned when they are freed. Ballast fills the difference to the peak of the
   past, below which a new peak would be invisible.
4. Run the call once, planning included. The result is its peak, minus the resident memory before,
   minus the bytes that it returns.

Shares are of q, k, v and out together: 512 MiB in float32 at 64K tokens, 8 heads of 64.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import pytest

from tests.support.forked import run_code

TOKENS = 65536
# Shares of q, k, v and out: a forward beyond its output, a backward beyond the gradients.
LIMITS = {"forward": 0.05, "backward": 0.15}

MEASURE = """
import ctypes, json, resource, sys
import psutil, torch
import compiled_dilated as cd

libc = ctypes.CDLL(None)
libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
program, small = (eval(code) for code in sys.argv[1:3])
dtype, backward, tokens = getattr(torch, sys.argv[3]), sys.argv[4] == "backward", int(sys.argv[5])
torch.set_num_threads(2)

def tensors(n):
    shape = (1, 8, n, 64)
    return [torch.randn(shape, dtype=dtype).requires_grad_(backward) for _ in range(3)]

def resident():
    return psutil.Process().memory_info().rss

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux

warm = tensors(2048)
out = cd.compile(small)(*warm)
if backward:
    torch.autograd.grad(out, warm, torch.ones_like(out))
del warm, out

inputs, attend = tensors(tokens), cd.compile(program)
if backward:
    out = attend(*inputs)
    grad_out = torch.empty_like(out).normal_()
libc.malloc_trim(0)
ballast = torch.ones(max(1, peak() - resident()), dtype=torch.uint8)
before = resident()
assert abs(peak() - before) < 2**20, "the peak of the past is not the memory of now"
if backward:
    results = torch.autograd.grad(out, inputs, grad_out)
else:
    out = attend(*inputs)
    results = [out]
added_bytes = peak() - before - sum(x.nbytes for x in results)
share = added_bytes / (sum(x.nbytes for x in inputs) + out.nbytes)
print(json.dumps({"share": share, "lowering": attend.plan(*inputs).lowering}))
"""

# A program, and one of its kind for 2048 tokens.
PROGRAMS = {
    "longnet": (
        "cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True)",
        "cd.longnet((512, 1024), (1, 2), causal=True)",
    ),
    "local window": ("cd.local_window(256)", "cd.local_window(256)"),
    "hilbert window": ("cd.hilbert_window((256, 256), 12)", "cd.hilbert_window((32, 64), 12)"),
    "block sparse": (
        f"cd.block_sparse(0.01, tokens={TOKENS})",
        "cd.block_sparse(0.2, tokens=2048)",
    ),
    "window or sinks": (
        "cd.masks.window(256) | cd.masks.sinks(4)",
        "cd.masks.window(256) | cd.masks.sinks(4)",
    ),
}
QUICK = {("local window", "float32"), ("local window", "bfloat16"), ("hilbert window", "float32")}


def measurements() -> list[Any]:
    """(program, dtype, forward or backward); slow unless quick."""
    out = []
    for way, dtype, name in itertools.product(LIMITS, ("float32", "bfloat16"), PROGRAMS):
        is_quick = way == "forward" and (name, dtype) in QUICK
        out.append(pytest.param(name, dtype, way, marks=() if is_quick else pytest.mark.slow))
    return out


def measure(code: str, *arguments: str) -> dict[str, Any]:
    """The printed record of a measurement in a process of its own."""
    run = run_code(code, *arguments)
    assert run.returncode == 0, run.stderr
    record: dict[str, Any] = json.loads(run.stdout)
    return record


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="glibc's malloc and Linux's count of resident pages",
)
@pytest.mark.parametrize(("name", "dtype", "way"), measurements())
def test_peak_memory(name: str, dtype: str, way: str) -> None:
    record = measure(MEASURE, *PROGRAMS[name], dtype, way, str(TOKENS))
    assert record["share"] <= LIMITS[way], (
        f"{name} by {record['lowering']}: {record['share']:.1%} of q, k, v and out"
    )


def test_the_measurement_sees_64_mib() -> None:
    block_bytes = 64 * 2**20
    call = "    out = attend(*inputs)\n"
    allocation = f"    torch.ones({block_bytes}, dtype=torch.uint8)\n"
    code = MEASURE.replace(f"{call}    results", f"{call}{allocation}    results")
    assert code != MEASURE
    program = PROGRAMS["local window"]
    record = measure(code, *program, "float32", "forward", "8192")
    tensor_bytes = 4 * 8 * 8192 * 64 * 4
    added_bytes = record["share"] * tensor_bytes
    assert block_bytes - 2**20 <= added_bytes <= block_bytes + 12 * 2**20
