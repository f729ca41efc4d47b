"""Calls of the native operator with tampered code, in other processes."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from compiled_dilated.lowerings.native import Work
from tests.cases import by_name
from tests.support.native import problem_of

# No number of a code may end the process.
TAMPERING = """
import random, sys, time
import torch
from tests.support.native_tampering import tamper
tamper(int(sys.argv[1]), int(sys.argv[2]))
print("alive")
"""
EXTREMES = (
    0, 1, -1, 2, 3, 16, 255, 2**15, 2**30, 2**30 + 1, -(2**30), 2**31, -(2**31), 2**32, 2**60,
    2**62, 2**63 - 1, -(2**63),
)  # fmt: skip


def tamper(seed: int, count: int) -> None:
    """Call with randomly changed codes.

    A call raises an error or returns a result.
    """
    rng = random.Random(seed)
    names = (
        "window", "longnet causal", "neighborhood dilated, shifted", "padding and documents",
        "tiles", "hilbert window within", "global positions", "from_mod within",
        "congruent in segments", "block window", "documents by lengths, window",
    )  # fmt: skip
    problems = [problem_of(by_name(name), 40, torch.float32)[0] for name in names]
    outcomes = {"errors": 0, "results": 0}
    for _ in range(count):
        problem = rng.choice(problems)
        code = list(problem.work.code)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            code = _changed(code, rng)
        code = [min(2**63 - 1, max(-(2**63), number)) for number in code]
        work = Work(tuple(code), problem.work.names, ())
        try:
            replace(problem, work=work, grad_lse=None).results()
            outcomes["results"] += 1
        except RuntimeError:
            outcomes["errors"] += 1
    print(outcomes)
    assert min(outcomes.values()) > count // 50, outcomes


def _changed(code: list[int], rng: random.Random) -> list[int]:
    """A code with a number inserted, removed or replaced, or truncated."""
    code = list(code)
    place = rng.randrange(len(code)) if code else 0
    kind = rng.random()
    if not code or kind < 0.1:
        code.insert(place, rng.choice(EXTREMES))
    elif kind < 0.2:
        del code[place]
    elif kind < 0.25:
        code = code[:place]
    elif kind < 0.6:
        code[place] += rng.choice((-1, 1, 2, -2))
    elif kind < 0.9:
        code[place] = rng.choice(EXTREMES)
    else:
        code[place] = rng.choice(code)
    return code
