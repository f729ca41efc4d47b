"""Plans within a memory limit, verified by peaks of calls.

A plan promises the batch and the length that fit.

Each peak is measured in a process of its own, as in test_memory.py: after a small call of the same
kind, freed memory goes back to the system, and ballast makes up for peaks of the past. Then inputs
are allocated and the call runs; the peak counts from before the inputs. The processes of several
shapes are forks of one that has only imported torch, which takes longer than a call.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import fitting, masks
from compiled_dilated.footprints import ROUNDING
from tests.support.forked import run_code

MIB = 2**20
# The promised size is filled to at least this share of the limit.
CLOSE = 0.95

MEASURE = """
import ctypes, json, os, resource, sys
import psutil, torch
import compiled_dilated as cd

program, small, lowering = eval(sys.argv[1]), eval(sys.argv[2]), sys.argv[3]
shapes, dtype = json.loads(sys.argv[4]), getattr(torch, sys.argv[5])
training, ballast_bytes = sys.argv[6] == "training", int(sys.argv[7])
libc = ctypes.CDLL(None)
libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed blocks go back to the system
# One process for each shape; this one has no threads yet.
for shape in shapes:
    child = os.fork()
    if not child:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"the call of {shape} failed")
else:
    sys.exit()
torch.set_num_threads(2)

def call(program, shape):
    heads = shape[1] // 2
    sizes = [shape, [shape[0], heads, *shape[2:]], [shape[0], heads, *shape[2:]]]
    q, k, v = [torch.empty(size, dtype=dtype).normal_().requires_grad_(training) for size in sizes]
    out = cd.compile(program, lowering=lowering)(q, k, v)
    if training:
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out).normal_())

def resident():
    return psutil.Process().memory_info().rss

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

call(small, [1, *shape[1:2], 512, *shape[3:]])
libc.malloc_trim(0)
ballast = torch.ones(max(1, peak() - resident()), dtype=torch.uint8)
before = resident()
call(program, shape)
spy = torch.ones(ballast_bytes, dtype=torch.uint8)
print(peak() - before)
"""

WINDOW = "cd.masks.window(64) & cd.masks.causal()"
LONGNET = "cd.longnet((256, 512), (1, 2))"


class Measured:
    """Peaks of calls in fresh processes.

    The calls have one program, dtype, lowering and way.
    """

    def __init__(self, program: str, dtype: str, lowering: str, way: str) -> None:
        self.program, self.dtype, self.lowering = program, dtype, lowering
        self.training = way == "training"

    def plan(self, shape: tuple[int, ...], limit: int) -> cd.Plan:
        torch.set_num_threads(2)
        return cd.plan(
            eval(self.program),
            shape,
            kv_heads=shape[1] // 2,
            dtype=getattr(torch, self.dtype),
            training=self.training,
            lowering=self.lowering,
            memory_limit=limit,
        )

    def peaks(self, *shapes: tuple[int, ...], ballast: int = 1) -> list[int]:
        """The peak of a call of each shape."""
        way = "training" if self.training else "forward"
        sizes = (json.dumps(shapes), self.dtype, way, str(ballast))
        run = run_code(MEASURE, self.program, self.program, self.lowering, *sizes)
        assert run.returncode == 0, run.stderr
        return [int(line) for line in run.stdout.splitlines()]


def check_bound(measured: Measured, shape: tuple[int, ...], limit: int, least: float) -> None:
    """Check that the promised batch peaks below the limit.

    It fills at least a share of the limit.
    """
    fit = measured.plan(shape, limit).fit
    assert fit is not None
    (peak,) = measured.peaks((fit.batch, *shape[1:]))
    assert least * limit <= peak <= limit, f"{fit}: {peak / limit:.1%} of the limit"


def check(measured: Measured, shape: tuple[int, ...], limit: int) -> None:
    """Check that promised sizes peak within 5% below the limit, and larger ones above it.

    The sizes are batch and length; the larger ones are more by a twentieth, at least one row.
    """
    plan = measured.plan(shape, limit)
    fit = plan.fit
    assert fit is not None
    assert fit.tokens is not None
    batch, heads, tokens, width = shape
    promised = [(fit.batch, heads, tokens, width), (batch, heads, fit.tokens, width)]
    # Of a size that fits by a little more than its row, no measured peak is sure.
    larger = [
        (fit.batch + 1 + fit.batch // 20, heads, tokens, width),
        (batch, heads, fit.tokens + fit.tokens // 20, width),
    ]
    peaks = measured.peaks(*promised, *larger)
    for shape, peak in zip(promised, peaks[:2], strict=True):
        assert CLOSE * limit <= peak <= limit, f"{shape}: {peak / limit:.1%} of the limit"
    for shape, peak in zip(larger, peaks[2:], strict=True):
        assert peak > limit, f"{shape} fits too"


only_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="glibc's malloc and Linux's count of resident pages",
)


@only_linux
@pytest.mark.parametrize(
    ("program", "dtype", "way"),
    [
        (WINDOW, "float32", "forward"),
        pytest.param(LONGNET, "bfloat16", "training", marks=pytest.mark.slow),
    ],
)
def test_what_is_promised_fits_and_no_more(program: str, dtype: str, way: str) -> None:
    measured = Measured(program, dtype, "auto", way)
    check(measured, (4, 8, 1024, 64), 250 * MIB)


@only_linux
@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("program", [WINDOW, LONGNET])
def test_large_limits(program: str, dtype: str, way: str) -> None:
    measured = Measured(program, dtype, "auto", way)
    check(measured, (2, 8, 4096, 64), 2000 * MIB)


@only_linux
@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("program", "lowering"), [(WINDOW, "tiled"), (LONGNET, "tiled"), (LONGNET, "strided")]
)
def test_lowerings_of_tiles_stay_within_the_limit(
    program: str, lowering: str, dtype: str, way: str
) -> None:
    """Their workspace is a bound, of which a call uses a part."""
    measured = Measured(program, dtype, lowering, way)
    check_bound(measured, (2, 8, 2048, 64), 500 * MIB, 0.85)


@only_linux
def test_the_measurement_sees_what_is_held() -> None:
    """A peak that does not see 64 MiB more proves nothing."""
    measured = Measured(WINDOW, "float32", "auto", "forward")
    shape, more = (1, 2, 1024, 64), 64 * MIB
    tensors = measured.plan(shape, 100 * MIB).memory.total
    (peak,) = measured.peaks(shape, ballast=more)
    assert more - MIB <= peak <= more + tensors + 4 * MIB


# What the plan counts


def test_the_parts_of_a_footprint() -> None:
    plan = cd.plan(masks.causal(), (2, 8, 100, 64), kv_heads=2, value_dim=32, lowering="tiled")
    memory = plan.memory
    assert memory.inputs == 4 * 2 * 100 * (8 * 64 + 2 * 64 + 2 * 32)
    assert memory.output == 4 * 2 * 100 * 8 * 32
    assert memory.lse == 4 * 2 * 100 * 8
    assert memory.gradients == 0
    assert memory.workspace == plan.cost.peak_bytes + ROUNDING
    assert memory.total == sum(value for name, value in memory.to_json().items() if name != "total")


def test_a_backward_takes_gradients_and_a_copy_of_the_lse() -> None:
    shape = (2, 8, 4096, 64)
    forward = cd.plan(masks.causal(), shape, dtype=torch.bfloat16).memory
    plan = cd.plan(masks.causal(), shape, dtype=torch.bfloat16, training=True)
    assert plan.memory.gradients == plan.problem.tensor_bytes
    assert plan.memory.inputs == forward.inputs
    # The lse is float32, of two-byte inputs too.
    assert forward.lse == 2 * 8 * 4096 * 4
    rows = 2 * 8 * 4096
    assert plan.memory.workspace == plan.cost.backward_bytes + forward.lse + rows + ROUNDING


def test_bytes_are_counted_without_pairs() -> None:
    """The memory is known before the pairs are counted.

    The kernel finds its own tiles.
    """
    proposals = cd.plan(masks.window(3), (1, 1, 64, 8)).chosen
    for proposal in proposals:
        assert proposal.workspaces == (proposal.cost.peak_bytes, proposal.cost.backward_bytes)


# What fits


def fit_of(program: Any, shape: tuple[int, ...], limit: int | str, **options: Any) -> Any:
    return cd.plan(program, shape, memory_limit=limit, **options).fit


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lowering", ["auto", "tiled", "strided"])
def test_one_more_does_not_fit(lowering: str, training: bool) -> None:
    program, shape, limit = cd.longnet((64, 128), (1, 2)), (3, 4, 500, 16), 24 * MIB
    options: dict[str, Any] = {"lowering": lowering, "training": training}
    fit = fit_of(program, shape, limit, **options)

    def total(batch: int, tokens: int) -> int:
        return cd.plan(program, (batch, 4, tokens, 16), **options).memory.total

    assert total(fit.batch, 500) == fit.batch_bytes <= limit < total(fit.batch + 1, 500)
    assert total(3, fit.tokens) == fit.tokens_bytes <= limit < total(3, fit.tokens + 1)
    assert fit.tokens_end == "memory"


def test_a_size_as_text_and_as_bytes() -> None:
    assert fit_of(masks.full(), (1, 1, 64, 8), "1GiB") == fit_of(masks.full(), (1, 1, 64, 8), 2**30)


def test_a_program_of_one_length_fits_at_that_length() -> None:
    fit = fit_of(cd.hilbert_window((32, 32), 3), (1, 4, 1024, 16), "1GiB")
    assert (fit.tokens, fit.tokens_end) == (1024, "program")
    # A batch that is too large for the limit, and no shorter sequence.
    plan = cd.plan(cd.hilbert_window((32, 32), 3), (9, 4, 1024, 16), memory_limit="6MiB")
    assert plan.fit is not None
    assert plan.fit.tokens == 0
    assert "9 batch rows fit at no length of this program" in plan.explain()


def test_a_grid_ends_the_longest_sequence() -> None:
    fit = fit_of(masks.neighborhood((32, 32), 3), (1, 4, 500, 16), "1GiB")
    assert (fit.tokens, fit.tokens_end) == (1024, "program")


def test_a_batch_beyond_the_limit_is_planned_and_the_largest_named() -> None:
    plan = cd.plan(masks.window(8), (64, 4, 1024, 16), memory_limit="8MiB")
    assert plan.fit is not None
    assert plan.problem.batch == 64
    assert 1 <= plan.fit.batch < 64
    assert plan.fit.tokens is not None
    assert 1 <= plan.fit.tokens < 1024


def test_decoding_has_a_largest_batch_and_no_length() -> None:
    plan = cd.plan(masks.causal(), (1, 8, 1, 64), kv_len=4096, q_offset=4095, memory_limit="100MiB")
    assert plan.fit is not None
    assert plan.fit.tokens is None
    row = 2 * 8 * 4096 * 64 * 4
    assert plan.fit.batch == 100 * MIB // row - 1 or plan.fit.batch == 100 * MIB // row
    assert plan.memory.inputs >= row


def test_explain_prints_the_limit() -> None:
    plan = cd.plan(masks.window(8), (1, 4, 1024, 16), memory_limit="64MiB", training=True)
    text, fit = plan.explain(), plan.fit
    assert fit is not None
    assert f"limit     64.0 MiB: at most {fit.batch:,} batch rows of 1,024 tokens" in text
    assert f"1 batch row of at most {fit.tokens:,} tokens" in text
    assert re.search(r"memory    forward and backward at most [\d.]+ MiB \(q, k and v 0.8, ", text)
    assert json.loads(json.dumps(plan.to_json()))["fit"]["batch"] == fit.batch
    assert cd.plan(masks.window(8), (1, 4, 1024, 16)).to_json()["fit"] is None


def test_what_does_not_fit_says_what_a_row_takes() -> None:
    with pytest.raises(ValueError, match="memory_limit must be at least") as raised:
        cd.plan(masks.window(8), (2, 4, 1024, 16), memory_limit="3MiB")
    message = str(raised.value)
    memory = cd.plan(masks.window(8), (1, 4, 1024, 16)).memory
    assert f"at least {memory.total:,} bytes: one batch row, q of (1, 4, 1024, 16)" in message
    assert "got 3,145,728 bytes (3.0 MiB)" in message
    # The length that the message names fits, and no longer one.
    length = re.search(r"at most ([\d,]+) tokens", message)
    assert length is not None
    tokens = int(length[1].replace(",", ""))
    totals = [cd.plan(masks.window(8), (1, 4, n, 16)).memory.total for n in (tokens, tokens + 1)]
    assert totals[0] <= 3 * MIB < totals[1]
    # At the bytes that the message names one row fits.
    assert fit_of(masks.window(8), (2, 4, 1024, 16), memory.total).batch == 1


@given(
    fixed=st.integers(0, 10**6),
    slope=st.integers(1, 1000),
    step=st.integers(1, 50),
    limit=st.integers(1, 10**8),
    start=st.integers(1, 10**6),
    end=st.integers(1, 10**6),
)
def test_the_search_ends_at_the_largest(
    fixed: int, slope: int, step: int, limit: int, start: int, end: int
) -> None:
    """Of sizes that rise in steps, and of programs that end."""

    class Sizes:
        least_bytes = slope
        evaluations = 0

        def __call__(self, count: int) -> int | None:
            self.evaluations += 1
            return None if count > max(end, start) else fixed + slope * (count + count // step)

    sizes = Sizes()
    largest = fitting._largest(sizes, limit, start, 2**30)  # type: ignore[arg-type]
    assert sizes.evaluations <= 120
    if largest:
        size = sizes(largest)
        assert size is not None
        assert size <= limit
    beyond = sizes(largest + 1)
    assert beyond is None or beyond > limit or largest == 2**30
