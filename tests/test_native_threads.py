"""Native kernels: threads, Python threads, forks and memory."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
import torch

from compiled_dilated.lowerings.native import Work
from tests.cases import CASES, Case, by_name
from tests.support.native import (
    FEW_HEADS,
    FLOATS,
    Problem,
    assert_near,
    assert_same_bits,
    check_threads,
    normal,
    problem_of,
    reference_results,
    work_of,
)
from tests.support.turns import in_turn

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_threads_do_not_change_a_bit(case: Case, threads: Callable[[int], None]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_threads(problem_of(case, max(case.lengths), dtype)[0], threads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_do_not_change_a_bit_of_any_case(
    case: Case, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    check_threads(problem_of(case, max(case.lengths), dtype)[0], threads, (2, 3, 7), 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FEW_HEADS)
def test_long_sequences_of_one_head_are_deterministic_over_thread_counts(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    n = 3280
    mask = FEW_HEADS[name](n)
    q, k, v, grad_out = (normal(1, 1, n, 32, dtype=dtype, seed=seed) for seed in range(4))
    check_threads(Problem(work_of(mask, 1), q, k, v, grad_out, None), threads, (2, 3, 7), 3)


# Query heads, key heads, width and dtype.
SHAPES = ((1, 1, 16, torch.float32), (3, 1, 10, torch.float32), (2, 1, 32, torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "width", "dtype"), in_turn(list(FEW_HEADS), SHAPES)
)
def test_few_heads_are_deterministic_over_thread_counts(
    name: str,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    threads: Callable[[int], None],
) -> None:
    n = 440  # of 40 by 11, and several tiles
    mask = FEW_HEADS[name](n)
    q, grad_out = (normal(1, heads, n, width, dtype=dtype, seed=seed) for seed in (1, 2))
    k, v = (normal(1, kv_heads, n, width, dtype=dtype, seed=seed) for seed in (3, 4))
    grad_lse = normal(1, heads, n, dtype=torch.float32, seed=5)
    problem = Problem(work_of(mask, heads), q, k, v, grad_out, grad_lse)
    check_threads(problem, threads, (2, 7), 1)
    threads(2)
    assert_near(problem.results(), reference_results(mask, problem), name)


def test_calls_from_several_python_threads_at_once() -> None:
    problems = []
    for name in ("window", "longnet causal", "hilbert window", "causal"):
        for dtype in (torch.float32, torch.bfloat16):
            problems.append(problem_of(by_name(name), 331, dtype)[0])
    expected = [problem.results() for problem in problems]
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for turn in range(2 * len(problems)):
                number = (first + turn) % len(problems)
                problem = problems[number]
                assert_same_bits(problem.results(), expected[number], problem.work.code[:9])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, errors[0]


def test_a_forked_process_computes_too(threads: Callable[[int], None]) -> None:
    """A forked process has one thread, as in torch's DataLoader.

    The parent's other threads do not exist there.
    """
    problem = problem_of(by_name("window"), 331, torch.float32)[0]
    threads(2)
    expected = problem.results()
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)
            assert_same_bits(problem.results(), expected)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_thousands_of_calls_leak_nothing() -> None:
    problems = []
    for name in ("window or sinks", "padding and documents", "from_mod within"):
        for dtype in (torch.float32, torch.bfloat16):
            problems.append(problem_of(by_name(name), 127, dtype)[0])
    # Calls that raise, and calls that are computed again because of NaN.
    plain = problems[0]
    refused = replace(plain, work=Work(plain.work.code[:-3], (), ()))
    spoiled = replace(plain, k=plain.k.clone())
    spoiled.k[:, :, 5] = math.nan

    def calls(count: int) -> int:
        for _ in range(count):
            for problem in problems:
                problem.results()
            spoiled.forward()
            with pytest.raises(RuntimeError):
                refused.forward()
        return int(psutil.Process().memory_info().rss)

    # 14 calls of an operator each: a leak of 500 bytes a call is found.
    before = calls(30)
    grown = calls(150) - before
    assert grown < 2**20, f"{grown / 2**20:.1f} MiB more after 2100 calls"
